"""Batch norm, sum and ReLU in one operator: bitwise the layers one by one, for outputs, gradients and statistics."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck

from dist_defend.models.batch_statistics import repeated_statistics
from dist_defend.models.classifier import build_classifier
from dist_defend.models.masked_norm import mask_norms, masked_together, norm_names
from dist_defend.ops import fused, fused_norm
from dist_defend.ops.fused_norm import differentiated_once, norm_relu

SHAPES = [(4, 3, 5, 2), (2, 1, 1, 1), (1, 3, 7, 1)]


@pytest.fixture(autouse=True)
def fused_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "SMALL", 0)


def images(shape: tuple[int, ...], seed: int, is_last: bool) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (x.contiguous(memory_format=torch.channels_last) if is_last else x).requires_grad_()


def norm_of(channels: int) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels).double()
    nn.init.uniform_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def outcome(shape: tuple[int, ...], is_last: bool, has_more: bool, is_fused: bool) -> list[Tensor]:
    x, more, norm = images(shape, 1, is_last), images(shape, 2, is_last), norm_of(shape[1])
    with differentiated_once() if is_fused else torch.enable_grad():
        y = norm_relu(norm, x, more if has_more else None)
    inputs = (x, more, *norm.parameters()) if has_more else (x, *norm.parameters())
    slopes = torch.autograd.grad(((y + 1).square() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum(), inputs)
    assert (type(y.grad_fn).__name__ == "_NormReluBackward") == is_fused
    return [y, *slopes, *norm.buffers()]


@pytest.mark.parametrize("has_more", [False, True])
@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_numbers(shape: tuple[int, ...], is_last: bool, has_more: bool) -> None:
    found, expected = (outcome(shape, is_last, has_more, is_fused) for is_fused in (True, False))
    assert len(found) == len(expected) and all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_gradients_are_those_of_differences_and_there_is_no_second_derivative() -> None:
    norm = norm_of(3)

    def call(x: Tensor, more: Tensor, weight: Tensor, bias: Tensor) -> Any:
        y = fused_norm._norm_relu(x, more, weight, bias, torch.zeros(3).double(), torch.ones(3).double(), 0.0, norm.eps)
        return y

    given = images((4, 3, 2, 5), 1, False), images((4, 3, 2, 5), 2, False), norm.weight, norm.bias
    assert gradcheck(call, given)
    (slope,) = torch.autograd.grad(call(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_the_comparison_catches_a_sum_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the other summand's gradient is not the ReLU's."""
    plain = fused.norm_relu_backward

    def forget(grad: Tensor, *given: Any) -> Any:
        return grad, *plain(grad, *given)[1:]

    monkeypatch.setattr(fused, "norm_relu_backward", forget)
    found, expected = (outcome((4, 3, 5, 2), False, True, is_fused) for is_fused in (True, False))
    assert found[1].equal(expected[1]) and not torch.allclose(found[2], expected[2])


def test_few_values_on_a_cpu_are_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norm, "SMALL", 4 * 3 * 5 * 2)
    outcome((4, 3, 5, 2), False, True, is_fused=True)
    with pytest.raises(AssertionError):
        outcome((3, 3, 5, 2), False, True, is_fused=True)
    monkeypatch.undo()
    with differentiated_once():
        y = norm_relu(norm_of(3).to("meta"), torch.empty(4, 3, 5, 2, dtype=torch.float64, device="meta"))
    assert type(y.grad_fn).__name__ == "_NormReluBackward"  # a device has no such limit


class Elsewhere(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def changed(kind: str) -> nn.Module:
    norm: Any = nn.BatchNorm2d(3)
    if kind == "eval":
        norm.eval()
    if kind == "hook":
        norm.register_forward_hook(lambda module, inputs, output: output * 2)
    kinds: dict[str, Any] = {
        "momentum": lambda: nn.BatchNorm2d(3, momentum=None),
        "no scale": lambda: nn.BatchNorm2d(3, affine=False),
        "no statistics": lambda: nn.BatchNorm2d(3, track_running_stats=False),
        "another forward": lambda: Elsewhere(3),
        "another layer": lambda: nn.GroupNorm(1, 3),
        "none": nn.Identity,
    }
    made: nn.Module = kinds.get(kind, lambda: norm)()
    return made


@pytest.mark.parametrize(
    "kind", ["eval", "hook", "momentum", "no scale", "no statistics", "another forward", "another layer", "none"]
)
def test_what_is_no_plain_norm_stays_as_it_is(kind: str) -> None:
    x = images((4, 3, 2, 2), 1, False).float()
    with differentiated_once():
        y = norm_relu(changed(kind), x)
    assert y.equal(F.relu(changed(kind)(x)))


@pytest.mark.parametrize("arch", ["small_resnet", "preact_resnet18", "wrn_10_1"])
@pytest.mark.parametrize("is_masked", [False, True])
def test_networks_give_the_same_numbers(arch: str, is_masked: bool) -> None:
    torch.manual_seed(0)
    model: Any = build_classifier(arch, 4, "none", 8)
    model.to(memory_format=torch.channels_last).train()
    masks = mask_norms(model, norm_names(model)) if is_masked else {}
    x = torch.rand(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    parameters = list(masks.values()) or list(model.parameters())
    logits = model(x)
    expected = [logits, *torch.autograd.grad(logits.square().sum(), parameters)]
    with repeated_statistics(model, 0), differentiated_once(), masked_together(model) if is_masked else nullcontext():
        found = model(x)
    gradients = torch.autograd.grad(found.square().sum(), parameters)
    for mine, theirs in zip((found, *gradients), expected, strict=True):
        assert mine.equal(theirs)
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}
