"""RNP's two updates in float64 against what the published code (bboylyg/RNP) gives, to 1e-9; with mutations."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.engine import dist
from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.step import Position
from dist_defend.engine.update import Update
from dist_defend.methods.defend.rnp.steps import CrossEntropyStep, RecoverStep, UnlearnStep
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.masked_norm import mask_norms, norm_names
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden
from tests.steps import positions

CASE = golden("rnp")["default"]
Mutation = Callable[[pytest.MonkeyPatch], None]


def none(patch: pytest.MonkeyPatch) -> None:
    """What is under test."""


def descend(patch: pytest.MonkeyPatch) -> None:
    """Unlearning that minimises."""
    scale_unlearning(patch, 1.0)


def scale_unlearning(patch: pytest.MonkeyPatch, factor: float) -> None:
    original = CrossEntropyStep.__init__

    def build(self: CrossEntropyStep, *arguments: Any, scale: float, **options: Any) -> None:
        original(self, *arguments, scale=factor if scale < 0 else scale, **options)

    patch.setattr(CrossEntropyStep, "__init__", build)


def without_alpha(patch: pytest.MonkeyPatch) -> None:
    original = CrossEntropyStep.__init__

    def build(self: CrossEntropyStep, *arguments: Any, scale: float, **options: Any) -> None:
        original(self, *arguments, scale=min(scale * 5, 1.0), **options)

    patch.setattr(CrossEntropyStep, "__init__", build)


def without_clamp(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RecoverStep, "_after_update", lambda self: None)


def without_decay(patch: pytest.MonkeyPatch) -> None:
    original = CrossEntropyStep.__init__

    def build(self: CrossEntropyStep, *arguments: Any, weight_decay: float, **options: Any) -> None:
        original(self, *arguments, weight_decay=0.0, **options)

    patch.setattr(CrossEntropyStep, "__init__", build)


def clipped(patch: pytest.MonkeyPatch) -> None:
    """The clipping that the published code means but does not do."""

    original = Update.step
    patch.setattr(Update, "step", lambda self, gradients, max_norm: original(self, gradients, 0.5))


def batches() -> list[Batch]:
    size, count = CASE["batch_size"], CASE["num_batches"]
    images = det_images((size * count, 3, 32, 32), CASE["seed"] + 1)
    labels = torch.tensor(CASE["labels"])
    return [Batch((x,), y, torch.arange(size)) for x, y in zip(images.split(size), labels.split(size), strict=True)]


def classifier() -> Classifier:
    model = build_classifier("resnet18", 10, "none").double()
    det_init(model.net, CASE["seed"])
    return model


def unlearned(mutate: Mutation = none, steps: int = 3) -> tuple[list[float], Classifier]:
    """Cross-entropies of the first steps of one pass of unlearning, and the model after them."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        model = classifier()
        step = UnlearnStep(model, dist.start("fp64", None), lr=CASE["unlearning_lr"])
        return [step(batch, Position())["cross_entropy"].item() for batch in batches()[:steps]], model


@pytest.fixture(scope="module")
def unlearning() -> tuple[list[float], Classifier]:
    return unlearned()


