"""NT-Xent and attention transfer against the published code's values, and against what they must be by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.models.encoder import build_simclr
from dist_defend.ops.attention import attention_loss, attention_map
from dist_defend.ops.losses import negative_cosine, nt_xent
from tests.numerics.det import det_images, det_init, golden

Loss = Callable[[Tensor, Tensor, float], Tensor]


@pytest.fixture(scope="module")
def projections() -> dict[int, tuple[Tensor, Tensor]]:
    """z1, z2 of the golden model (train mode) for batches of 4 and 16."""
    model = build_simclr("resnet18_cifar", "none").double()
    det_init(model, 1)
    with torch.no_grad():
        return {b: tuple(model(det_images((b, 3, 32, 32), seed))[1] for seed in (2, 3)) for b in (4, 16)}


def assert_golden(loss: Loss, projections: dict[int, tuple[Tensor, Tensor]]) -> None:
    for batch, (z1, z2) in projections.items():
        for temperature in (0.5, 0.1):
            expected = golden("simclr")[f"float64_B{batch}_T{temperature}"]["loss"]
            assert loss(z1, z2, temperature).item() == pytest.approx(expected, rel=1e-9)


def variant(keeps_itself: bool = False, drops_positive: bool = False, sign: float = 1.0) -> Loss:
    """NT-Xent as its definition reads, row by row, with optional mistakes."""

    def loss(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
        z, n = torch.cat([z1, z2]), 2 * len(z1)
        terms = []
        for i in range(n):
            positive = (i + len(z1)) % n
            others = [j for j in range(n) if (j != i or keeps_itself) and (j != positive or not drops_positive)]
            denominator = sum((z[i] @ z[j] / temperature).exp() for j in others)
            terms.append(-((sign * z[i] @ z[positive] / temperature).exp() / denominator).log())
        return torch.stack(terms).mean()

    return loss


def test_nt_xent_is_the_published_one(projections: dict[int, tuple[Tensor, Tensor]]) -> None:
    assert_golden(nt_xent, projections)
    assert_golden(variant(), {4: projections[4]})


@pytest.mark.parametrize(
    "mutant",
    [
        variant(keeps_itself=True),
        variant(drops_positive=True),
        variant(sign=-1.0),
        lambda z1, z2, temperature: nt_xent(z1, z2, 1.0),
        lambda z1, z2, temperature: nt_xent(z1, z2.roll(1, 0), temperature),
    ],
    ids=["itself kept", "positive dropped", "sign flipped", "temperature left out", "pairs shifted"],
)
def test_a_mutated_nt_xent_fails_the_same_check(mutant: Loss, projections: dict[int, tuple[Tensor, Tensor]]) -> None:
    with pytest.raises(AssertionError):
        assert_golden(mutant, {4: projections[4]})


def test_nt_xent_where_its_value_is_known() -> None:
    same = functional.normalize(det_images((1, 8), 0)).expand(6, -1)
    assert nt_xent(same, same, 0.3).item() == pytest.approx(math.log(11), rel=1e-12)
    axes = torch.eye(6, 8, dtype=torch.float64)
    assert nt_xent(axes, axes, 0.5).item() == pytest.approx(-2 + math.log(math.exp(2) + 10), rel=1e-12)
    assert nt_xent(axes[:1], -axes[:1], 0.5).item() == 0.0  # a single pair has no negatives
    assert nt_xent(axes.float(), axes.float(), 1e-3).item() == 0.0  # exp(1000) would overflow
    assert torch.isfinite(nt_xent(axes.float(), -axes.float(), 1e-3))


def test_nt_xent_does_not_change_with_rotation_order_or_swapped_views() -> None:
    z1, z2 = (functional.normalize(det_images((5, 7), seed)) for seed in (0, 1))
    value = nt_xent(z1, z2, 0.5)
    rotation, order = torch.linalg.qr(det_images((7, 7), 2)).Q, torch.tensor([3, 0, 4, 1, 2])
    for other in (nt_xent(z1 @ rotation, z2 @ rotation, 0.5), nt_xent(z2, z1, 0.5), nt_xent(z1[order], z2[order], 0.5)):
        assert other.item() == pytest.approx(value.item(), rel=1e-12)


def test_nt_xent_is_computed_in_float32_under_autocast() -> None:
    z1, z2 = (functional.normalize(det_images((5, 7), seed)).float() for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(z1, z2, 0.1)
    assert inside.dtype is torch.float32 and inside.equal(nt_xent(z1, z2, 0.1))


def test_negative_cosine() -> None:
    a = det_images((4, 6), 0)
    assert negative_cosine(a, 3 * a).item() == pytest.approx(-1, rel=1e-12)
    assert negative_cosine(a, -a[:1].expand(4, -1)).item() == negative_cosine(a, -a[:1]).item()
    assert negative_cosine(torch.eye(2), torch.eye(2).flip(0)).item() == 0


def assert_attention_golden(map_of: Callable[[Tensor], Tensor]) -> None:
    student, teacher = det_images((4, 7, 5, 5), 6), det_images((4, 7, 5, 5), 7)
    value = (map_of(student) - map_of(teacher)).square().mean().item()
    assert value == pytest.approx(golden("mimic_estimators")["at"], rel=1e-9)


def test_attention_loss_is_the_published_one() -> None:
    assert_attention_golden(attention_map)
    value = attention_loss(det_images((4, 7, 5, 5), 6), det_images((4, 7, 5, 5), 7)).item()
    assert value == pytest.approx(golden("mimic_estimators")["at"], rel=1e-9)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda f: functional.normalize(f.square().sum(1).flatten(1)),  # without the 1e-6
        lambda f: f.abs().sum(1) / (f.abs().sum(1).flatten(1).norm(dim=1)[:, None, None] + 1e-6),  # p = 1
        lambda f: f.square().mean(1),  # not normalised
        lambda f: f.square().sum(1) / (f.square().sum(1).norm() + 1e-6),  # one norm for the batch
    ],
    ids=["no epsilon", "p = 1", "not normalised", "norm of the batch"],
)
def test_a_mutated_attention_map_fails_the_same_check(mutant: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        assert_attention_golden(mutant)


def test_attention_loss_where_its_value_is_known() -> None:
    maps = det_images((2, 3, 4, 5), 0)
    assert attention_loss(maps, maps).item() == 0
    assert attention_loss(maps, -7 * maps).item() < 1e-13  # sign and scale do not matter
    assert attention_loss(maps, maps.flip(1)).item() < 1e-30  # nor does the order of channels
    left, right = torch.zeros(1, 2, 4, 5).double(), torch.zeros(1, 2, 4, 5).double()
    left[0, :, 0, 0], right[0, :, 3, 4] = 3.0, 3.0
    assert attention_loss(left, right).item() == pytest.approx(2 / 20, rel=1e-6)
    student = maps.clone().requires_grad_()
    attention_loss(student, maps).backward()
    assert student.grad is not None and not student.grad.any()
