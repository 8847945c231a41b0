"""Broken checkpoints and run folders: each is read, passed over or refused by one line before anything is trained."""

import copy
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.engine import checkpoint, dist
from dist_defend.engine.objective import NonFiniteError, Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import GradientStep
from dist_defend.engine.trainer import Stage, Trainer, TrainerConfig
from dist_defend.files import sha256_file
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree

TENSORS, TREE = "tensors.safetensors", "state.json"
CONFIG = {"method": "line", "seed": 1, "line": {"data": {"path": "d", "max_samples": 8}, "betas": [0.9, 0.999]}}
RESULT = {
    "name": "run",
    "method": "line",
    "inputs": {"line.data.path": "ab" * 32},
    "lives": [{"code_version": "1", "world_size": 1, "wall_seconds": 1.5}],
    "wall_seconds": 1.5,
}


class Line(Objective):
    """Mean of (w x)^2, with a convolution whose memory order is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 2)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.norm(self.conv(batch.images)).square().mean()}


class Images:
    num_batches = 2

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for number in range(start_batch, self.num_batches):
            images = torch.full((2, 3, 4, 4), 0.1 + number) + torch.arange(4.0) / 9
            yield Batch((images,), torch.zeros(2).long(), torch.arange(2))


def stages() -> list[Stage]:
    update = UpdateConfig(epochs=2, optimizer=OptimizerConfig("adam", amsgrad=True))
    step = GradientStep(Line(), update, dist.start("fp32", None), steps_per_epoch=2)
    return [Stage("line", Images(), step, epochs=2)]


def train(folder: Path, every: int = 99) -> None:
    """Resume or start a run of four updates there. A loss that is none is a result, not a fault of the reader."""
    run = RunFolder(folder, True)
    config = TrainerConfig(checkpoint_every=every, keep_checkpoints=9, trackers=())
    try:
        run.open(CONFIG, "")
        Trainer(dist.start("fp32", None), run, config).fit(stages())
    except NonFiniteError:
        pass
    finally:
        run.close()


@cache
def base() -> Path:
    """A run folder with the checkpoints of steps 2 and 3 of four."""
    folder = Path(tempfile.mkdtemp()) / "run"
    train(folder, every=1)
    for step in (1, 4):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:09d}")
    (folder / "result.json").write_text(json.dumps(RESULT))
    return folder


@cache
def content(name: str) -> bytes:
    return (base() / name).read_bytes()


def run_folder(folder: Path) -> Path:
    """A copy of the base; the newest checkpoint's folder."""
    shutil.copytree(base(), folder, dirs_exist_ok=True)
    (folder / "result.json").unlink()
    return folder / "checkpoints" / "step_000000003"


def complete(newest: Path) -> None:
    """COMPLETE anew, as whoever makes a checkpoint up would."""
    (newest / "COMPLETE").write_text(json.dumps({name: sha256_file(newest / name) for name in (TENSORS, TREE)}))


def tensors(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Bytes of the tensors' file."""
    newest = run_folder(folder)
    (newest / TENSORS).write_bytes(mutate_bytes(rng, (newest / TENSORS).read_bytes()))
    complete(newest)
    return lambda: train(folder)


def header(rng: random.Random, folder: Path) -> Callable[[], object]:
    """The list of tensors: names, types, shapes, places."""
    newest = run_folder(folder)
    data = (newest / TENSORS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    listed = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
    (newest / TENSORS).write_bytes(len(listed).to_bytes(8, "little") + listed + data[8 + length :])
    complete(newest)
    return lambda: train(folder)


def tree(rng: random.Random, folder: Path) -> Callable[[], object]:
    """The tree of state.json."""
    newest = run_folder(folder)
    (newest / TREE).write_text(json.dumps(mutate_tree(rng, json.loads((newest / TREE).read_text()))))
    complete(newest)
    return lambda: train(folder)


def state(rng: random.Random, folder: Path) -> Callable[[], object]:
    """What the tree means: values of the state replaced, and encoded as save does."""
    newest = run_folder(folder)
    changed = _plain(checkpoint.load(newest))
    changed = mutate_tree(rng, changed)
    saved: dict[str, Tensor] = {}
    encoded = checkpoint._encode(_mended(changed), saved, "")
    save_file(saved, newest / TENSORS)
    (newest / TREE).write_text(json.dumps({"format": checkpoint.FORMAT, "state": encoded}))
    complete(newest)
    return lambda: train(folder)


class Held(float):
    """A tensor among plain values: a number, so that mutate_tree may also negate and multiply it."""

    tensor: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        return self


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        held = Held(0.0)
        held.tensor = value
        return held
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _mended(value: Any) -> Any:
    if isinstance(value, Held):
        return value.tensor
    if isinstance(value, dict):
        return {key: _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value


def text(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Bytes of state.json."""
    newest = run_folder(folder)
    (newest / TREE).write_bytes(mutate_bytes(rng, (newest / TREE).read_bytes()))
    complete(newest)
    return lambda: train(folder)


def sums(rng: random.Random, folder: Path) -> Callable[[], object]:
    """COMPLETE, in bytes or as a tree; the checkpoint before is whole."""
    newest = run_folder(folder)
    data = (newest / "COMPLETE").read_bytes()
    changed = mutate_bytes(rng, data) if rng.random() < 0.5 else json.dumps(mutate_tree(rng, json.loads(data))).encode()
    (newest / "COMPLETE").write_bytes(changed)
    return lambda: train(folder)


def config(rng: random.Random, folder: Path) -> Callable[[], object]:
    """config.json of a run folder that a run is started in."""
    return _json(rng, folder, "config.json", CONFIG, lambda run: run.check(copy.deepcopy(CONFIG)))


def result(rng: random.Random, folder: Path) -> Callable[[], object]:
    """result.json of a finished run that is started again."""
    return _json(rng, folder, "result.json", RESULT, lambda run: run.read_result({"line.data.path": "ab" * 32}))


def _json(
    rng: random.Random, folder: Path, name: str, plain: dict[str, Any], read: Callable[[RunFolder], object]
) -> Callable[[], object]:
    data = json.dumps(plain).encode()
    changed = mutate_bytes(rng, data) if rng.random() < 0.5 else json.dumps(mutate_tree(rng, plain)).encode()
    (folder / name).write_bytes(changed)
    return lambda: read(RunFolder(folder, True))


SURFACES = ("tensors", "header", "tree", "state", "text", "sums", "config", "result")


def test_no_bad_outcome(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_checkpoint:{','.join(SURFACES)}", count) == []
