"""Folders of pictures: a folder per class, in a folder per split where there are several.

Classes are the class folders of all labelled splits together. Below its class folder a picture may lie at any depth.
Tiny-ImageNet's val/images with val_annotations.txt is read too, and a folder unlabeled with pictures anywhere in it.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dist_defend.data.class_order import is_whole, number_notes, order_classes
from dist_defend.data.pictures import ENDINGS
from dist_defend.data.reading import Keys, PictureSource
from dist_defend.data.splits import listed, one_per_split, split_of
from dist_defend.data.walking import Walk
from dist_defend.errors import UserError
from dist_defend.files import read_regular

NO_CLASS = ("images", "image", "imgs", "img", "jpegimages")  # names of folders that say nothing about a class
_MOST_BYTES = 64 << 20  # of annotations
_KIND_OF = {".tar": "webdataset", ".npz": "npz", ".beton": "beton", ".ffcv": "beton"}


@dataclass(frozen=True)
class _Split:
    """class_folders: name -> path. annotations: Tiny-ImageNet's file; then the pictures are below ``folder``."""

    folder: Path
    class_folders: Mapping[str, str]
    annotations: Path | None = None


def folder_splits(root: Path, keys: Keys) -> list[str]:
    """The splits that lie in a folder. UserError for two folders of one split."""
    return list(_split_folders(root, Walk())[0])


def open_folder(root: Path, split: str, keys: Keys) -> PictureSource:
    """One split. UserError where no class folders with pictures are found, which says what was."""
    scout, walk = Walk(), Walk()
    folders, others = _split_folders(root, scout)
    splits = {name: _look(Path(folder), scout) for name, folder in folders.items() if name != "unlabeled"}
    without = {name for name, mine in splits.items() if _says_nothing(mine) and len(splits) > 1}
    spellings = {name: [] if name in without else list(mine.class_folders) for name, mine in splits.items()}
    classes, label = _one_list(spellings)
    notes = [f"folders beside those of the splits, not read: {listed(others)}"] if others else []
    notes += number_notes(classes)
    if Path(folders[split]) != root:
        walk.folders(root)  # counts what is passed over
    if split == "unlabeled":
        return _unlabelled(folders[split], classes, notes, walk)
    mine = splits[split]
    if mine.annotations is not None:
        names, labels, more = _annotated(mine, label, walk)
        return PictureSource(names, labels, classes, [*notes, *walk.notes(), *more])
    if split in without:
        if split != "test" or not classes:
            raise UserError(
                f"{mine.folder}: holds '{next(iter(mine.class_folders))}' instead of a folder per class, and no "
                f"{mine.folder.name}_annotations.txt; sort the pictures into class folders, or list them with their "
                "labels for the kind filelist"
            )
        source = _unlabelled(str(mine.folder), classes, notes, walk)
        source.add_note(f"images without a label (-1), as {split} has no class folders: {len(source)}")
        return source
    if loose := len(scout.look(mine.folder)[1]):
        notes.append(f"pictures in no class folder, left out: {loose}")
    walk.folders(mine.folder)
    per_class = {name: walk.pictures(path) for name, path in mine.class_folders.items()}
    notes += _check(mine, per_class, is_split=mine.folder != root)
    notes += _class_notes(split, classes, per_class, spellings, label)
    in_order = sorted(per_class, key=lambda name: label[name])
    files = [file for name in in_order for file in per_class[name]]
    numbers = np.repeat([label[name] for name in in_order], [len(per_class[name]) for name in in_order])
    return PictureSource(files, numbers, classes, [*notes, *walk.notes()])


