"""Weights in a folder, as Accelerate's save_model and transformers' save_pretrained write them: whole, or in shards.

Shards come with an index, {"weight_map": {tensor: file}}. Its files are looked up beside it, and nowhere else.
"""

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.files import read_regular
from dist_defend.models.foreign_file import Unordered, pickles_more, read_checkpoint
from dist_defend.models.restricted_pickle import Buildable, shown
from dist_defend.strict_json import parse_json

_INDEX = ".index.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.(safetensors|bin)")
_MOST_BYTES = 1 << 22  # of an index: some 40,000 tensors


def read_weights(path: str | Path) -> tuple[Any, tuple[Path, ...]]:
    """What read_checkpoint gives for a file, a folder, or the index of shards; and the files that were read.

    UserError as read_checkpoint; also for one shard of several, an index whose entries lead out of its folder, a shard
    that is missing or lacks a tensor, and a folder that holds no weights or is a model folder already.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _in_folder(path)
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard[2]) > 1:
        raise UserError(
            f"{path} is shard {int(shard[1])} of {int(shard[2])}: point at its folder, {path.parent}, or at the "
            f"{_INDEX} file there"
        )
    return read_checkpoint(path), (path,)


def _in_folder(folder: Path) -> Path:
    if (folder / "model.json").is_file() and (folder / "model.safetensors").is_file():
        raise UserError(f"{folder} is a model folder already: use it as it is")
    for name in _WHOLE:
        if (folder / name).is_file():
            return folder / name
        indices = sorted(folder.glob(f"*{Path(name).suffix}{_INDEX}"))
        if len(indices) > 1:
            names = ", ".join(shown(index.name) for index in indices[:4])
            raise UserError(f"{folder} holds several indices ({names}): point at one")
        if indices:
            return indices[0]
    return folder  # which read_checkpoint refuses


def _read_shards(index: Path) -> tuple[Unordered, tuple[Path, ...]]:
    state: dict[str, Tensor] = {}
    files = []
    for name, keys in sorted(_shards_of(index).items()):
        file = index.parent / name
        if not file.is_file():
            raise UserError(f"{index} names {name}, which is not beside it: fetch the whole folder")
        if not _is_inside(file, index.parent):
            raise UserError(f"{index} names {name}, which leads out of its folder: fetch the files themselves")
        shard = read_checkpoint(file)
        for key in keys:
            value = shard.get(key) if isinstance(shard, dict) else None
            if isinstance(value, Buildable) and value.refused is not None:
                raise pickles_more(file, value.refused)
            if not isinstance(value, Tensor):
                raise UserError(f"{file} lacks the tensor {shown(key)} that {index.name} names: fetch both again")
            state[key] = value
        files.append(file)
    return Unordered(sorted(state.items())), (index, *files)


def _shards_of(index: Path) -> dict[str, list[str]]:
    """The tensors in each file. UserError for an index of another form, or whose entries are no plain file names."""
    try:
        data = read_regular(index, _MOST_BYTES)
    except OSError as error:
        raise UserError(f"{index} does not exist or cannot be read ({error.strerror}): point at another") from error
    content = parse_json(data, f"{index} is no index of shards: it", "fetch it again")
    told = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(told, dict) or not told or not all(isinstance(name, str) for name in told.values()):
        raise UserError(f"{index} is no index of shards (weight_map names a file for each tensor): fetch it again")
    files: dict[str, list[str]] = {}
    for key, name in told.items():
        if not re.fullmatch(r"[\w][\w.\-]*", name) or not name.endswith((".safetensors", ".bin")):
            raise UserError(f"{index} names '{shown(name)}', which leads out of its folder or is no shard")
        files.setdefault(name, []).append(key)
    return files


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in the folder; a hub's cache keeps the content of its links in blobs/, two folders above."""
    place, home = file.resolve(), folder.resolve()
    is_cached = home.parent.name == "snapshots" and place.parent == home.parent.parent / "blobs"
    return place.is_relative_to(home) or is_cached
