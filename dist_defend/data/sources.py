"""Where images come from: what `dist-defend data prepare KIND` can read. Each kind is a module of its own."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dist_defend.data.archives import is_shards, open_shards, shard_splits
from dist_defend.data.arrays import load_image_npz, npz_splits, open_npz
from dist_defend.data.beton_source import BETON_ENDINGS, beton_splits, open_beton_source
from dist_defend.data.filelist import LIST_ENDINGS, list_splits, open_list
from dist_defend.data.folders import folder_splits, open_folder
from dist_defend.data.gtsrb import CLASSES as GTSRB_CLASSES
from dist_defend.data.gtsrb import open_gtsrb
from dist_defend.data.patches import open_patches
from dist_defend.data.published import DIGITS, STL10_CLASSES, open_digits, open_fashion_mnist, with_split, with_train
from dist_defend.data.reading import NO_KEYS, ArraySource, Keys, NotedSource, Source
from dist_defend.data.zips import ZIP_ENDINGS, open_zip, zip_splits
from dist_defend.errors import UserError

__all__ = ["KINDS", "ArraySource", "Keys", "Source", "load_image_npz", "open_source", "source_splits"]


@dataclass(frozen=True)
class _Local:
    """A kind whose splits are those that lie at --path."""

    splits: Callable[[Path, Keys], list[str]]
    open: Callable[[Path, str, Keys], NotedSource]
    has_keys: bool = True


@dataclass(frozen=True)
class _Published:
    """A kind whose splits are known; it may fetch what is not there."""

    splits: tuple[str, ...]
    open: Callable[[str | None, str], NotedSource]


def open_source(kind: str, path: str | None, split: str, keys: Keys = NO_KEYS) -> NotedSource:
    """One split of a source. UserError for an unknown kind or split, or files that cannot be had.

    ``keys`` names what holds images and labels, for npz, beton and webdataset.
    """
    if split not in source_splits(kind, path, keys):
        raise UserError(f"{kind} has no split {split!r} here; it has {', '.join(source_splits(kind, path, keys))}")
    how, place, read_as = _resolve(kind, path, keys)
    if isinstance(how, _Published):
        return how.open(path, split)
    source = how.open(place, split, keys)
    if read_as != kind:
        source.add_note(f"{path} is read as the kind {read_as}")
    return source


def source_splits(kind: str, path: str | None, keys: Keys = NO_KEYS) -> list[str]:
    """The splits that this source has, in the order train, val, test, unlabeled; for local kinds those in ``path``."""
    how, place, _ = _resolve(kind, path, keys)
    return list(how.splits) if isinstance(how, _Published) else how.splits(place, keys)


def _resolve(kind: str, path: str | None, keys: Keys) -> tuple["_Local | _Published", Path, str]:
    """The kind, its place and its name; imagefolder of a list, a tar, a zip or another file is read as what that is."""
    if kind not in _KINDS:
        raise UserError(f"unknown kind of data {kind!r}; known: {', '.join(_KINDS)}")
    if kind == "imagefolder" and path is not None:
        kind = _kind_of_file(path)
    how = _KINDS[kind]
    if keys != NO_KEYS and not (isinstance(how, _Local) and how.has_keys):
        raise UserError(f"{kind} has no keys to choose from; leave out --images and --labels")
    if isinstance(how, _Published):
        return how, Path(path or "."), kind
    if path is None:
        raise UserError(f"{kind} needs --path")
    if not os.path.exists(path) and not (kind == "webdataset" and is_shards(path)):
        raise UserError(f"{path}: no such file or folder that may be read; check --path")
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise UserError(f"{path}: neither a file nor a folder (a pipe, a socket or a device); check --path")
    return how, Path(path), kind


def _kind_of_file(path: str) -> str:
    """imagefolder, unless the path is a file of another kind. UserError for a file of none."""
    if is_shards(path):
        return "webdataset"
    if not os.path.isfile(path):
        return "imagefolder"
    endings = {"filelist": LIST_ENDINGS, "beton": BETON_ENDINGS, "npz": (".npz",), "zip": ZIP_ENDINGS}
    found = next((kind for kind, mine in endings.items() if Path(path).suffix.lower() in mine), None)
    if found is None:
        known = ", ".join(ending for mine in endings.values() for ending in mine)
        raise UserError(
            f"{path}: a file that is not read: unpack an archive, save pictures or an npz from a table; files that are "
            f"read end in {known} or .tar"
        )
    return found


_BOTH = ("train", "test")
_KINDS: dict[str, _Local | _Published] = {
    "npz": _Local(npz_splits, open_npz),
    "imagefolder": _Local(folder_splits, open_folder, has_keys=False),
    "filelist": _Local(list_splits, open_list, has_keys=False),
    "webdataset": _Local(shard_splits, open_shards),
    "zip": _Local(zip_splits, open_zip, has_keys=False),
    "beton": _Local(beton_splits, open_beton_source),
    "cifar10": _Published(_BOTH, with_train("CIFAR10")),
    "cifar100": _Published(_BOTH, with_train("CIFAR100")),
    "stl10": _Published((*_BOTH, "unlabeled"), with_split("STL10", STL10_CLASSES)),
    "svhn": _Published(_BOTH, with_split("SVHN", DIGITS)),
    "gtsrb": _Published(_BOTH, open_gtsrb),
    "gtsrb_torchvision": _Published(_BOTH, with_split("GTSRB", GTSRB_CLASSES)),
    "fashion_mnist": _Published(_BOTH, open_fashion_mnist),
    "digits": _Published(_BOTH, open_digits),
    "one_image": _Published(("train",), open_patches),
}
KINDS = tuple(_KINDS)
