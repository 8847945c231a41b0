"""DECREE's search against what the published code gave, step by step, and on encoders whose answer is known."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.step import Position
from dist_defend.methods.measure.decree import PRESETS, Config, InversionStep
from dist_defend.models.pixel_space import normalization_constants
from tests.numerics.det import assert_fingerprint, det_init, golden

SIZE = 32


class Normalised(nn.Module):
    """The recorded encoder behind CIFAR-10's constants, in float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        convolutions = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        self.net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        det_init(self.net, seed)
        mean, std = (torch.tensor(row, dtype=torch.float64) for row in normalization_constants("cifar10"))
        self.mean, self.std = mean.view(3, 1, 1), std.view(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net((x - self.mean) / self.std)
        return found


def as_parameter(uniform: Tensor) -> Tensor:
    return torch.atanh((uniform - 0.5) * (2 - 1e-7))


def make_search(case: dict[str, Any]) -> tuple[InversionStep, list[Batch]]:
    """The recorded draws are a mask (H, W), then a pattern (H, W, 3)."""
    preset: dict[str, Any] = PRESETS["imagenet"] if case["usage"] == "CLIP" else {}
    schedule = {key: value for key, value in preset.items() if key != "batch_size"}
    assert schedule.get("least_cost", Config.least_cost) == case["lambda_min"]
    config = Config(
        "e", DatasetConfig("d"), seeds=(0,), lr=case["lr"], threshold=case["threshold"], batch_size=case["batch"],
        **schedule,
    )  # fmt: skip
    count = case["images"] // case["batch"]
    step = InversionStep(Normalised(case["seed"] + 2), config, SIZE, dist.start("fp64", None), count)
    generator = torch.Generator().manual_seed(case["seed"] + 1)
    mask, pattern = (
        torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((SIZE, SIZE), (SIZE, SIZE, 3))
    )
    with torch.no_grad():
        step.m.copy_(as_parameter(mask)[None, None])
        step.p.copy_(as_parameter(pattern).permute(2, 0, 1)[None])
    pixels = np.random.RandomState(case["seed"]).randint(0, 256, (case["images"], SIZE, SIZE, 3)).astype(np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
    numbers = torch.arange(len(images))
    batches = [Batch((part,), rows, rows) for part, rows in zip(images.split(4), numbers.split(4), strict=True)]
    return step, batches


@pytest.mark.parametrize("name", ["first_steps", "found", "not_found", "lr_steps"])
def test_steps_are_the_published_ones(name: str) -> None:
    case = golden("encoder_attacks")["decree"][name]
    step, batches = make_search(case)
    found: dict[str, list[float]] = {key: [] for key in ("loss", "cosine", "mask_l1", "lambda_used", "lr_used")}
    for epoch in range(case["epochs"]):
        for number, batch in enumerate(batches):
            found["lambda_used"].append(step.cost.item())
            told = step(batch, Position(epoch=epoch, batch=number))
            for key in ("loss", "cosine", "mask_l1"):
                found[key].append(told[key].item())
            found["lr_used"].append(step.update.rate)
            if epoch == number == 0:
                assert_fingerprint(step.m, case["mask_param_first"])
                assert_fingerprint(step.p, case["patch_param_first"])
                gradients = [parameter.grad for parameter in (step.m, step.p)]
                for gradient, part in zip(gradients, ("mask", "patch"), strict=True):
                    assert gradient is not None
                    assert_fingerprint(gradient, case[f"first_grad_{part}"])
    for key, values in found.items():
        assert values == pytest.approx(case[key], rel=1e-9), key
    assert_fingerprint(step.m, case["mask_param_last"])
    assert_fingerprint(step.p, case["patch_param_last"])
    assert step.cost.item() == pytest.approx(case["lambda_end"], rel=1e-12)
    assert step.stalled.item() == case["early_stop_count"]
    if name == "not_found":
        assert step.best.item() == float("inf")
    else:
        assert step.best.item() == pytest.approx(case["best_l1"], rel=1e-9)
        assert step.masks.sum().item() * 3 == pytest.approx(case["best_l1"], rel=1e-9)  # that of the best step


def search(encoder: nn.Module, **options: Any) -> InversionStep:
    config = Config("e", DatasetConfig("d"), **{"seeds": (0,), "patience": 2, **options})
    return InversionStep(encoder, config, 8, dist.start("fp64", None), 1)


def noise() -> Batch:
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch((images,), torch.zeros(6, dtype=torch.int64), torch.arange(6))


def test_an_encoder_that_sees_nothing_needs_no_mask() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] * 0 + 1

    step = search(Constant())
    for epoch in range(60):
        assert step(noise(), Position(epoch=epoch))["cosine"].item() == pytest.approx(1)
    assert step.cost.item() > 1e3  # times 5 after each six steps
    assert step.best.item() / (3 * 64) < 1e-6


def test_an_empty_mask_leaves_images_and_a_full_one_makes_them_one() -> None:
    step = search(nn.Flatten())
    with torch.no_grad():
        step.m.fill_(-30)
    images = noise().images
    units = nn.functional.normalize(images.flatten(1), dim=1)
    similarity = (units @ units.T)[~torch.eye(6, dtype=torch.bool)].mean().item()
    assert step(noise(), Position())["cosine"].item() == pytest.approx(similarity, rel=1e-6)
    with torch.no_grad():
        step.m.fill_(30)
    assert step(noise(), Position())["cosine"].item() == pytest.approx(1)
    assert step.best.item() == pytest.approx(3 * 64)  # PL1 of 1 is always within reach


def test_a_search_stops_when_an_epoch_is_above_the_threshold_and_nothing_better_came() -> None:
    step = search(nn.Flatten(), threshold=0.5, seeds=(0, 1), patience=3)
    step.cosines.copy_(torch.tensor([0.6, 0.4]))
    step.batches.fill_(1)
    step.stalled.fill_(4)
    assert not step.end_epoch() and step.stopped.tolist() == [1, 0]
    step.cosines.copy_(torch.tensor([0.0, -0.6]))
    step.batches.fill_(1)
    step.stalled.copy_(torch.tensor([0, 3]))
    assert not step.end_epoch()  # three steps are not more than three
    step.cosines.copy_(torch.tensor([0.0, -0.6]))
    step.batches.fill_(1)
    step.stalled.fill_(4)
    assert step.end_epoch()
    kept = step.masks.clone()
    with torch.no_grad():
        step.m.fill_(-3)
    step.best.fill_(1e9)
    step(noise(), Position())
    assert step.masks.equal(kept) and (step.best == 1e9).all()  # what has stopped keeps its mask


def test_seeds_side_by_side_are_seeds_alone() -> None:
    encoder = Normalised(3)
    together = search(encoder, seeds=(5, 6), threshold=0.9, lr=0.3)
    alone = [search(encoder, seeds=(seed,), threshold=0.9, lr=0.3) for seed in (5, 6)]
    together.cost.copy_(torch.tensor([1e-3, 5e-2], dtype=torch.float64))
    alone[1].cost.fill_(5e-2)
    assert not together.m[0].equal(together.m[1])
    for epoch in range(14):
        for step in (together, *alone):
            step(noise(), Position(epoch=epoch))
    for name in ("m", "p", "masks", "patterns", "cost", "best", "stalled"):
        expected = torch.cat([getattr(step, name) for step in alone])
        torch.testing.assert_close(getattr(together, name), expected, rtol=1e-9, atol=1e-12)


def test_rates_fall_at_the_milestones() -> None:
    step = search(nn.Flatten(), milestones=(2, 4), later_lrs=(0.1, 0.05))
    rates = []
    for epoch in range(6):
        step(noise(), Position(epoch=epoch))
        rates.append(step.update.rate)
    assert rates == [0.5, 0.5, 0.1, 0.1, 0.05, 0.05]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seeds": ()}, "'seeds'"),
        ({"seeds": (1, 1)}, "'seeds'"),
        ({"batch_size": 1}, "'batch_size'"),
        ({"milestones": (3,)}, "'milestones'"),
        ({"milestones": (5, 3)}, "'milestones'"),
        ({"later_lrs": (0.1, 0.0)}, "'later_lrs'"),
        ({"threshold": 1.5}, "'threshold'"),
        ({"least_cost": 0.0}, "'least_cost'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(Config("e", DatasetConfig("d")), **options)
