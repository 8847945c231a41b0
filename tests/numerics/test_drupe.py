"""DRUPE's terms, losses, gradients and costs against what the published code gave, and where they are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_defend.attacks.reference import ReferenceConfig
from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine import dist
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import Position
from dist_defend.methods.attack import drupe
from dist_defend.methods.attack.badencoder import BadEncoderObjective
from dist_defend.methods.attack.drupe import LOSSES, Config, DrupeObjective, DrupeStep
from dist_defend.models.artifact import load_simclr
from dist_defend.ops.losses import sliced_wasserstein
from tests.numerics.det import assert_fingerprint, det_images, golden
from tests.numerics.test_method_steps import Fixed
from tests.runs import make_experiment, options_of

GOLDEN = golden("encoder_attacks")["drupe"]
MODES = [name for name in GOLDEN if not name.startswith("costs")]
TERMS = {
    "effectiveness": "effectiveness", "reference_fidelity": "reference_fidelity", "utility": "utility",
    "imbalance": "std_refs", "reference_similarity": "reference_similarity", "similarity": "triggered_similarity",
    "distance": "sliced_wasserstein",
}  # fmt: skip


def config_of(**options: Any) -> Config:
    return Config("clean", DatasetConfig("shadow"), ReferenceConfig("r.npz"), **options)


def parts_of(case: dict[str, Any]) -> tuple[list[Any], Batch]:
    """What an objective gets, with linear encoders, and a batch."""
    seed, count, width = case["seed"], case["K"], case["inputs"]
    clean, trained = (nn.Linear(width, case["features"], bias=False).double() for _ in range(2))
    for number, encoder in enumerate((clean, trained)):
        encoder.weight.data.copy_(det_images((case["features"], width), seed + number) / width**0.5)
    x, stamped = (det_images((case["batch"], width), seed + number) for number in (2, 3))
    drawn = [det_images((1, width), seed + 10 + k) for k in range(count)]
    if case["ref_scale"] is not None:
        drawn = [det_images((1, width), seed + 10) + case["ref_scale"] * reference for reference in drawn]
    references = torch.cat(drawn)
    augmented = [det_images((case["batch"], width), seed + 20 + k) for k in range(count)]
    with torch.no_grad():
        features, reference_features = functional.normalize(clean(x), dim=1), clean(references)
    batch = Batch((x, *augmented), torch.zeros(len(x)).long(), torch.arange(len(x)))
    return [trained, [Fixed(stamped)], references, reference_features, features.__getitem__], batch


def objective_of(case: dict[str, Any], parts: list[Any], **options: Any) -> DrupeObjective:
    terms: Any = {"wb": "wasserstein", "badencoder": "nearest"}.get(case["mode"], case["mode"])
    costs = {"cost": case["cost"], "distance_cost": case["cost_1"]}
    lambdas = {key: case[key] for key in ("lambda1", "lambda2")}
    objective = DrupeObjective(*parts, config=config_of(terms=terms, **(costs | lambdas | options)), seed=0)
    objective.at = Position(epoch=case["epoch"] - 1)
    directions = functional.normalize(det_images((case["features"], 50), case["seed"] + 30), dim=0)
    objective.directions = lambda features: directions  # type: ignore[method-assign]
    return objective


@pytest.mark.parametrize("name", MODES)
def test_terms_losses_gradients_and_updates(name: str) -> None:
    case = GOLDEN[name]
    parts, batch = parts_of(case)
    objective = objective_of(case, parts)
    found = objective(batch)
    for own, key in TERMS.items():
        assert found[own].item() == pytest.approx(case[key], rel=1e-9), own
    deviation = case["sliced_wasserstein"] / case["clean_deviation"]
    assert found["relative_distance"].item() == pytest.approx(deviation, rel=1e-9)
    assert found["loss"].item() == pytest.approx(case["loss"], rel=1e-9)
    (gradient,) = torch.autograd.grad(found["loss"], [parts[0].weight])
    assert_fingerprint(gradient, case["grad"])
    sgd = OptimizerConfig("sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)
    step = DrupeStep(objective, UpdateConfig(epochs=1, optimizer=sgd), dist.start("fp64", None), steps_per_epoch=2)
    step(batch, objective.at)
    assert_fingerprint(parts[0].weight, case["after"])


@pytest.mark.parametrize(("name", "preset"), [("costs", "cifar10"), ("costs_clip", "clip"),
                                              ("costs_imagenet", "imagenet")])  # fmt: skip
def test_costs_follow_the_attack(name: str, preset: str) -> None:
    case, parts = GOLDEN[name], parts_of(GOLDEN["stage_2"])[0]
    objective = DrupeObjective(*parts, config=config_of(**drupe.PRESETS[preset]), seed=0)
    found = []
    for epoch, *losses, similarity in case["rows"]:
        for batch, shift in enumerate((-1e-3, 1e-3)):  # whose mean is the published one; the last S counts
            objective.at = Position(epoch=epoch - 1, batch=batch)
            told = dict(zip(LOSSES, torch.tensor(losses, dtype=torch.float64) + shift, strict=True))
            objective.follow(told | {"similarity": torch.tensor([9.0, similarity]).double()[batch]}, 2)
        found.append(objective.costs[:2].tolist())
    assert found == [pytest.approx(row, rel=1e-9) for row in case["costs"]]


def test_costs_follow_the_mean_of_an_epoch() -> None:
    """Of the losses; of S the last batch alone counts. The attack works on average here, but not in the last batch."""
    parts = parts_of(GOLDEN["stage_2"])[0]
    objective = DrupeObjective(*parts, config=config_of(adapt_after=0), seed=0)
    for batch, (loss, similarity) in enumerate([(-0.99, 9.0), (-0.95, 0.55)]):
        objective.at = Position(batch=batch)
        told = dict.fromkeys(LOSSES, torch.tensor(loss).double())
        objective.follow(told | {"similarity": torch.tensor(similarity).double()}, 2)
    assert objective.costs.tolist() == pytest.approx([0.125, 0.00125, 0.0], rel=1e-12)


def test_alike_references_are_badencoders_one() -> None:
    case = GOLDEN["stage_2"] | {"ref_scale": 0.0}
    parts, batch = parts_of(case)
    found = objective_of(case, parts)(batch)
    encoder, (trigger,), *rest = parts
    plain = BadEncoderObjective(encoder, [trigger] * 3, *rest)(batch)
    shared = BadEncoderObjective(encoder, [trigger], *rest)(batch)
    assert (found["imbalance"].item(), found["reference_similarity"].item()) == pytest.approx((0, 1), abs=1e-15)
    for name in LOSSES:
        assert found[name].item() == pytest.approx(plain[name].item(), rel=1e-12)
        assert shared[name].item() == pytest.approx(plain[name].item(), rel=1e-12)


def test_similarity_and_distance_where_they_are_known() -> None:
    case = GOLDEN["stage_2"]
    parts, batch = parts_of(case)
    unchanged = objective_of(case, [parts[0], [Fixed(batch.images)], *parts[2:]])(batch)
    assert unchanged["distance"].item() == 0
    one = objective_of(case, [parts[0], [Fixed(batch.images[:1].expand(6, -1))], *parts[2:]])(batch)
    assert one["similarity"].item() == pytest.approx(5 / 6, rel=1e-12)
    a, b, directions = (det_images(shape, seed) for seed, shape in enumerate([(6, 8), (6, 8), (8, 9)]))
    distance = sliced_wasserstein(a, b, directions).item()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert sliced_wasserstein(a[order], b, directions).item() == pytest.approx(distance, rel=1e-12)
    assert sliced_wasserstein(3 * a, 3 * b, directions).item() == pytest.approx(3 * distance, rel=1e-12)


def test_directions_are_unit_and_new_in_each_update() -> None:
    parts, batch = parts_of(GOLDEN["stage_2"])
    made = []
    for step in (0, 1, 0):
        objective = DrupeObjective(*parts, config=config_of(projections=7), seed=3)
        objective.at = Position(step=step)
        made.append(objective.directions(batch.images))
    assert made[0].shape == (12, 7) and made[0].equal(made[2]) and not made[0].equal(made[1])
    torch.testing.assert_close(made[0].norm(dim=0), torch.ones(7).double())


def test_a_run_goes_on_within_an_epoch() -> None:
    """Costs, their count and the epoch's sums are in the checkpoint."""
    case, ends = GOLDEN["stage_2"], []
    update = UpdateConfig(epochs=2, optimizer=OptimizerConfig("sgd", lr=0.05, momentum=0.9))
    options = {"spread_after": 0, "warm_up_epochs": 0, "adapt_after": 0, "effective_below": 1.0}
    state: dict[str, Any] = {}
    for start in (0, 4):
        parts, batch = parts_of(case)
        step = DrupeStep(objective_of(case, parts, **options), update, dist.start("fp64", None), steps_per_epoch=3)
        if start:
            step.load_state_dict(state)
        for number in range(start, 6):
            step(batch, Position(0, number // 3, number % 3, number))
            if number == 3:
                state = {part: copied(values) for part, values in step.state_dict().items()}
        ends.append((parts[0].weight, step.objective.costs))
    assert ends[0][0].equal(ends[1][0]) and ends[0][1].equal(ends[1][1])
    assert state["objective"]["sums"].count_nonzero() == 3 and ends[0][1][0] != case["cost"]


def copied(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: copied(value) for key, value in values.items()}
    return values.clone() if isinstance(values, Tensor) else values


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reference": {"dataset": "{data}", "target_class": 1}}, "key 'drupe.reference' gives 1 of classes [1]"),
        ({"reference": {"dataset": "{data}", "count": 99}}, "key 'reference.number' is 0 and 'count' 99"),
        ({"reference": {"file": "r.npz", "count": 2}}, "key 'drupe.reference.count' is 2, but all references of"),
        ({"one_trigger": False}, "key 'drupe.one_trigger' is false"),
        ({"projections": 0}, "key 'drupe.projections' is 0"),
    ],
)
def test_what_drupe_cannot_use(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("drupe", tmp_path) | changes
    if options["reference"].get("dataset"):
        options["reference"]["dataset"] = options["shadow"]["path"]
    assert main(["run", str(make_experiment(tmp_path, "drupe", options))]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_run_names_its_attack(tmp_path: Path) -> None:
    assert main(["run", str(make_experiment(tmp_path, "drupe", options_of("drupe", tmp_path)))]) == 0
    _, card = load_simclr(tmp_path / "run/model")
    assert card.backdoored and card.attack is not None and card.attack["target_class"] == 1
    assert (card.provenance["method"], card.provenance["target_classes"]) == ("drupe", [1, 1])
