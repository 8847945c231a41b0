"""Checkpoints: what goes in comes out, and what is not whole is not read."""

import contextlib
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_defend.engine import checkpoint
from dist_defend.errors import UserError
from tests.fuzz.harness import _peak, _reset_peak

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


def test_every_type_of_number_comes_back_from_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    """Mixed widths, odd counts and none, scalars, parts of a larger tensor, transposed: all aligned."""
    made = {dtype: (torch.arange(5) % 2 + 1).to(dtype) for dtype in checkpoint._DTYPES}
    plain = torch.arange(12.0).view(3, 4)
    state = {str(dtype): tensor for dtype, tensor in made.items()} | {
        "none": torch.zeros(0, 3), "scalar": torch.tensor(7, dtype=torch.int16), "part": plain[1:, 1:], "t": plain.T
    }  # fmt: skip
    path = checkpoint.save(tmp_path, 1, state)
    read, loaded = load_file(path / "tensors.safetensors"), checkpoint.load(path)
    assert read.keys() == {f"/{name}" for name in state}
    for name, tensor in state.items():
        for found in (read[f"/{name}"], loaded[name]):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert found.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_the_sums_are_those_of_the_files(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"large": torch.rand(1 << 20), **STATE})
    sums = json.loads((path / "COMPLETE").read_text())
    assert sums == {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in ("state.json", "tensors.safetensors")
    }


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


def test_numbers_that_are_none_survive(tmp_path: Path) -> None:
    state = {"best": math.nan, "worst": -math.inf, "weights": torch.tensor([math.nan, math.inf])}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, state))
    assert math.isnan(loaded["best"]) and loaded["worst"] == -math.inf
    assert loaded["weights"].isnan().tolist() == [True, False] and loaded["weights"][1] == math.inf


def test_a_checkpoint_of_the_first_format_is_read(tmp_path: Path) -> None:
    """Which had no number: state.json was the bare tree."""
    (path,) = saved(tmp_path, 1)
    content = json.loads((path / "state.json").read_text())
    assert content["format"] == 3
    (path / "state.json").write_text(json.dumps(content["state"]))
    assert checkpoint.load(path)["position"] == STATE["position"]


TREES: dict[str, Any] = {
    "no tree": 7,
    "a plain list": [1],
    "two kinds in one": {"list": [], "tuple": []},
    "an unknown kind": {"set": []},
    "a later format": {"format": 4, "state": {"dict": []}},
    "a text for a number of the format": {"format": "2", "state": {"dict": []}},
    "no pairs": {"dict": [["a"]]},
    "pairs of a text": {"dict": ["ab"]},
    "a dict for a list": {"dict": [["a", {"list": {}}]]},
    "a key twice": {"dict": [["a", 1], ["a", 2]]},
    "a key that is a list": {"dict": [[[], 1]]},
    "a key that is true": {"dict": [[True, 1]]},
    "a tensor that is not there": {"dict": [["a", {"tensor": "/none"}]]},
    "a tensor without a name": {"dict": [["a", {"tensor": 0}]]},
    "a vector in an order of images": {"dict": [["a", {"channels_last": "/tensors/0"}]]},
    "a list at the top": {"list": [1]},
}


@pytest.mark.parametrize("name", TREES)
def test_a_state_of_another_program_is_refused(name: str, tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "state.json").write_text(json.dumps(TREES[name]))
    with pytest.raises(UserError, match=r"state\.json: not a checkpoint of this program .*delete this checkpoint"):
        checkpoint.load(path)


TEXTS = {
    "cut": b'{"format": 2, "st',
    "a key twice": b'{"format": 2, "format": 2, "state": {"dict": []}}',
    "not UTF-8": b'"\xff"',
    "deep": b'{"list": [' * 100_000,
    "empty": b"",
    "large": b" " * (9 << 20),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_state_that_is_no_text_of_ours_is_refused(name: str, tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    (path / "state.json").write_bytes(TEXTS[name])
    with pytest.raises(UserError, match=r"state\.json") as refused:
        checkpoint.load(path)
    assert str(refused.value).isprintable()


def test_a_list_of_tensors_without_end_is_not_read(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    file = path / "tensors.safetensors"
    for length in (2**63, 50 << 20):
        file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
        with pytest.raises(UserError, match="its list of tensors is too long"):
            checkpoint.load(path)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "COMPLETE"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name: str, tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    assert checkpoint.newest(tmp_path) is None
    if name != "COMPLETE":
        with pytest.raises(UserError, match="not a regular file"):
            checkpoint.load(path)


def tree_of(item: str) -> bytes:
    """A state.json as large as one may be, of nothing but such items."""
    count = ((8 << 20) - 100) // (len(item) + 1)
    return ('{"format": 2, "state": {"dict": [["a", {"list": [' + ",".join([item] * count) + "]}]]}}").encode()


@pytest.mark.parametrize("item", ['{"list":[]}', '{"dict":[]}', "{}"])
def test_the_memory_of_a_state_is_bounded(item: str, tmp_path: Path) -> None:
    """Four times the files and 256 MiB, whatever they hold."""
    (path,) = saved(tmp_path, 1)
    (path / "state.json").write_bytes(tree_of(item))
    before = _reset_peak()
    with contextlib.suppress(UserError):
        checkpoint.load(path)
    assert _peak() - before <= 4 * (8 << 20) + (256 << 20)


def test_the_memory_of_many_tensors_is_bounded(tmp_path: Path) -> None:
    """The list of tensors is as long as one may be; whole images, whose memory order is made anew."""
    (path,) = saved(tmp_path, 1)
    names = [f"{number:x}" for number in range(70_000)]
    entries = ",".join(f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for name in names)
    header = f"{{{entries}}}".encode()
    assert 3 << 20 < len(header) < 4 << 20
    (path / "tensors.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    before = _reset_peak()
    with pytest.raises(UserError, match="lacks the tensor"):
        checkpoint.load(path)
    assert _peak() - before <= 4 * len(header) + (256 << 20)
    large = torch.rand(8, 64, 256, 256).contiguous(memory_format=torch.channels_last)  # 128 MiB
    path = checkpoint.save(tmp_path, 2, {"images": large})
    before = _reset_peak()
    assert checkpoint.load(path)["images"].equal(large)
    assert _peak() - before <= 4 * large.nbytes
