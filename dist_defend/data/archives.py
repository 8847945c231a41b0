"""Pictures in tar files: webdataset's shards, or class folders in a tar. Nothing is unpacked to the disk.

A shard holds samples: files of one name up to the first dot, one of them a picture, one (.cls, or .json with "label")
its label. Where no sample has a label, the folders in the tar are the classes, below those of the splits if there are.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from dist_defend.data.class_order import label_notes, labels_of_words, number_notes, order_classes
from dist_defend.data.folders import NO_CLASS
from dist_defend.data.pictures import ENDINGS, is_picture
from dist_defend.data.reading import Keys, PictureSource
from dist_defend.data.splits import SPLITS, is_passed_over, listed, split_in, split_of
from dist_defend.errors import UserError
from dist_defend.files import open_regular
from dist_defend.strict_json import parse_json

_LABEL_ENDINGS = ("cls", "cls.txt", "label", "label.txt")
_JSON_KEYS = ("label", "cls", "class", "target")
_MOST_BYTES = 1 << 20  # of a label's file
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Member:
    """A picture in the archive ``shard``, which is read when it is asked for."""

    shard: str
    path: PurePosixPath

    @property
    def name(self) -> str:
        return f"{self.shard}/{self.path}"

    def read(self) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True)
class _InTar(Member):
    """``size`` bytes from ``offset`` of the file on."""

    offset: int
    size: int

    def read(self) -> bytes:
        with open_regular(self.shard) as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass
class Found:
    """Pictures of some archives in their order, and for each its label as text, None where it has none."""

    pictures: list[Member] = field(default_factory=list)
    words: list[str | None] = field(default_factory=list)
    other_files: int = 0


def is_shards(path: str) -> bool:
    """Whether a path names a tar or a pattern of several."""
    return path.lower().endswith(".tar")


def shard_splits(path: Path, keys: Keys) -> list[str]:
    """The splits of a tar, a folder of them or a pattern: by the shards' names, or by the folders in them."""
    return list(_splits(str(path), keys))


def open_shards(path: Path, split: str, keys: Keys) -> PictureSource:
    """One split. ``keys.labels``: the ending, or the key in .json, that has the label; ``keys.images``: the ending.

    UserError for a tar that is damaged or compressed, and for one that holds links, devices or paths that lead out.
    """
    found = _splits(str(path), keys)
    mine = found[split]
    if _is_labelled(found):
        classes, labels = labels_of_words({name: one.words for name, one in found.items()}, path)
        notes = []
    else:
        classes, labels = labels_by_folder(found)
        how = "classes are the folders in it" if classes else "images have no label (-1)"
        notes = [f"no labels (.cls, .json) in the tar: {how}", *number_notes(classes)]
    notes += label_notes(classes, labels, split)
    if mine.other_files:
        notes.append(f"files in the tar that are neither pictures nor labels, passed over: {mine.other_files}")
    return source_of(mine, labels[split], classes, notes)


def source_of(mine: Found, labels: np.ndarray, classes: list[str], notes: list[str]) -> PictureSource:
    """These pictures, each read from its archive."""
    names = [member.name for member in mine.pictures]
    return PictureSource(names, labels, classes, notes, lambda row: mine.pictures[row].read())


def _splits(place: str, keys: Keys) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for split, shards in _shards(place).items():
        found[split] = Found()
        for shard in shards:
            _read_shard(shard, keys, found[split])
        if not found[split].pictures:
            raise UserError(f"{place}: no pictures in the shards of {split} ({', '.join(ENDINGS)}); check --path")
    if len(found) == 1 and not _is_labelled(found):
        return split_by_folder(found)
    return found


def _is_labelled(found: dict[str, Found]) -> bool:
    return any(word is not None for one in found.values() for word in one.words)


def _shards(place: str) -> dict[str, list[str]]:
    """Split -> tar files, in the order of their names; train where no name tells a split."""
    path = Path(place)
    if path.is_dir():
        files = [str(f) for f in sorted(path.rglob("*.tar")) if f.is_file() and not is_passed_over(f.name)]
        if not files:
            raise UserError(f"{place}: no .tar in this folder; check --path")
    else:
        files = _expanded(place)
        if missing := [file for file in files if not os.path.isfile(file)]:
            raise UserError(f"there is no file {missing[0]} ({len(missing)} of {len(files)}); check --path")
    named: dict[str, list[str]] = {}
    for file in files:
        name = Path(file)
        split = split_in(name.stem) or (split_of(name.parent.name) if path.is_dir() else None)
        named.setdefault(split or "", []).append(file)
    if "" in named and len(named) > 1:
        raise UserError(f"{place}: {named[''][0]} is not named after a split as others are; name it, or move it away")
    return {split: named[key] for split in SPLITS for key in named if (key or "train") == split}


