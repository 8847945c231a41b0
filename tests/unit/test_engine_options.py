"""LARS, recomputed activations and compiled blocks: the same numbers by other means."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dist_defend.batch import Batch
from dist_defend.engine import dist
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import Lars, OptimizerConfig, UpdateConfig, build_optimizer
from dist_defend.engine.step import GradientStep, Position
from dist_defend.errors import UserError
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.blocks import repeated_blocks
from dist_defend.models.encoder import build_simclr


def test_lars_is_the_published_update() -> None:
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(
        [weight, bias], OptimizerConfig("lars", lr=2.0, momentum=0.5, weight_decay=0.1, trust=0.01)
    )
    for gradient in ([0.0, 2.0], [1.0, 0.0]):
        velocities = [optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).clone() for p in (weight, bias)]
        before = weight.detach().clone()
        weight.grad, bias.grad = torch.tensor([gradient]), torch.tensor([0.5])
        rate = 0.01 * before.norm() / (weight.grad.norm() + 0.1 * before.norm())
        expected = 0.5 * velocities[0] + 2.0 * rate * (weight.grad + 0.1 * before)
        old_bias = bias.detach().clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), before - expected)
        torch.testing.assert_close(bias.detach(), old_bias - (0.5 * velocities[1] + 2.0 * 0.5))


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_takes_plain_steps_where_a_norm_is_zero(zero: str) -> None:
    weight = nn.Parameter(torch.full((1, 2), float(zero != "weight")))
    optimizer = Lars([weight], lr=1.0, momentum=0.9, weight_decay=0.0, trust=0.01)
    weight.grad = torch.full((1, 2), float(zero != "gradient"))
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before - weight.grad)


def test_lars_leaves_everything_where_the_gradient_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(1, 2))
    optimizer = Lars([weight], lr=1.0, momentum=0.9, weight_decay=0.1, trust=0.01)
    weight.grad, optimizer.found_inf = torch.full((1, 2), torch.nan), torch.tensor(1.0)
    optimizer.step()
    assert weight.tolist() == [[1.0, 1.0]]
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [[0.0, 0.0]]


def trained(arch: str, size: int, precision: str = "fp64", **options: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final state (float64) of three SimCLR updates."""
    torch.manual_seed(0)
    model = build_simclr(arch, "none", image_size=size)
    update = UpdateConfig(epochs=1, optimizer=OptimizerConfig("sgd", lr=0.1, momentum=0.9), **options)
    step = GradientStep(SimCLRObjective(model, 0.5), update, dist.start(precision, None), steps_per_epoch=3)
    views = torch.rand(2, 4, 3, size, size, dtype=step.objective.get_parameter("model.g.0.weight").dtype)
    batch = Batch(tuple(views), torch.zeros(4).long(), torch.arange(4))
    losses = [step(batch, Position(batch=number))["loss"].item() for number in range(3)]
    return losses, {key: value.double() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(("arch", "size"), [("small_cifar", 16), ("timm:vit_tiny_patch16_224", 32)])
def test_recomputed_activations_change_nothing(arch: str, size: int) -> None:
    """Nor the statistics of batch norm, which see each batch once."""
    losses, state = trained(arch, size)
    again_losses, again = trained(arch, size, recompute=True)
    assert again_losses == losses
    assert all(again[key].equal(value) for key, value in state.items())
    assert losses[2] != losses[0]


def test_recomputing_keeps_fewer_tensors() -> None:
    def bytes_kept(**options: Any) -> int:
        torch.manual_seed(0)
        model = build_simclr("timm:vit_tiny_patch16_224", "none", image_size=64)
        update = UpdateConfig(epochs=1, **options)
        step = GradientStep(SimCLRObjective(model, 0.5), update, dist.start("fp32", None), steps_per_epoch=1)
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = Batch(tuple(torch.rand(2, 4, 3, 64, 64)), torch.zeros(4).long(), torch.arange(4))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = step.objective(batch)["loss"]  # alive, or its tensors' memory would be used again
        assert loss.isfinite()
        return sum(kept.values()) - sum(p.nbytes for p in model.parameters())

    assert bytes_kept(recompute=True) < 0.5 * bytes_kept()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch by torch
def test_compiled_blocks_train_alike() -> None:
    losses, _ = trained("small_cifar", 16, "fp32")
    before = counters["stats"]["unique_graphs"]
    compiled, _ = trained("small_cifar", 16, "fp32", compile=True)
    assert counters["stats"]["unique_graphs"] > before
    assert compiled == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("key", ["recompute", "compile"])
def test_a_network_without_blocks_says_so(key: str) -> None:
    class Flat(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(2, 2)

    options: dict[str, Any] = {key: True}
    with pytest.raises(UserError, match="has no repeated blocks"):
        GradientStep(Flat(), UpdateConfig(**options), dist.start("fp32", None), steps_per_epoch=1)


@pytest.mark.parametrize(
    ("arch", "count", "kind"),
    [
        ("small_cifar", 4, "BasicBlock"),
        ("resnet50_cifar", 16, "Bottleneck"),
        ("timm:resnet50", 16, "Bottleneck"),
        ("timm:vit_tiny_patch16_224", 12, "Block"),
    ],
)
def test_blocks_are_the_innermost_alike_ones(arch: str, count: int, kind: str) -> None:
    blocks = repeated_blocks(build_simclr(arch, image_size=32))
    assert [type(block).__name__ for block in blocks] == [kind] * count
