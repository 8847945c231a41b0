"""A model of a zoo: model.json and model.safetensors (a model folder), experiment.yaml, and zoo.json."""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError, did_you_mean
from dist_defend.files import sha256_file, write_atomic
from dist_defend.results import COUNTS
from dist_defend.strict_json import build, read_json

FORMAT = 1
FILES = ("model.json", "model.safetensors", "experiment.yaml")
_MOST_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}")
_HEX = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What zoo.json says.

    files: sha256 (hex) of each of FILES. measure: how the model is counted: a classifier's test set (DatasetConfig's
    keys), or an encoder's section ``probe`` of kind knn. counts: task -> acc, asr, asr_all, ra, each {correct, n}.
    data: digests of what was counted on, by role. parents: key of experiment.yaml -> the model of this zoo that stands
    there. made_on: the machine, see ``rebuild.machine``.
    """

    files: dict[str, str]
    measure: dict[str, Any]
    counts: dict[str, dict[str, dict[str, int]]]
    data: dict[str, str]
    parents: dict[str, str]
    made_on: dict[str, str | int]

    def __post_init__(self) -> None:
        if self.files.keys() != set(FILES) or not all(map(_HEX.fullmatch, self.files.values())):
            raise ValueError(f"key 'files' has no sha256 for each of {', '.join(FILES)}")
        for name in self.parents.values():
            check_name(name)
        for task, counts in self.counts.items():
            for name, count in counts.items():
                is_count = name in COUNTS and count.keys() == {"correct", "n"}
                if not is_count or not 0 <= count["correct"] <= count["n"]:
                    raise ValueError(f"key 'counts.{task}.{name}' is no {{correct, n}} with 0 <= correct <= n")


def check_name(name: str) -> str:
    """The name. ValueError for one that is no plain name of a folder."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"a model's name is made of letters, digits, '_', '-' and '.', not {name[:100]!r}")
    return name


def names(zoo: Path) -> list[str]:
    """The zoo's models. UserError for a folder without any."""
    found = sorted(path.parent.name for path in zoo.glob("*/zoo.json"))
    if not found:
        raise UserError(f"{zoo} is no zoo: no folder in it has a zoo.json; add a model, or name another with --zoo")
    return found


def read_entry(zoo: Path, name: str) -> Entry:
    """An entry whose files are those that were added. UserError for one that is missing, altered or not an entry."""
    known = names(zoo)
    if name not in known:
        raise UserError(f"{zoo} has no model '{name[:100]}': {did_you_mean(name, known)}it has {', '.join(known)}")
    folder = zoo / name
    content = read_json(folder / "zoo.json", "restore it", most_bytes=_MOST_BYTES)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"{folder / 'zoo.json'} is not of format {FORMAT}: another version wrote it, or restore it")
    entry = build(Entry, content, folder / "zoo.json", "restore it")
    for file, wanted in entry.files.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing: restore it, sha256 {wanted}")
        found = sha256_file(path)
        if found != wanted:
            raise UserError(f"{path} was altered: its sha256 is {found}, zoo.json's {wanted}: restore it")
    return entry


def write_entry(folder: Path, entry: Entry) -> None:
    """zoo.json, last of all files."""
    content = {"format": FORMAT, **dataclasses.asdict(entry)}
    write_atomic(folder / "zoo.json", json.dumps(content, indent=1) + "\n")


def models_by_card(zoo: Path) -> Iterator[tuple[str, str]]:
    """(sha256 of model.json, name) of each model; none of a zoo that is not there yet."""
    for path in sorted(zoo.glob("*/zoo.json")):
        yield sha256_file(path.with_name("model.json")), path.parent.name
