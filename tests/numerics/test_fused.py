"""Activations, pools and losses that are differentiated twice in one pass: torch's own derivatives are the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dist_defend.ops import fused, second_order
from dist_defend.ops.losses import weighted_cross_entropy
from dist_defend.ops.second_order import CheapSecondOrder, constant_parameters

SHAPES = [(2, 3, 5, 4), (1, 1, 2, 2), (3, 2, 7, 1), (0, 2, 4, 4)]
Layer = Callable[[Tensor], Tensor]
LAYERS: dict[str, Layer] = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "torch.relu": torch.relu,
    "a method": lambda x: x.relu(),
    "elu": F.elu,
    "elu, alpha": lambda x: F.elu(x, 0.7),
    "elu, negative alpha": lambda x: F.elu(x, -0.7),
    "relu of elu": lambda x: F.relu(F.elu(x) + 0.3),
}
POOLS: dict[str, Layer] = {
    "pool": lambda x: F.max_pool2d(x, 2),
    "overlapping pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "pool, ceiling": lambda x: F.max_pool2d(x, 2, ceil_mode=True),
    "oblong pool": lambda x: F.max_pool2d(x, (1, 2), stride=(1, 1)),
    "pool with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}


def cheap(layer: Layer) -> Layer:
    def call(x: Tensor) -> Tensor:
        with CheapSecondOrder():
            return layer(x)

    return call


def images(shape: tuple[int, ...], is_last: bool = False) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last) if is_last else x


def derivatives(layer: Layer, x: Tensor) -> list[Tensor]:
    """Value, slope, and what a product with the Hessian of a function of the layer is."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    with constant_parameters():
        (slope,) = torch.autograd.grad((y.square() * weights).sum(), x, create_graph=True)
        (product,) = torch.autograd.grad(slope, x, torch.cos(3 * x.detach()))
    return [y, slope, product]


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_activations_have_torchs_derivatives(name: str, shape: tuple[int, ...], is_last: bool) -> None:
    x, layer = images(shape, is_last), LAYERS[name]
    for mine, theirs in zip(derivatives(cheap(layer), x), derivatives(layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_pools_have_torchs_derivatives(name: str, is_last: bool) -> None:
    x, layer = images((2, 3, 6, 5), is_last), POOLS[name]
    for mine, theirs in zip(derivatives(cheap(layer), x), derivatives(layer, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["relu", "elu", "elu, alpha"])
def test_the_kink_is_where_torch_has_it(name: str) -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0], dtype=torch.float64)
    for mine, theirs in zip(derivatives(cheap(LAYERS[name]), x), derivatives(LAYERS[name], x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [*LAYERS, *POOLS])
def test_derivatives_are_those_of_differences(name: str) -> None:
    x = images((2, 2, 4, 4)).requires_grad_()
    layer = cheap((LAYERS | POOLS)[name])
    assert gradcheck(layer, x) and gradgradcheck(layer, x)


def test_the_comparison_catches_an_elu_whose_slope_is_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the second derivative of ELU is left out."""

    def forget(v: Tensor, grad: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        for_grad, for_y = fused.elu_curve(v, grad, y, alpha)
        return for_grad, 0 * for_y

    monkeypatch.setattr(second_order, "elu_curve", forget)
    x = images((2, 3, 5, 4))
    mine, theirs = derivatives(cheap(F.elu), x), derivatives(F.elu, x)
    assert torch.allclose(mine[1], theirs[1]) and not torch.allclose(mine[2], theirs[2])


def losses(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, weights: Tensor) -> list[Tensor]:
    """Value, gradient and a product with the Hessian, of minus twice the loss."""
    logits = logits.clone().requires_grad_()
    value = -2 * loss(logits, labels, weights)
    (slope,) = torch.autograd.grad(value, logits, create_graph=True)
    (product,) = torch.autograd.grad(slope, logits, torch.cos(3 * logits.detach()))
    return [value, slope, product]


def torchs(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [0, 1, 6])
def test_a_weighted_cross_entropy_is_torchs(rows: int) -> None:
    logits = 5 * images((6, 4))[:rows]
    labels, weights = torch.tensor([0, 3, 1, 1, 2, 0])[:rows], torch.linspace(-1, 2, 6, dtype=torch.float64)[:rows]
    expected = losses(torchs, logits, labels, weights)
    for mine, theirs in zip(losses(weighted_cross_entropy, logits, labels, weights), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    if rows:
        wrong = losses(weighted_cross_entropy, logits, labels, weights.roll(1))  # mutation: another image's weight
        assert rows == 1 or not torch.allclose(wrong[2], expected[2])


def test_a_norms_second_derivative_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the formula's parts count: each sum, changed by a thousandth, changes what comes out."""
    x, v, grad = (images((4, 3, 2, 5)) * n + n for n in (1, 2, 3))
    vectors = [images((3,)).abs() + 0.1 * n for n in range(1, 9)]
    for_x, for_weight = fused.norm_curve(v, grad, x, *vectors)
    for number, name in enumerate(("weight", "centre", "rate", "grad_x", "grad_1", "v_x", "v_1", "both")):
        changed = [vector * (1.001 if n == number else 1) for n, vector in enumerate(vectors)]
        other: tuple[Any, ...] = fused.norm_curve(v, grad, x, *changed)
        assert not torch.allclose(other[0], for_x, rtol=1e-7), name
        assert torch.allclose(other[1], for_weight, rtol=1e-9) == (name in ("weight", "centre")), name