def _split_folders(root: Path, walk: Walk) -> tuple[dict[str, str], list[str]]:
    """Split -> folder, and the other folders beside them. A root without split folders is itself train or unlabeled."""
    found = walk.folders(root)
    named = {name: split for name in found if (split := split_of(name)) is not None}
    others = [name for name in found if name not in named]
    could_be_classes = "unlabeled" not in named.values() and all(_is_flat(found[name]) for name in named)
    if could_be_classes and any(_is_flat(found[name]) for name in others):  # "train" beside "bus" and "car"
        named, others = {}, []
    if not named:
        is_bare = not found and split_of(root.resolve().name) == "unlabeled"
        return {"unlabeled" if is_bare else "train": str(root)}, []
    if others and set(named.values()) == {"unlabeled"}:
        raise UserError(
            f"{root}: holds {next(iter(named))} and other folders ({listed(others)}), but no train; put class folders "
            "into train/, or give one folder as --path"
        )
    remedy = "they mean one split: give one of them as --path, or join them"
    names = one_per_split(root, ((split, name) for name, split in named.items()), remedy)
    return {split: found[name] for split, name in names.items()}, others


def _is_flat(folder: str) -> bool:
    folders, pictures = Walk().look(folder)
    return bool(pictures) and not folders


def _look(folder: Path, walk: Walk) -> _Split:
    class_folders = walk.folders(folder)
    tables = [folder / f"{folder.name}_annotations.txt", folder / "val_annotations.txt"]
    table = next((file for file in tables if file.is_file()), None)
    return _Split(folder, {}, table) if table and set(class_folders) <= {"images"} else _Split(folder, class_folders)


def _says_nothing(split: _Split) -> bool:
    return len(split.class_folders) == 1 and next(iter(split.class_folders)).lower() in NO_CLASS


def _one_list(spellings: Mapping[str, Sequence[str]]) -> tuple[list[str], dict[str, int]]:
    """Classes of all splits, and the label of each spelling: where all are whole numbers 7 and 00007 are one class."""
    every = [name for names in spellings.values() for name in names]
    if not all(is_whole(name) for name in every):
        classes = order_classes(every)
        return classes, {name: label for label, name in enumerate(classes)}
    first: dict[int, str] = {}
    for split, names in spellings.items():
        numbers = Counter(map(int, names))
        if twice := [name for name in names if numbers[int(name)] > 1]:
            raise UserError(f"{split}: the class folders {listed(twice)} are one number; rename or join them")
        for name in names:
            first.setdefault(int(name), name)
    classes = order_classes(first.values())
    place = {int(name): label for label, name in enumerate(classes)}
    return classes, {name: place[int(name)] for name in every}


def _unlabelled(folder: str, classes: Sequence[str], notes: Sequence[str], walk: Walk) -> PictureSource:
    files = walk.pictures(folder)
    if not files:
        raise UserError(f"{folder}: no pictures in it ({', '.join(ENDINGS)}); check --path")
    return PictureSource(files, np.full(len(files), -1), classes, [*notes, *walk.notes()])


def _check(split: _Split, per_class: Mapping[str, list[str]], is_split: bool) -> list[str]:
    """UserError unless there are class folders with pictures, and not one level further down only; what to tell."""
    folder, class_folders = split.folder, split.class_folders
    if not class_folders:
        raise _no_classes(folder)
    if not any(per_class.values()):
        hint = next((f"; {path} {told}" for path in class_folders.values() if (told := _what(path))), "")
        raise UserError(
            f"{folder}: no pictures in the class folders {listed(class_folders)}{hint}; endings that are read: "
            f"{', '.join(ENDINGS)}; check --path"
        )
    if _says_nothing(split):
        raise UserError(
            f"{folder}: all pictures lie in '{next(iter(class_folders))}', and there is no folder per class; make "
            "one per class, name the split's folder unlabeled, or list them with labels for the kind filelist"
        )
    if any(os.path.dirname(file) == class_folders[name] for name, files in per_class.items() for file in files):
        return []
    below = {name: list(Walk().folders(path)) for name, path in class_folders.items()}
    if all(inner.lower() in NO_CLASS for inners in below.values() for inner in inners):
        return []  # as Tiny-ImageNet's train/n01443537/images
    found = listed(f"{name}/{inner}" for name, inners in below.items() for inner in inners)
    if len(class_folders) == 1 or not is_split:
        raise UserError(
            f"{folder}: its folders hold only folders ({found}); give the folder that holds the classes, or train/ "
            f"and test/, as --path, for example {next(iter(class_folders.values()))}"
        )
    return [f"class folders hold only folders ({found}); the upper ones are taken as the classes"]