def check_recovering(unlearned: Classifier, mutate: Mutation = none, steps: int = 6) -> dict[str, nn.Parameter]:
    """Two passes of recovering, losses and sums of masks compared after each step."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        model = classifier()
        masks = mask_norms(model.net, norm_names(model.net))
        model.load_state_dict(unlearned.state_dict())
        step = RecoverStep(model, masks, dist.start("fp64", None), alpha=CASE["alpha"], lr=CASE["recovering_lr"])
        for number, batch in enumerate([*batches(), *batches()][:steps]):
            assert step(batch, Position())["loss"].item() == pytest.approx(CASE["recover_loss"][number], rel=1e-9)
            values = torch.cat([mask.detach() for mask in masks.values()])
            expected = CASE["mask_sum_and_min"][number]
            assert [values.sum().item(), values.min().item()] == pytest.approx(expected, rel=1e-9)
        return masks


def test_published_unlearning(unlearning: tuple[list[float], Classifier]) -> None:
    losses, model = unlearning
    assert losses == pytest.approx(CASE["unlearn_loss"], rel=1e-9)
    for key, value in CASE["params_after_unlearn"].items():
        assert_fingerprint(model.net.state_dict()[key], value, what=key)


def test_published_recovering(unlearning: tuple[list[float], Classifier]) -> None:
    masks = check_recovering(unlearning[1])
    assert list(masks) == list(CASE["masks"])
    for name, value in CASE["masks"].items():
        assert_fingerprint(masks[name], value, what=name)
    assert masks["bn1"].tolist() == pytest.approx(CASE["mask_bn1"], rel=1e-9)


@pytest.mark.parametrize("mutate", [descend, without_decay, clipped])
def test_the_losses_of_unlearning_catch(mutate: Mutation) -> None:
    losses, _ = unlearned(mutate, steps=2)
    assert losses[0] == pytest.approx(CASE["unlearn_loss"][0], rel=1e-9)
    assert losses[1] != pytest.approx(CASE["unlearn_loss"][1], rel=1e-7)


@pytest.mark.parametrize("mutate", [without_alpha, without_clamp])
def test_recovering_catches(mutate: Mutation, unlearning: tuple[list[float], Classifier]) -> None:
    with pytest.raises(AssertionError):
        check_recovering(unlearning[1], mutate, steps=1)


def test_one_unlearning_step_by_hand() -> None:
    """w <- w - lr (-grad CE + wd w): no clipping, as the published code clips gradients that are still empty."""
    batch = batches()[0]
    model, twin = (build_classifier("small_resnet", 10, "none").double() for _ in range(2))
    for each in (model, twin):
        det_init(each, 5)
    twin.train()
    functional.cross_entropy(twin(batch.images), batch.labels).backward()
    UnlearnStep(model, dist.start("fp64", None), lr=0.01)(batch, Position())
    for mine, (name, theirs) in zip(model.parameters(), twin.named_parameters(), strict=True):
        assert theirs.grad is not None
        expected = theirs.detach() - 0.01 * (-theirs.grad + 5e-4 * theirs.detach())
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-12, atol=1e-14, msg=name)


def test_rates_fall_at_the_milestones() -> None:
    model = build_classifier("small_resnet", 10, "none").double()
    step = UnlearnStep(model, dist.start("fp64", None), lr=0.01, schedule=(1, 3))
    rates = []
    for at in islice(positions(2), 8):
        step(batches()[0], at)
        rates.append(step.update.rate)
    assert rates == pytest.approx([0.01] * 2 + [0.001] * 4 + [0.0001] * 2)


def test_gradients_can_be_clipped() -> None:
    model, twin = (build_classifier("small_resnet", 10, "none").double() for _ in range(2))
    twin.load_state_dict(model.state_dict())
    before = [p.detach().clone() for p in model.parameters()]
    UnlearnStep(model, dist.start("fp64", None), max_grad_norm=1e-3, weight_decay=0.0, lr=1.0)(batches()[0], Position())
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


class AllGradients(RecoverStep):
    """As published: every weight gets a gradient that nobody uses."""

    def __init__(self, model: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        model.requires_grad_(True)


def recovered(kind: type[RecoverStep], dtype: torch.dtype) -> Tensor:
    model = build_classifier("small_resnet", 10, "none").to(dtype)
    det_init(model, 3)
    masks = mask_norms(model.net, norm_names(model.net))
    step = kind(model, masks, dist.start("fp64", None))
    for batch in batches():
        step(batch._replace(views=(batch.images.to(dtype),)), Position())
    return torch.cat([mask.detach() for mask in masks.values()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frozen_weights_give_bitwise_the_same_masks(dtype: torch.dtype) -> None:
    frozen, everything = recovered(RecoverStep, dtype), recovered(AllGradients, dtype)
    assert frozen.min() < 1 and frozen.max() == 1
    assert torch.equal(frozen, everything)


def test_state_round_trip_continues_bitwise() -> None:
    ranks, (first, second, third) = dist.start("fp64", None), batches()
    one, other = (build_classifier("small_resnet", 10, "none").double() for _ in range(2))
    steps = [UnlearnStep(model, ranks, schedule=(1,)) for model in (one, other)]
    steps[0](first, Position())
    steps[0](second, Position(batch=1))
    steps[1].load_state_dict(steps[0].state_dict())
    for step in steps:
        step(third, Position(epoch=1))
    assert steps[0].read_accuracy() == steps[1].read_accuracy()
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_running_accuracy_counts_predictions_before_each_update() -> None:
    model = build_classifier("small_resnet", 10, "none").double()
    step = UnlearnStep(model, dist.start("fp64", None), lr=1e-12, weight_decay=0.0)
    hits = 0
    for batch in batches():
        step(batch, Position())
    with torch.no_grad():
        hits = sum(int((model.train()(b.images).argmax(1) == b.labels).sum()) for b in batches())
    assert step.read_accuracy() == hits / len(CASE["labels"])
    assert step.seen == 0


def test_divergence_is_told() -> None:
    model = build_classifier("small_resnet", 10, "none").double()
    step = UnlearnStep(model, dist.start("fp64", None))
    with torch.no_grad():
        model.get_parameter("net.linear.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        step(batches()[0], Position())
