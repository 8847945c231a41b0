"""The vaccine's and self-retrospection's parts, the generators and statistics, by what must hold for each."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.errors import UserError
from dist_defend.methods.defend.abd import vaccine
from dist_defend.methods.defend.abd.diagnosis import auc
from dist_defend.methods.defend.abd.options import RetrospectionConfig, VaccineConfig
from dist_defend.methods.defend.abd.retrospection import SelfRetrospection
from dist_defend.methods.defend.abd.vaccine import ShuffledEnsemble, Vaccine, suppression, tail_ratio
from dist_defend.models.batch_statistics import repeated_statistics
from dist_defend.models.classifier import build_classifier
from dist_defend.models.generator import CMIGenerator, ZSKTGenerator
from dist_defend.models.pixel_space import Normalize
from dist_defend.models.wide_resnet import WideResNet
from dist_defend.ops.losses import distillation, divergence_rows

BLOCK_3 = [f"block3.layer.{n}.weight" for n in ("0.conv1", "0.conv2", "0.convShortcut", "1.conv1", "1.conv2")]


def teacher_of(arch: str, size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    net = build_classifier(arch, 4, "none", size).net.double()
    with torch.no_grad():
        net.train()(torch.randn(16, 3, size, size, dtype=torch.float64))
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_shuffling_permutes_the_inputs_of_the_last_convolutions() -> None:
    teacher = teacher_of("wrn_16_1")
    ensemble = ShuffledEnsemble(teacher, VaccineConfig(), seed=3)
    assert ensemble.shuffled == BLOCK_3
    before = teacher.state_dict()
    for member in ensemble.members:
        for name, value in member.state_dict().items():
            assert value.equal(before[name]) == (name not in BLOCK_3), name
            if name in BLOCK_3:
                assert value.sort(dim=1).values.equal(before[name].sort(dim=1).values)
    first, second = (member.state_dict()[BLOCK_3[0]] for member in ensemble.members[:2])
    assert not first.equal(second)


def test_a_shuffle_can_be_undone_on_the_channels(images: Tensor) -> None:
    """W[:, p] of channels x[p] is W of x, bit for bit when it is put back."""
    teacher = teacher_of("wrn_16_1")
    ensemble = ShuffledEnsemble(teacher, VaccineConfig(members=1), seed=3)
    (member,), ensemble.shuffles = ensemble.members, 0
    for layer, name in enumerate(BLOCK_3):
        weight = member.state_dict()[name]
        order = ensemble.permutation(0, layer, weight.shape[1])
        weight.copy_(weight[:, order.argsort()])
    assert member(images).equal(teacher(images))


@pytest.mark.parametrize(
    ("arch", "layers", "first"),
    [("wrn_16_1", 5, 2), ("wrn_16_1", 2, 2), ("wrn_16_1", 6, 1), ("wrn_10_1", 5, 1), ("wrn_16_1", 99, None),
     ("small_resnet", 3, None), ("ibau_vgg", 2, None)],
)  # fmt: skip
def test_sharing_the_teachers_pass_is_exact(arch: str, layers: int, first: int | None, images: Tensor) -> None:
    teacher = teacher_of(arch)
    ensemble = ShuffledEnsemble(teacher, VaccineConfig(layers=layers), seed=3)
    assert ensemble.first_group == first
    logits, shuffled = ensemble(images)
    torch.testing.assert_close(logits, teacher(images), rtol=1e-12, atol=0)
    whole = torch.stack([member(images) for member in ensemble.members]).mean(0)
    torch.testing.assert_close(shuffled, whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(shuffled, logits)


def test_no_shuffled_layer_is_the_teacher_and_suppresses_nothing(images: Tensor) -> None:
    logits, shuffled = ShuffledEnsemble(teacher_of("wrn_10_1"), VaccineConfig(layers=0), seed=3)(images)
    torch.testing.assert_close(shuffled, logits, rtol=1e-12, atol=0)
    assert suppression(logits, shuffled).item() == pytest.approx(0, abs=1e-15)


def test_members_pass_no_gradient_where_they_are_not_to(images: Tensor) -> None:
    slopes = []
    for through in (True, False):
        config = VaccineConfig(through_members=through)
        ensemble = ShuffledEnsemble(teacher_of("wrn_16_1"), config, seed=3)
        x = images.clone().requires_grad_()
        logits, shuffled = ensemble(x)
        assert shuffled.requires_grad == through
        slopes.append(torch.autograd.grad(suppression(logits, shuffled), x)[0])
    with_members, without = slopes
    assert not torch.allclose(with_members, without)


def test_suppression_counts_only_agreeing_images() -> None:
    teacher = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    shuffled = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    wanted = divergence_rows(shuffled, teacher)[[0, 2]].mean() / 2
    assert suppression(teacher, shuffled).item() == pytest.approx(wanted.item())
    assert suppression(teacher[1:2], shuffled[1:2]).item() == 0


def test_tail_ratio() -> None:
    normal = 10 ** torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert tail_ratio(normal, torch.ones_like(normal)).item() == pytest.approx(0.00135, abs=3e-4)
    tail = torch.cat([torch.full((30,), -3.0), 0.1 * torch.randn(970, generator=torch.Generator().manual_seed(0))])
    assert tail_ratio(10**tail, torch.ones(1000)).item() == pytest.approx(0.03)
    weights = torch.cat([torch.ones(500), torch.full((500,), 10.0)])
    repeated = 10 ** torch.cat([tail[:500], tail[500:].repeat(10)])
    once, often = tail_ratio(10**tail, weights), tail_ratio(repeated, torch.ones(len(repeated)))
    assert once.item() == pytest.approx(often.item()) and once < 0.03
    assert tail_ratio(torch.zeros(50), torch.ones(50)).item() == 0  # no infinite logarithm


@pytest.mark.parametrize(("accepted_at", "scorings"), [(1, 1), (3, 3), (8, 8), (99, 8)])
def test_selection(accepted_at: int, scorings: int, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def ratio(divergences: Tensor, weights: Tensor) -> Tensor:
        seen.append((len(divergences), weights.tolist(), found.ensemble.shuffles))
        return torch.tensor(0.021 if len(seen) == accepted_at else 0.02)

    monkeypatch.setattr(vaccine, "tail_ratio", ratio)
    found = Vaccine(teacher_of("wrn_16_1"), VaccineConfig(selection_batches=5), seed=0)
    assert found.is_selecting and not found.is_used
    found.keep(images)
    found.keep(images[:2], 10)
    found.select()
    assert len(seen) == scorings
    assert [shuffles for *_, shuffles in seen] == list(range(1, scorings + 1))  # on top of the former, never undone
    assert seen[0][:2] == (7, [1.0] * 5 + [10.0] * 2)
    assert found.outcome()["decision"] == ("accepted" if accepted_at <= 8 else "rejected")
    assert len(found.outcome()["tail_ratios"]) == scorings
    assert found.is_used == (accepted_at <= 8) and not found.is_selecting


def test_a_vaccine_resumes(images: Tensor) -> None:
    def fresh() -> Vaccine:
        return Vaccine(teacher_of("wrn_16_1"), VaccineConfig(selection_batches=5), seed=0)

    whole, first, second = fresh(), fresh(), fresh()
    for found in (whole, first):
        found.ensemble.shuffle()
        found.keep(images, 2)
    second.load_state_dict(first.state_dict())
    for found in (whole, second):
        found.keep(images + 1)
        found.select()
    assert whole.outcome() == second.outcome() and len(whole.scores) == 8
    for one, other in zip(whole.ensemble.members, second.ensemble.members, strict=True):
        assert all(a.equal(b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def retrospection(**options: Any) -> SelfRetrospection:
    student, teacher = teacher_of("wrn_10_1").train().requires_grad_(True), teacher_of("wrn_16_1")
    teacher.state_dict()["fc.weight"].mul_(30)  # as sure of itself as a trained one
    config = RetrospectionConfig(**options)
    return SelfRetrospection(config, student, teacher, distillation, seed=0, batch_size=5)


def test_from_exactly_zero_delta_does_not_move(images: Tensor) -> None:
    """In float64 no rounding error is large enough; a small draw leaves at once."""
    norms = []
    for init in ("zero", "small"):
        found = retrospection(delta_init=init, inner_rounds=2)
        norms.append(found.synthesise(images, found.teacher(images), found.start(8, 0)).norm().item())
    assert norms[0] < 1e-3
    assert norms[1] > 0.5


def test_starts_of_delta_differ_between_batches_and_are_small() -> None:
    starts = [retrospection().start(8, number) for number in range(3)]
    assert not starts[0].equal(starts[1]) and starts[0].equal(retrospection().start(8, 0))
    assert all(0 < start.abs().max() < 0.01 for start in starts)


def test_delta_changes_predictions_more_and_more(images: Tensor) -> None:
    values = []
    for rounds in (1, 4, 8):
        found = retrospection(inner_rounds=rounds, inner_lr=0.01, synthesis_penalty=0.0)
        reference = found.teacher(images)
        moved = found.synthesise(images, reference, found.start(8, 0))
        values.append(distillation(found.teacher(images + moved), reference).item())
    assert 0 < values[0] < values[1] < values[2]


def test_without_patched_images_there_is_no_hypergradient(images: Tensor) -> None:
    found = retrospection(min_patched=0)
    mask = found.patched(slice(0, 5), 0, 0)
    assert mask.sum() == 0  # 2 % of five
    logits = found.student(images)
    result, told = found.hypergradient(images, logits, found.start(8, 0), mask)
    assert max(part.abs().max().item() for part in result.total) < 1e-12
    assert told["outer_loss"].abs() < 1e-15


def test_patched_images() -> None:
    found = retrospection(patched_fraction=0.4)
    masks = [found.patched(slice(0, 5), 1, step).flatten().tolist() for step in range(20)]
    assert all(sum(mask) == 2 for mask in masks)
    assert len({tuple(mask) for mask in masks}) > 4
    halves = [found.patched(part, 1, 0).flatten().tolist() for part in (slice(0, 3), slice(3, 5))]
    assert halves[0] + halves[1] == masks[0]
    assert retrospection().config.num_patched(128) == 2 and retrospection().config.num_patched(5) == 1


@pytest.mark.parametrize(
    ("generator", "parameters", "size"),
    [
        (ZSKTGenerator(), 1_051_145, 32),
        (ZSKTGenerator(100, 24, 32), 130_825, 24),
        (ZSKTGenerator(100, 24, 32, is_grey=True), 130_531, 24),
        (CMIGenerator(), 2_328_899, 32),
    ],
)
def test_generators(generator: nn.Module, parameters: int, size: int) -> None:
    is_pixels = isinstance(generator, CMIGenerator)
    images = generator(torch.randn(4, 256 if is_pixels else 100, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (4, 3, size, size)
    assert sum(p.numel() for p in generator.parameters()) == parameters
    if getattr(generator, "is_grey", False):
        assert torch.equal(images, images[:, :1].expand_as(images))
    if is_pixels:
        assert images.min() >= 0 and images.max() <= 1
    else:
        assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
        assert images.var((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, rel=1e-3)


@pytest.mark.parametrize("is_grey", [True, False])
def test_a_bounded_generator_makes_pixels(is_grey: bool) -> None:
    normalize = Normalize("fashion_mnist")
    plain, bounded = (ZSKTGenerator(7, 16, 4, is_grey, pixels).double() for pixels in (None, normalize))
    assert plain.state_dict().keys() == bounded.state_dict().keys()
    bounded.load_state_dict(plain.state_dict())
    z = torch.randn(9, 7, dtype=torch.float64)
    pixels = bounded(z) * normalize.std + normalize.mean
    torch.testing.assert_close(pixels, 1 / (1 + torch.exp(1 - 2 * plain(z))), rtol=1e-12, atol=1e-15)
    bounded.layers.get_parameter(f"{len(bounded.layers) - 1}.weight").data.fill_(100.0)  # h far from 0
    extreme = bounded(z) * normalize.std + normalize.mean
    assert extreme.min() > -1e-6 and 0.99 < extreme.max() < 1 + 1e-6


@pytest.mark.parametrize("size", [30, 4])
def test_a_generator_doubles_twice(size: int) -> None:
    with pytest.raises(UserError, match=f"images of {size} px cannot be generated"):
        ZSKTGenerator(image_size=size)


@pytest.mark.parametrize("times", [0, 1, 10])
def test_statistics_as_of_repeated_passes(times: int, images: Tensor) -> None:
    one, other = WideResNet(10, 1, 4).double(), WideResNet(10, 1, 4).double()
    other.load_state_dict(one.state_dict())
    for _ in range(times):
        one(images)
    with repeated_statistics(other, times):
        other(images)
    assert {module.momentum for module in other.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if "running" in name:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_divergences() -> None:
    student, teacher = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = (logits.softmax(1).numpy() for logits in (teacher / 2, student / 2))
    rows = (p * np.log(p / q)).sum(1)
    assert distillation(student, teacher, 2.0).item() == pytest.approx(rows.mean() / 4)
    assert distillation(student, teacher, 2.0, "batchmean").item() == pytest.approx(rows.mean() * 4)
    assert distillation(student, teacher, 2.0, batch_size=12).item() == pytest.approx(rows.sum() / 48)
    assert distillation(teacher, teacher).item() == pytest.approx(0, abs=1e-15)


def test_auc() -> None:
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1
    assert auc(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])) == pytest.approx(2.5 / 4)  # one tie
