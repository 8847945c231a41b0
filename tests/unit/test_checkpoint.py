"""Checkpoints: what goes in comes out, and what is not whole is not read."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend.engine import checkpoint
from dist_defend.errors import UserError

STATE: dict[str, Any] = {
    "position": {"step": 3, "ratio": 0.1, "name": None},
    "tensors": [torch.arange(6.0).view(2, 3), torch.tensor(5, dtype=torch.int64), torch.zeros(0)],
    "groups": {0: {"betas": (0.9, 0.999)}, 1: {"fused": True}},
}


def saved(folder: Path, *steps: int, keep: int = 9) -> list[Path]:
    return [checkpoint.save(folder, step, STATE, keep) for step in steps]


def test_round_trip_keeps_types_keys_and_values(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 3)
    state = checkpoint.load(path)
    tensors = state.pop("tensors")
    assert state == {key: value for key, value in STATE.items() if key != "tensors"}
    assert isinstance(state["groups"][0]["betas"], tuple)
    for mine, theirs in zip(tensors, STATE["tensors"], strict=True):
        assert mine.equal(theirs)
        assert mine.dtype == theirs.dtype


def test_memory_layout_survives(tmp_path: Path) -> None:
    """Fused optimizers walk a parameter and its momentum in memory order."""
    images = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"a": images, "b": images.contiguous()}))
    assert loaded["a"].equal(images)
    assert loaded["a"].stride() == images.stride()
    assert loaded["b"].is_contiguous()


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    weight = torch.rand(4)
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"a": weight, "b": weight, "c": weight[:2]}))
    assert loaded["a"].equal(weight) and loaded["b"].equal(weight) and loaded["c"].equal(weight[:2])


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 10, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000000002", "step_000000010"]
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step_000000010"


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") is None


def cut(path: Path) -> None:
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip(path: Path) -> None:
    file = path / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_tree(path: Path) -> None:
    file = path / "state.json"
    file.write_text(file.read_text().replace("3", "4", 1))


def empty_complete(path: Path) -> None:
    (path / "COMPLETE").write_text("")


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        change_tree,
        empty_complete,
        lambda path: (path / "COMPLETE").unlink(),
        lambda path: (path / "COMPLETE").write_text("[]"),
        lambda path: (path / "COMPLETE").write_text("{}"),
        lambda path: (path / "state.json").unlink(),
        lambda path: (path / "tensors.safetensors").unlink(),
    ],
)
def test_a_torn_checkpoint_is_named_and_passed_over(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, torn = saved(tmp_path, 1, 2)
    damage(torn)
    with caplog.at_level(logging.WARNING, "dist_defend"):
        assert checkpoint.newest(tmp_path) == whole
    assert f"checkpoint {torn} is not used" in caplog.text


def test_a_save_sweeps_away_what_kills_left(tmp_path: Path) -> None:
    """Also a torn checkpoint of a later step: with keep=1 it would otherwise be the one that is kept."""
    _, torn = saved(tmp_path, 1, 5)
    cut(torn)
    (tmp_path / ".writing_1").mkdir()
    saved(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000002"]


def test_a_half_written_one_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "fsync_path", fail)
    with pytest.raises(KeyboardInterrupt):
        saved(tmp_path, 2)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == "step_000000001"


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "state.json").write_text(json.dumps({"dict": [["a", {"tensor": "/none"}]]}))
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        checkpoint.load(path)
