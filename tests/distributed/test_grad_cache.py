"""GradCache: the whole batch's loss and gradient, by micro-batches; with batch norm, by their statistics."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.engine import dist, grad_cache
from dist_defend.engine import step as steps
from dist_defend.engine.grad_cache import MicroBatch
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.ops import losses
from dist_defend.ops.collectives import convert_sync_batchnorm
from tests.distributed.test_strategies import run
from tests.ranks import Pool
from tests.runs import make_data, make_experiment, metrics

IMAGES = 8
PARTS = 4
Mutation = Callable[[pytest.MonkeyPatch], None]


def none(patch: pytest.MonkeyPatch) -> None:
    """What is under test."""


def gradient_unscaled(patch: pytest.MonkeyPatch) -> None:
    def made(*arguments: Any) -> Any:
        loss, parts = original(*arguments)
        return loss, [MicroBatch(p.batch, None if p.gradient is None else p.gradient / len(parts)) for p in parts]

    original = grad_cache.micro_batches
    patch.setattr(steps, "micro_batches", made)


def one_part_dropped(patch: pytest.MonkeyPatch) -> None:
    def made(*arguments: Any) -> Any:
        loss, (first, *rest) = original(*arguments)
        assert first.gradient is not None
        return loss, [MicroBatch(first.batch, torch.zeros_like(first.gradient)), *rest]

    original = grad_cache.micro_batches
    patch.setattr(steps, "micro_batches", made)


def gradients_in_another_order(patch: pytest.MonkeyPatch) -> None:
    def made(*arguments: Any) -> Any:
        loss, parts = original(*arguments)
        return loss, [MicroBatch(a.batch, b.gradient) for a, b in zip(parts, reversed(parts), strict=True)]

    original = grad_cache.micro_batches
    patch.setattr(steps, "micro_batches", made)


def negatives_of_one_part(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(steps, "is_cached", lambda objective: False)


def in_chunks(patch: pytest.MonkeyPatch) -> None:
    """NT-Xent three rows at a time."""
    patch.setattr(losses, "LOGITS_AT_ONCE", 3 * 2 * IMAGES)


class PlainEncoder(nn.Module):
    """Stands for a ViT: no batch norm; dropout, if asked for, is drawn from the global generator."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.feature_dim = 6
        self.f = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.GELU(), nn.Dropout(dropout))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.f(images)
        return features


def make_network(kind: str) -> SimCLR:
    torch.manual_seed(3)
    if kind in ("plain", "dropout"):
        head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 5))
        return SimCLR(PlainEncoder(0.5 if kind == "dropout" else 0.0), head, kind, "none", 2).double()  # type: ignore[arg-type]
    if kind == "vit":
        model = build_simclr("timm:vit_tiny_patch16_224", "none", image_size=32).double()
        blocks = model.get_submodule("f.f.blocks")
        assert isinstance(blocks, nn.Sequential)
        del blocks[2:]
        model.g = nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 8)).double()
        return model
    return build_simclr("small_cifar", "none", image_size=32).double()


