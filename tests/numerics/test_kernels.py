"""The Triton kernels, run by Triton's interpreter on a CPU, against the formulas; a skip where Triton is missing."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend.ops import fused

SHAPES = [(4, 3, 5, 2), (1, 1, 1, 1), (3, 7, 1, 1), (2, 5, 30, 7), (0, 3, 2, 2), (6, 3)]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Any]:
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module("dist_defend.ops.kernels")


def tensors(shape: tuple[int, ...], count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def orders(given: list[Tensor]) -> Iterator[list[Tensor]]:
    """Channels first, last, and both, where there are pixels; and a mean's gradient, which has no memory of its own."""
    yield given
    if given[0].ndim == 4:
        last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in given]
        yield last
        yield [given[0], *last[1:]]
        yield [*given[:-1], last[-1]]
        yield [given[0][:1, :, :1, :1].expand_as(given[0]), *given[1:]]


def close(found: Any, expected: Any) -> None:
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_elus_derivatives(kernels: Any, shape: tuple[int, ...], alpha: float) -> None:
    for given in orders(tensors(shape, 3)):
        given[2][given[2] < -0.9] = 0  # the kink
        close(kernels.elu_slope(*given, alpha), fused.elu_slope(*given, alpha))
        close(kernels.elu_curve(*given, alpha), fused.elu_curve(*given, alpha))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]])
def test_a_norms_second_derivative(kernels: Any, shape: tuple[int, ...]) -> None:
    vectors = [vector.abs() + 0.5 for vector in tensors((shape[1],), 8)]
    for given in orders(tensors(shape, 3)):
        found, expected = kernels.norm_curve(*given, *vectors), fused.norm_curve(*given, *vectors)
        close(found, expected)
        swapped = kernels.norm_curve(*given, *vectors[1:], vectors[0])  # mutation: vectors in another order
        assert shape[0] == 1 or not torch.allclose(swapped[0], expected[0])


@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (3, 7, 1, 1), (2, 5, 30, 7)])
def test_a_norm_with_a_sum_and_relu(kernels: Any, shape: tuple[int, ...], has_more: bool) -> None:
    weight, bias = tensors((shape[1],), 2)
    for x, more in orders(tensors(shape, 2)):
        x = x + torch.linspace(0, 1, x.numel()).view_as(x)
        statistics = torch.zeros_like(weight), torch.ones_like(weight)
        given = more if has_more else None
        y, centre, rate = fused.norm_relu(x, given, weight, bias, *statistics, 0.1, 1e-5)
        close(kernels.affine_relu(x, given, weight, bias, centre, rate), y)
        assert (y == 0).any() and (y > 0).any()


def test_relu_hides_nothing_that_is_not_a_number(kernels: Any) -> None:
    x, one, zero = torch.tensor([[[[float("nan"), -1.0, 2.0]]]]), torch.ones(1), torch.zeros(1)
    assert kernels.affine_relu(x, None, one, zero, zero, one).isnan().sum() == 1
