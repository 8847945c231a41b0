"""Batch norm on its batch's statistics, differentiated twice: torch's own formulas are the oracle."""

import pytest
import torch
from torch import Tensor, nn

from dist_defend.ops import second_order
from dist_defend.ops.second_order import CheapSecondOrder, constant_parameters

FORMATS = (torch.channels_last, torch.contiguous_format)


def norm_of(shape: tuple[int, ...]) -> nn.BatchNorm1d | nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(shape[1]).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_()
    return norm


def derivatives(x: Tensor, is_cheap: bool, with_parameters: bool = True) -> list[Tensor]:
    """Output, slope in x, the gradients of a function of that slope, and the running statistics."""
    norm = norm_of(tuple(x.shape))
    with CheapSecondOrder() if is_cheap else torch.enable_grad():
        y = norm(x).tanh()
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    with constant_parameters():
        (slope,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    wanted = (x, *norm.parameters()) if with_parameters else (x,)
    gradients = torch.autograd.grad((slope**3).sum(), wanted)
    return [y, slope, *gradients, *norm.buffers()]


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (6, 3)])
@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_numbers(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = (x.contiguous(memory_format=layout) if len(shape) == 4 else x).requires_grad_()
    for mine, theirs in zip(derivatives(x, True), derivatives(x, False), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_the_comparison_catches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: statistics that do not follow the images."""
    original = second_order._NormGradient.backward

    def forget(context: object, v: Tensor, *rest: Tensor) -> tuple[Tensor | None, ...]:
        for_grad, for_x, *others = original(context, v, *rest)
        return (for_grad, torch.zeros_like(for_x), *others)

    monkeypatch.setattr(second_order._NormGradient, "backward", staticmethod(forget))
    x = torch.randn(4, 3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mine, theirs = derivatives(x, True, False), derivatives(x, False, False)
    assert torch.allclose(mine[1], theirs[1])
    assert not torch.allclose(mine[2], theirs[2])


def test_gradients_of_weights_are_not_silently_constant() -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64).requires_grad_()
    norm = norm_of((4, 3, 2, 2))
    with CheapSecondOrder():
        y = norm(x).square().sum()
    (for_weight,) = torch.autograd.grad(y, norm.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(for_weight.sum(), x)