def _no_classes(folder: Path) -> UserError:
    walk = Walk()
    _, pictures = walk.look(folder)
    if pictures:
        return UserError(
            f"{folder}: {len(pictures)} pictures lie right in it, not in a folder per class; make one per class, name "
            "the folder unlabeled, or list them with labels for the kind filelist; --split takes one split alone"
        )
    found = _what(folder)
    return UserError(
        f"{folder}: no images in folders named after their classes{f'; it {found}' if found else ''}; check --path"
    )


def _what(folder: str | Path) -> str:
    """What lies in a folder instead of pictures, and how that can be read; empty for nothing."""
    endings = Counter(os.path.splitext(name)[1].lower() for name in os.listdir(folder))
    endings.pop("", None)
    if not endings:
        return ""
    ending = endings.most_common(1)[0][0]
    told = f"holds {endings[ending]} {ending} files"
    if ending in _KIND_OF:
        return f"{told}, which the kind {_KIND_OF[ending]} reads"
    if ending in (".parquet", ".arrow"):
        return f"{told}, which are not read: save the pictures, or an npz, with the datasets library"
    if ending == ".zip":
        return f"{told}: give one of them as --path"
    if ending in (".gz", ".tgz", ".7z", ".rar"):
        return f"{told}: unpack them first"
    return told


def _class_notes(
    split: str,
    classes: Sequence[str],
    per_class: Mapping[str, list[str]],
    spellings: Mapping[str, Sequence[str]],
    label: Mapping[str, int],
) -> list[str]:
    """Empty class folders, classes that the split lacks or that it alone has, and numbers written in two ways."""
    notes = []
    if empty := [name for name, files in per_class.items() if not files]:
        notes.append(f"class folders without a picture in {split}: {listed(empty)} (read: {', '.join(ENDINGS)})")
    mine = {label[name] for name in per_class}
    if lacking := [name for place, name in enumerate(classes) if place not in mine]:
        notes.append(f"classes without a folder in {split}: {listed(lacking)}")
    others = {label[name] for other, names in spellings.items() if other != split for name in names}
    if others and (own := [name for name in per_class if label[name] not in others]):
        notes.append(f"classes that only {split} has: {listed(own)}")
    if rewritten := [f"{name} is {classes[label[name]]}" for name in per_class if name != classes[label[name]]]:
        notes.append(f"class folders taken as one with another split's: {listed(rewritten)}")
    return notes


def _annotated(split: _Split, label: Mapping[str, int], walk: Walk) -> tuple[list[str], list[int], list[str]]:
    """Files and labels by a table of lines "file, tab, class, ...", and what does not match."""
    table = split.annotations
    assert table is not None
    pictures = {os.path.basename(file): file for file in walk.pictures(split.folder)}
    files, labels, missing = [], [], 0
    if not label:
        raise UserError(f"{table}: names classes, which train/ has; give the folder that holds both as --path")
    lines = read_regular(table, _MOST_BYTES).decode(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t") if "\t" in line else line.split()
        if not rest or rest[0].strip() not in label:
            told = f"class '{rest[0].strip()}' is none of the other splits' classes" if rest else "no class"
            raise UserError(f"{table}: line {number}: {told}; expected a picture's name, a tab and its class")
        file = pictures.pop(name.strip(), None)
        if file is None:
            missing += 1
        else:
            files.append(file)
            labels.append(label[rest[0].strip()])
    if not files:
        raise UserError(f"{table}: none of the pictures that it names lies in {split.folder}; check --path")
    notes = [f"labels are those of {table.name}"]
    if missing:
        notes.append(f"pictures named in {table.name} that are not there: {missing}")
    if pictures:
        notes.append(f"pictures not named in {table.name}, left out: {len(pictures)}")
    return files, labels, notes
