"""Layers that torch differentiates once only: computed in other words where it matters, found beforehand where not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.classifier import build_classifier
from dist_defend.ops.hypergrad import check_twice_differentiable
from dist_defend.ops.second_order import CheapSecondOrder
from tests.runs import CLASSES, make_classifier, make_data, make_experiment, options_of


def seeded(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_hardsigmoid_has_its_values_and_slopes_and_a_second_derivative() -> None:
    x = torch.tensor([-4.0, -3.0, -1.5, 0.0, 2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    with CheapSecondOrder():
        y = nn.Hardsigmoid()(x)
    torch.testing.assert_close(y, torch.tensor([0, 0, 0.25, 0.5, 5 / 6, 1, 1], dtype=torch.float64))
    (slope,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    inside = torch.tensor([0, 0, 1, 1, 1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(slope.detach(), inside * 2 * y.detach() / 6)
    torch.testing.assert_close(curvature, inside * 2 / 36)


@pytest.mark.parametrize("call", [functional.hardsigmoid, lambda x: functional.hardsigmoid(x, inplace=True)])
def test_hardsigmoid_as_a_function_too(call: Callable[[Tensor], Tensor]) -> None:
    x = seeded(50).requires_grad_()
    with CheapSecondOrder():
        y = call(x * 3)
    torch.testing.assert_close(y, functional.hardsigmoid(x * 3))


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_of_torchs_own_module(need_weights: bool) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def curvature(is_cheap: bool) -> Tensor:
        x = seeded(2, 5, 8).requires_grad_()
        with CheapSecondOrder() if is_cheap else sdpa_kernel(SDPBackend.MATH):
            y = attention(x, x, x, need_weights=need_weights)[0]
        (slope,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), x)[0]

    torch.testing.assert_close(curvature(True), curvature(False))
    assert torch.backends.cuda.flash_sdp_enabled(), "the choice of kernels ends with the mode"


@pytest.mark.parametrize(
    "arch",
    [
        "torchvision:mobilenet_v3_small",
        "timm:lcnet_050",
        "timm:ghostnet_050",
        "timm:mobilenetv3_small_050",
        "timm:vit_tiny_patch16_224",
        "torchvision:swin_t",
        "ibau_vgg",
    ],
)
def test_networks_that_people_have_can_be_differentiated_twice(arch: str) -> None:
    model = build_classifier(arch, 4, "none", 32).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    check_twice_differentiable(model, 32, arch)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert torch.get_rng_state().equal(stream) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_products_of_a_network_with_hardsigmoid_are_those_of_differences() -> None:
    torch.manual_seed(0)
    model = build_classifier("torchvision:mobilenet_v3_small", 4, "none", 32).double().eval()
    x, direction = seeded(2, 3, 32, 32), seeded(1, 3, 32, 32)

    def slope(at: Tensor) -> Tensor:
        with CheapSecondOrder():
            logits = model(x + at)
        return torch.autograd.grad(logits.mul(100).logsumexp(1).sum(), at, create_graph=True)[0]

    delta = torch.zeros_like(direction, requires_grad=True)
    (product,) = torch.autograd.grad(slope(delta), delta, direction)
    step = 1e-6
    ends = [slope((sign * step * direction).requires_grad_()).detach() for sign in (1, -1)]
    differences = (ends[0] - ends[1]) / (2 * step)
    assert (product - differences).norm() < 1e-3 * product.norm() and product.norm() > 0


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(context: Any, grad: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        slope: Tensor = 2 * x * grad
        return slope


class Layer(nn.Module):
    """A linear classifier on what ``function`` makes of its images."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.norm, self.linear = function, nn.BatchNorm2d(3), nn.Linear(3 * 8 * 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.function(self.norm(x)).flatten(1))
        return logits


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: torch.cdist(x, x + 1), "its operator cdist"),
        (lambda x: torch._C._nn.hardsigmoid(x), "its operator hardsigmoid"),
        (_Once.apply, "its function _Once"),
    ],
)
def test_what_is_left_is_named_in_one_line(function: Callable[[Tensor], Tensor], told: str) -> None:
    layer = Layer(function).train()
    with pytest.raises(UserError, match=told) as error:
        check_twice_differentiable(layer, 8, "models/suspect (mine)")
    assert str(error.value).startswith("models/suspect (mine) cannot be differentiated twice")
    assert "\n" not in str(error.value)
    assert not layer.norm.get_buffer("running_mean").any(), "statistics are put back"


def _ibau(folder: Path, arch: str) -> Path:
    data = make_data(folder / "data", size=32)
    return make_experiment(
        folder,
        "ibau",
        {
            "preset": "official",
            "model": make_classifier(folder / "model", size=32, arch=arch),
            "data": {"path": data, "max_samples": 8},
            "test": {"path": data},
            "rounds": 1,
            "batch_size": 4,
            "min_patched": 1,
            "attack": {"trigger": {"name": "badnets"}, "target_class": CLASSES - 1},
        },
    )


def test_ibau_runs_on_a_mobilenet(tmp_path: Path) -> None:
    assert main(["run", str(_ibau(tmp_path, "torchvision:mobilenet_v3_small"))]) == 0
    assert (tmp_path / "run" / "result.json").is_file()


def test_a_dry_run_finds_a_layer_without_second_derivative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _ibau(tmp_path, "small_resnet")
    monkeypatch.setattr(functional, "relu", torch._C._nn.hardsigmoid)
    assert main(["run", str(config), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "model (small_resnet) cannot be differentiated twice" in told and "hardsigmoid" in told


def test_so_does_one_of_self_retrospection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("ood", tmp_path) | {"retrospection": {"start": 1}}
    config = make_experiment(tmp_path, "ood", options)
    assert main(["run", str(config), "--dry-run"]) == 0
    monkeypatch.setattr(functional, "relu", torch._C._nn.hardsigmoid)
    assert main(["run", str(config), "--dry-run"]) == 2
    assert "the student small_resnet cannot be differentiated twice" in capsys.readouterr().err
