"""Checkpoints that are whole or not there: safetensors + JSON, written aside, fsynced, renamed, verified on load."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.files import fsync_path, open_regular, recover_folder, replace_folder, sha256_file, write_hashed
from dist_defend.screen import printable
from dist_defend.strict_json import read_json

log = logging.getLogger(__name__)

FORMAT = 3  # 1: state.json held the bare tree; 2: steps counted their calls, which nobody reads any more
_TENSORS, _TREE, _COMPLETE = "tensors.safetensors", "state.json", "COMPLETE"
# What is read takes some thirty times as much memory, and a list of tensors seconds.
_MOST_TREE, _MOST_HEADER = 8 << 20, 4 << 20  # bytes
_REMEDY = "restore it, or delete this checkpoint"
_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.complex64: "C64"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"},
}  # as safetensors calls them


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write folder/step_N with a COMPLETE file (sha256 of each file) and keep the newest ``keep`` checkpoints.

    state: nested dicts, lists and tuples of tensors and JSON values; dict keys are str or int. SaveError if the disk
    is full or otherwise refuses. A process that is killed on the way leaves the old checkpoints or the new one, and
    the next save sweeps the rest away.
    """
    final, aside = path_of(folder, step), folder / f".writing_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(aside, final, state)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        left = newest(folder)
        resume = "from the start" if left is None else f"from {left.name}"
        raise SaveError(
            f"cannot write the checkpoint of step {step} to {folder}: {error}; make room (or lower "
            f"trainer.keep_checkpoints) and start the same command, which goes on {resume}"
        ) from error
    steps = sorted(folder.glob("step_*"))
    place = steps.index(final)
    for other in [*steps[: max(0, place + 1 - keep)], *steps[place + 1 :]]:  # old ones, and torn ones passed over
        shutil.rmtree(other, ignore_errors=True)
    for remnant in (*folder.glob(".writing_*"), *_replaced(folder)):  # of a process that was killed
        shutil.rmtree(remnant, ignore_errors=True)
    return final


def _write(aside: Path, final: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(aside, ignore_errors=True)  # of a dead process with our number
    aside.mkdir()
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _encode(state, tensors, "")})
    assert len(text) <= _MOST_TREE, "a step's state holds too many plain values: keep them in tensors"
    sums = {_TENSORS: write_hashed(aside / _TENSORS, _safetensors(tensors)), _TREE: _sha256(text)}
    (aside / _TREE).write_text(text)
    (aside / _COMPLETE).write_text(json.dumps(sums))
    for name in (_TREE, _COMPLETE):
        fsync_path(aside / name)
    fsync_path(aside)
    replace_folder(aside, final)  # which may exist: the same step, one position further


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, each tensor's straight from its memory where that is the host's.

    Wide elements come first: then all are aligned.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    entries, start = {}, 0
    for name in names:
        tensor, end = tensors[name], start + tensors[name].nbytes
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    assert len(header) <= _MOST_HEADER, "a step's state holds too many tensors"
    yield len(header).to_bytes(8, "little") + header
    for name in names:
        yield tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:09d}"


def newest(folder: Path, is_owner: bool = True) -> Path | None:
    """The newest checkpoint whose files match their recorded sums; a torn one is named and passed over.

    One that a killed process had renamed, to put a newer one of that step in its place, gets its name back, unless
    the folder may be another process' (is_owner).
    """
    for before in _replaced(folder) if is_owner else []:
        recover_folder(folder / before.name.removeprefix(".").removesuffix(".before"))
    for path in sorted(folder.glob("step_*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is not used: %s", printable(path), problem)
    return None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save`` wrote; tensors land on ``device``. UserError for files of any other kind."""
    device = torch.device(device)
    place = "cpu" if device.type == "cpu" else str(device)  # safetensors refuses cpu:1, a CPU rank's name
    try:
        _check_header(path / _TENSORS)
        tensors = load_file(path / _TENSORS, device=place)
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        told = printable(f"{_TENSORS}: {error}", 200)
        raise UserError(f"{path}: not a checkpoint of this program ({told}): {_REMEDY}") from error
    where = path / _TREE
    try:
        tree = read_json(where, _REMEDY, may_be_nan=True, most_bytes=_MOST_TREE)
        state = _decode(_of_known_format(tree), tensors)
        if not isinstance(state, dict):
            raise ValueError("it holds no state")
        return state
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # RecursionError is a RuntimeError
        raise UserError(
            f"{where}: not a checkpoint of this program ({printable(str(error), 200)}): {_REMEDY}"
        ) from error


def _replaced(folder: Path) -> list[Path]:
    """Checkpoints that were renamed aside by replace_folder and not yet deleted."""
    return sorted(folder.glob(".step_*.before"))


def _problem(path: Path) -> str | None:
    try:
        sums = read_json(path / _COMPLETE, "", most_bytes=1 << 16)
        changed = [name for name in (_TENSORS, _TREE) if sha256_file(path / name) != sums[name]]
    except (OSError, KeyError, TypeError, UserError) as error:
        return f"incomplete ({type(error).__name__})"
    return f"{', '.join(changed)} does not match its checksum" if changed else None


def _check_header(path: Path) -> None:
    """ValueError for a list of tensors that would take more memory than any checkpoint's."""
    with open_regular(path) as file:
        if int.from_bytes(file.read(8), "little") > _MOST_HEADER:
            raise ValueError("its list of tensors is too long")


def _of_known_format(tree: Any) -> Any:
    if isinstance(tree, dict) and tree.keys() == {"format", "state"}:
        if type(tree["format"]) is not int or not 1 < tree["format"] <= FORMAT:
            raise ValueError(f"key 'format' is {tree['format']!r}; this version reads 1 to {FORMAT}")
        return tree["state"]
    return tree


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"channels_last" if _is_channels_last(value) else "tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, tensors, f"{path}/{key}")] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, tensors, f"{path}/{i}") for i, item in enumerate(value)]}
    return value


def _is_channels_last(value: Tensor) -> bool:
    """Fused optimizers read a parameter and its state in memory order, so both must come back in one layout."""
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of _encode. ValueError for what it does not write."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"it holds a {type(value).__name__} where a value belongs")
    ((kind, content),) = value.items()
    if kind in ("tensor", "channels_last"):
        if not isinstance(content, str) or content not in tensors:
            raise ValueError(f"{_TENSORS} lacks the tensor {content!r}")
        tensor = tensors[content]
        return tensor if kind == "tensor" else tensor.contiguous(memory_format=torch.channels_last)
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__} in a {kind!r}")
    if kind == "dict":
        return _pairs(content, tensors)
    if kind not in ("list", "tuple"):
        raise ValueError(f"it holds an unknown kind of value, {kind!r}")
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _pairs(content: list[Any], tensors: dict[str, Tensor]) -> dict[Any, Any]:
    found = {}
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise ValueError("a dict's entry is no pair of a name or number and a value")
        if pair[0] in found:
            raise ValueError(f"key {pair[0]!r} comes twice")
        found[pair[0]] = _decode(pair[1], tensors)
    return found
