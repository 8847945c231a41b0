"""manifest.json of a prepared data set: what it holds, in which ranges, and reading it."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_defend.data.class_order import MAX_CLASSES
from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.strict_json import build, parse_json

FORMAT = 1
REMEDY = "prepare the data set again"
_MOST_BYTES = 16 << 20
_MOST_LISTED = 1_000_000  # entries of any list in it
_MOST_PIXELS = 65535  # a side
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILES = ({"labels.npy", "data.beton"}, {"labels.npy", "images.npy"})  # and order.npy


@dataclass(frozen=True)
class StoredFile:
    """What a file must be to be the one that was written."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        _check(self.bytes >= 0, f"a file has {self.bytes} bytes")
        _check(_SHA256.fullmatch(self.sha256) is not None, f"{self.sha256[:70]!r} is no sha256")


@dataclass(frozen=True)
class Manifest:
    """manifest.json. image_shape: (H, W, 3), or None where images differ in size. Label -1 means unlabelled.

    order_seed: of the shuffled order of the rows, None for the source's. source_samples: rows that the source has.
    skipped: images that could not be read and were left out. notes: what the source wanted said.
    ValueError for what no data set has.
    """

    format: int
    name: str
    split: str
    num_samples: int
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    image_shape: tuple[int, int, int] | None
    write_mode: str
    max_resolution: int | None
    quality: int | None
    files: dict[str, StoredFile]
    order_seed: int | None = None
    source_samples: int | None = None
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self.format == FORMAT, f"format {self.format} is another version's")
        _check(self.num_samples >= 1, f"num_samples is {self.num_samples}")
        _check(len(self.classes) <= MAX_CLASSES, f"it has {len(self.classes)} classes")
        _check(len(self.classes) == len(self.class_counts), "classes and class_counts differ in length")
        _check(all(count >= 0 for count in self.class_counts), "a class count is negative")
        _check(sum(self.class_counts) <= self.num_samples, "class_counts are more than num_samples")
        if self.image_shape is not None:
            height, width, channels = self.image_shape
            is_shape = 1 <= height <= _MOST_PIXELS and 1 <= width <= _MOST_PIXELS and channels == 3
            _check(is_shape, f"image_shape is {list(self.image_shape)}")
        _check(self.write_mode in ("raw", "jpg"), f"write_mode is {self.write_mode[:20]!r}")
        _check(self.max_resolution is None or self.max_resolution >= 1, f"max_resolution is {self.max_resolution}")
        _check(self.quality is None or 0 <= self.quality <= 100, f"quality is {self.quality}")
        _check(self.order_seed is None or self.order_seed >= 0, f"order_seed is {self.order_seed}")
        source = self.source_samples
        _check(source is None or self.num_samples <= source < 1 << 62, f"source_samples is {source}")


def manifest_bytes(folder: Path) -> bytes:
    """What a folder's manifest.json holds. UserError for a folder without one."""
    try:
        return read_regular(folder / "manifest.json", _MOST_BYTES)
    except OSError as error:
        splits = sorted(str(p.parent) for p in folder.glob("*/manifest.json")) if os.path.isdir(folder) else []
        hint = f"name one of its splits: {', '.join(splits)}" if splits else "make it with 'dist-defend data prepare'"
        raise UserError(f"{folder}: not a prepared data set (no manifest.json); {hint}") from error


def parse_manifest(content: bytes, folder: Path) -> Manifest:
    """The manifest that these bytes are. UserError for what is none, or names files that a data set has not."""
    place = folder / "manifest.json"
    parsed = parse_json(content, place, REMEDY)
    parts = parsed.values() if isinstance(parsed, dict) else ()
    if any(isinstance(part, list) and len(part) > _MOST_LISTED for part in parts):
        raise UserError(f"{place} holds a list of more than {_MOST_LISTED:,} entries: {REMEDY}")
    manifest = build(Manifest, parsed, place, REMEDY)
    if manifest.files.keys() - {"order.npy"} not in _FILES:
        raise UserError(f"{place} does not name the files that a data set has, and no other: {REMEDY}")
    is_jpeg = manifest.write_mode == "jpg"
    if is_jpeg != (manifest.quality is not None) or (is_jpeg and "data.beton" not in manifest.files):
        raise UserError(f"{place}: write_mode, quality and the files do not fit one another: {REMEDY}")
    return manifest


def known_manifest(content: bytes) -> Manifest:
    """The same of bytes that ``parse_manifest`` has let pass before: without the checks of types, which take longer."""
    parsed = json.loads(content)
    files = {name: StoredFile(**file) for name, file in parsed.pop("files").items()}
    lists = {key: tuple(value) for key, value in parsed.items() if isinstance(value, list)}
    return Manifest(**{**parsed, **lists, "files": files})


def _check(is_right: Any, told: str) -> None:
    if not is_right:
        raise ValueError(told)