def images_of(kind: str) -> Tensor:
    size = 2 if kind in ("plain", "dropout") else 32
    return torch.rand(2, IMAGES, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_update(kind: str, parts: int, is_cached: bool, mutate: Mutation = none) -> dict[str, Tensor]:
    """Loss, weights and statistics after an SGD update, whose change is the gradient."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        ranks = dist.start("fp64", None)
        model = make_network(kind)
        if ranks.world_size > 1:
            convert_sync_batchnorm(model)
        share = IMAGES // ranks.world_size
        own = images_of(kind)[:, ranks.rank * share : (ranks.rank + 1) * share]
        batch = Batch(tuple(own), torch.zeros(share).long(), torch.arange(share))
        objective = SimCLRObjective(model, 0.5, is_cached)
        update = UpdateConfig(epochs=1, accumulation=parts, optimizer=OptimizerConfig("sgd", lr=1.0))
        step = GradientStep(objective, update, ranks, steps_per_epoch=1)
        torch.manual_seed(11)
        loss = step(batch, Position())["loss"]
        if ranks.world_size > 1:
            torch.distributed.all_reduce(loss)
        return {"loss": loss / ranks.world_size, **{k: v.clone() for k, v in model.state_dict().items()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11, msg=f"{key}: {{}}".format)


@pytest.mark.parametrize("kind", ["plain", "vit"])
@pytest.mark.parametrize("mutate", [none, in_chunks])
def test_micro_batches_are_the_whole_batch(kind: str, mutate: Mutation, two_ranks: Pool) -> None:
    whole = one_update(kind, 1, False)
    for parts in (2, PARTS, IMAGES):
        assert_same(one_update(kind, parts, True, mutate), whole)
    for found in two_ranks.run(one_update, kind, PARTS, True, mutate):
        assert_same(found, whole)


@pytest.mark.parametrize(
    "mutate", [gradient_unscaled, one_part_dropped, gradients_in_another_order, negatives_of_one_part]
)
def test_the_comparison_catches(mutate: Mutation, two_ranks: Pool) -> None:
    whole = one_update("plain", 1, False)
    for found in (one_update("plain", PARTS, True, mutate), two_ranks.run(one_update, "plain", PARTS, True, mutate)[0]):
        with pytest.raises(AssertionError):
            assert_same(found, whole)


def by_hand(kind: str, parts: int) -> dict[str, Tensor]:
    """One graph through all micro-batches, each normalised by itself."""
    model = make_network(kind)
    views = [view.chunk(parts) for view in images_of(kind)]
    torch.manual_seed(11)
    made = [
        [functional.normalize(model.g(model.f(image)), dim=1) for image in pair] for pair in zip(*views, strict=True)
    ]
    z1, z2 = (torch.cat(column) for column in zip(*made, strict=True))
    loss = losses.nt_xent(z1, z2, 0.5)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(parameter.grad)
    return {"loss": loss.detach(), **model.state_dict()}


@pytest.mark.parametrize("kind", ["batch norm", "dropout"])
def test_each_micro_batch_is_drawn_and_normalised_once(kind: str) -> None:
    """Statistics move once per micro-batch and view, and both passes drop the same units."""
    found, expected = one_update(kind, PARTS, True), by_hand(kind, PARTS)
    assert_same(found, expected)
    if kind == "batch norm":
        assert found["g.1.num_batches_tracked"] == 2 * PARTS
        with pytest.raises(AssertionError):  # the statistics are not the whole batch's
            assert_same(found, one_update(kind, 1, False))


def statistics_move_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grad_cache, "statistics_stay", lambda module: torch.no_grad())


def other_random_numbers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())


@pytest.mark.parametrize(("kind", "mutate"), [("batch norm", statistics_move_twice), ("dropout", other_random_numbers)])
def test_that_check_catches(kind: str, mutate: Mutation) -> None:
    with pytest.raises(AssertionError):
        assert_same(one_update(kind, PARTS, True, mutate), by_hand(kind, PARTS))


def reductions(parts: int) -> list[int]:
    """Numbers in each all-reduce that DDP asks for in an update."""
    sizes: list[int] = []

    def note(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        sizes.append(bucket.buffer().numel())
        sent: torch.futures.Future[list[Tensor]]
        sent = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return sent.then(lambda future: future.value()[0])

    ranks = dist.start("fp64", None)
    objective = SimCLRObjective(make_network("plain"), 0.5, True)
    update = UpdateConfig(epochs=1, accumulation=parts, optimizer=OptimizerConfig("sgd", lr=1.0))
    step = GradientStep(objective, update, ranks, steps_per_epoch=1)
    step.strategy.module.register_comm_hook(None, note)  # type: ignore[attr-defined]
    share = IMAGES // ranks.world_size
    own = images_of("plain")[:, ranks.rank * share : (ranks.rank + 1) * share]
    step(Batch(tuple(own), torch.zeros(share).long(), torch.arange(share)), Position())
    return sizes


def test_gradients_are_reduced_once(two_ranks: Pool) -> None:
    count = sum(p.numel() for p in make_network("plain").parameters())
    for sizes in two_ranks.run(reductions, PARTS):
        assert sum(sizes) == count


def small_experiment(folder: Path, **options: Any) -> Path:
    update = {"batch_size": 8, "epochs": 2, "accumulation": 2, "optimizer": {"name": "adamw"}} | options.pop(
        "update", {}
    )
    section = {
        "data": {"path": make_data(folder / "data", 24)},
        "arch": "small_cifar",
        "augment": {"flip": 0.5},
        "grad_cache": True,
        "update": update,
        **options,
    }
    trainer = {"log_every": 1, "trackers": [], "checkpoint_every": 2}
    return make_experiment(folder, "simclr", section, precision="fp64", trainer=trainer)


def logged(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def test_a_resume_is_exact(tmp_path: Path) -> None:
    config = str(small_experiment(tmp_path))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert run(config, str(whole), "ddp") == ""
    assert run(config, str(parted), "ddp", 3) == "killed"
    assert run(config, str(parted), "ddp") == ""
    assert logged(parted) == logged(whole)
    assert len(set(logged(whole))) == 6


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Ranks of their own: DeepSpeed changes torch functions for good."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_sharded_it_is_the_same(strategy: str, tmp_path: Path, ranks: Pool) -> None:
    """In fp32, as DeepSpeed wants it. Adam's steps of one length, whatever the gradient, would magnify rounding."""
    config = str(small_experiment(tmp_path, update={"optimizer": {"name": "sgd", "lr": 3e-4}}))
    folders = [tmp_path / name for name in ("ddp", strategy)]
    for folder in folders:
        assert ranks.run(run, config, str(folder), folder.name, -1, ("precision=fp32",), timeout=200) == ["", ""]
    assert logged(folders[1]) == pytest.approx(logged(folders[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("simclr.update.accumulation=1", "key 'simclr.grad_cache' is true, but 'update.accumulation' is 1"),
        ("simclr.update.accumulation=3", "'batch_size' is 8, not divisible by 1 ranks x 3 micro-batches"),
    ],
)
def test_what_cannot_be_split_is_refused(
    override: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(small_experiment(tmp_path)), override, "--dry-run"]) == 2
    assert told in capsys.readouterr().err