def _expanded(pattern: str) -> list[str]:
    """name-{000000..000003}.tar as webdataset's users write it."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise UserError(f"{pattern}: {match[0]} must go upwards, over at most {_MOST_SHARDS} numbers")
    width = len(match[1])
    start, end = pattern[: match.start()], pattern[match.end() :]
    return [file for n in range(first, last + 1) for file in _expanded(f"{start}{n:0{width}d}{end}")]


def _members(shard: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo, PurePosixPath]]:
    """The regular files of a tar but for hidden ones."""
    try:
        size = os.path.getsize(shard)
        with open_regular(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{shard}: the member '{member.name}' leads out of the tar; ask for another copy")
                if (not member.isreg() and not member.isdir()) or member.issparse():
                    raise UserError(f"{shard}: the member '{member.name}' is a link or a device; pack plain files")
                if member.isreg() and not any(map(is_passed_over, path.parts)):
                    if member.offset_data + member.size > size:
                        raise UserError(f"{shard}: is cut short within '{member.name}'; fetch it again")
                    yield tar, member, path
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard}: not a plain tar file that can be read ({error}); unpack a compressed one") from error
    except OSError as error:
        raise UserError(f"{shard}: cannot be read ({error.strerror or error}); check --path") from error


def _read_shard(shard: str, keys: Keys, into: Found) -> None:
    samples: dict[tuple[str, str], dict[str, Member | str | None]] = {}
    for tar, member, path in _members(shard):
        stem, _, ending = path.name.partition(".")
        sample = samples.setdefault((str(path.parent), stem), {})
        ending = ending.lower()
        if ending in sample:
            raise UserError(f"{shard}: holds '{path}' twice; pack each file once")
        is_label = ending == keys.labels or ending in _LABEL_ENDINGS or ending.endswith("json")
        if is_picture(path.name):
            sample[ending] = _InTar(shard, path, member.offset_data, member.size)
        elif is_label and member.size <= _MOST_BYTES:
            content = tar.extractfile(member)
            assert content is not None  # it is a regular file
            sample[ending] = content.read().decode("utf-8", errors="replace")
        else:
            sample[ending] = None
    for (parent, stem), sample in samples.items():
        pictures = {ending: one for ending, one in sample.items() if isinstance(one, Member)}
        word, label_ending = _word(sample, keys, f"{shard}/{parent}/{stem}")
        if keys.images is not None:
            pictures = {ending: one for ending, one in pictures.items() if ending == keys.images.lower()}
        elif len(pictures) > 1 and word is not None:
            raise UserError(
                f"{shard}: the sample '{stem}' has the pictures {listed(sorted(pictures))}; choose one with --images"
            )
        into.pictures += pictures.values()
        into.words += [word] * len(pictures)
        into.other_files += sum(
            not isinstance(one, Member) and ending != label_ending for ending, one in sample.items()
        )


def _word(sample: dict[str, Member | str | None], keys: Keys, name: str) -> tuple[str | None, str | None]:
    """The label as text and the ending of the file that has it; None where there is none."""
    texts = {ending: text for ending, text in sample.items() if isinstance(text, str)}
    for ending in (keys.labels,) if keys.labels else _LABEL_ENDINGS:
        if ending in texts:
            return texts[ending].strip() or None, ending
    for ending, text in texts.items():
        if ending.endswith("json"):
            content = parse_json(text, f"{name}.{ending}: not JSON: it", "pack the shard again", may_be_nan=True)
            for key in (keys.labels,) if keys.labels else _JSON_KEYS:
                value = content.get(key) if isinstance(content, dict) else None
                if isinstance(value, int | str) and not isinstance(value, bool):
                    return str(value).strip() or None, ending
    return None, None


def split_by_folder(found: dict[str, Found]) -> dict[str, Found]:
    """The one split taken apart, where each picture lies in a folder train, test and so on that has class folders."""
    whole = next(iter(found.values()))
    folders = _folders(whole)
    tops = [split_of(inner[0]) if inner else None for inner in folders]
    if None in tops or not any(len(inner) > 1 for inner in folders):
        return found
    splits: dict[str, Found] = {}
    for member, top in zip(whole.pictures, tops, strict=True):
        mine = splits.setdefault(str(top), Found(other_files=whole.other_files))
        mine.pictures.append(member)
        mine.words.append(None)
    return {split: splits[split] for split in SPLITS if split in splits}


def _folders(found: Found) -> list[tuple[str, ...]]:
    """The folders that each picture lies in, but for outer ones that hold all pictures and no class; train/ stays."""
    folders = [member.path.parts[:-1] for member in found.pictures]
    while all(len(inner) > 1 for inner in folders) and len({inner[0] for inner in folders}) == 1:
        if split_of(folders[0][0]) is not None:
            break
        folders = [inner[1:] for inner in folders]
    return folders


def labels_by_folder(found: dict[str, Found]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Classes and labels per split, where folders are the only hint at a class."""
    tops = {}
    for split, one in found.items():
        folders = _folders(one)
        if all(inner and split_of(inner[0]) is not None for inner in folders):
            folders = [inner[1:] for inner in folders]
        tops[split] = [inner[0] if inner and split != "unlabeled" else None for inner in folders]
    names = {name for mine in tops.values() for name in mine if name is not None}
    if len(names) == 1 and next(iter(names)).lower() in NO_CLASS:
        names = set()
    classes = order_classes(names)
    label: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    return classes, {split: np.array([label.get(top, -1) for top in mine], np.int64) for split, mine in tops.items()}
