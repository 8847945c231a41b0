"""Checkpoints that are whole or not there: safetensors + JSON, written aside, fsynced, renamed, verified on load."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_defend.errors import UserError
from dist_defend.files import fsync_path, sha256_file

log = logging.getLogger(__name__)

_TENSORS, _TREE, _COMPLETE = "tensors.safetensors", "state.json", "COMPLETE"


class SaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are as they were."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write folder/step_N with a COMPLETE file (sha256 of each file) and keep the newest ``keep`` checkpoints.

    state: nested dicts, lists and tuples of tensors and JSON values; dict keys are str or int. SaveError if the disk
    is full or otherwise refuses.
    """
    final, aside = folder / f"step_{step:09d}", folder / f".writing_{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(aside, final, state)
    except (OSError, SafetensorError) as error:
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
    for remnant in folder.glob(".writing_*"):  # of a process that was killed
        shutil.rmtree(remnant, ignore_errors=True)
    return final


def _write(aside: Path, final: Path, state: dict[str, Any]) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, tensors, "")
    save_file(tensors, aside / _TENSORS)
    (aside / _TREE).write_text(json.dumps(tree))
    sums = {name: sha256_file(aside / name) for name in (_TENSORS, _TREE)}
    (aside / _COMPLETE).write_text(json.dumps(sums))
    for name in (_TENSORS, _TREE, _COMPLETE):
        fsync_path(aside / name)
    fsync_path(aside)
    if final.exists():  # the same step, one position further: the older ones remain if this is interrupted
        shutil.rmtree(final)
    aside.rename(final)
    fsync_path(final.parent)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files match their recorded sums; a torn one is named and passed over."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        problem = _problem(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is not used: %s", path, problem)
    return None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what ``save`` wrote; tensors land on ``device``. UserError for files of any other kind."""
    device = torch.device(device)
    place = "cpu" if device.type == "cpu" else str(device)  # safetensors refuses cpu:1, a CPU rank's name
    try:
        tensors = load_file(path / _TENSORS, device=place)
        return _decode(json.loads((path / _TREE).read_text()), tensors)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint of this program ({type(error).__name__}); delete it") from error


def _problem(path: Path) -> str | None:
    try:
        sums = json.loads((path / _COMPLETE).read_text())
        changed = [name for name in (_TENSORS, _TREE) if sha256_file(path / name) != sums[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__})"
    return f"{', '.join(changed)} does not match its checksum" if changed else None


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
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
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "channels_last":
        return tensors[content].contiguous(memory_format=torch.channels_last)
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
