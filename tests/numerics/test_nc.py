"""Neural Cleanse's search and decision against what the published code gave, epoch by epoch."""

from typing import Any

import pytest
import torch

from dist_defend.batch import Batch
from dist_defend.engine import dist
from dist_defend.engine.step import Position
from dist_defend.methods.defend.nc.search import SearchConfig, SearchStep, anomaly_indices
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.pixel_space import normalization_constants
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden


def make_search(case: dict[str, Any], classes: list[int], **changes: Any) -> tuple[SearchStep, list[Batch]]:
    """The recorded images were normalised already; here they are in units of pixels."""
    model: Classifier = build_classifier("preact_resnet18", 10, "cifar10_backdoorbench").double()
    det_init(model.net, case["seed"])
    mean, std = (
        torch.tensor(row, dtype=torch.float64).view(1, 3, 1, 1)
        for row in normalization_constants("cifar10_backdoorbench")
    )
    model.normalize.mean, model.normalize.std = mean, std  # the program keeps them in float32
    config = SearchConfig(
        epochs=case["epochs"], lr=case["lr"], cost=case["cost"], threshold=case["threshold"], patience=case["patience"],
        multiplier=case["mult"], early_patience=case["early_stop_patience"], normalise_first_rows=True, **changes,
    )  # fmt: skip
    step = SearchStep(model, config, classes, dist.start("fp64", None), num_batches=2)
    batches = []
    for number in range(2):
        images = det_images((case["batch"], 3, 32, 32), case["images"] + number) * std + mean
        batches.append(Batch((images,), torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))))
    return step, batches


def test_the_search_of_a_class() -> None:
    case = golden("baselines")["nc"]
    step, batches = make_search(case, [case["label"]])
    start = step.triggers()
    assert_fingerprint(start[0], case["start"]["mask"])
    assert start[0].flatten()[0].item() == pytest.approx(case["start"]["mask_value"], rel=1e-12)
    for epoch, expected in enumerate(case["epochs_run"]):
        for number, batch in enumerate(batches):
            step(batch, Position(epoch=epoch, batch=number))
        assert step.end_epoch() is expected["stopped"]
        assert step.cost.item() == pytest.approx(expected["cost_after"], rel=1e-12)
        best = step.best.item()
        assert best == (float("inf") if expected["reg_best"] is None else pytest.approx(expected["reg_best"], rel=1e-9))
        assert {n: int(step.counters[n]) for n in ("up", "down", "early")} == {
            n: expected[n] for n in ("up", "down", "early")
        }
        assert_fingerprint(step.a, expected["mask_tanh"])
        assert_fingerprint(step.b, expected["pattern_tanh"])
        mask, pattern = step.triggers()
        assert_fingerprint(mask, expected["mask"])
        if expected["best_mask"] is not None:
            assert_fingerprint(step.masks, expected["best_mask"])
        with torch.no_grad():
            stamped = (1 - mask) * batches[0].images + mask * pattern
            assert_fingerprint(step.model(stamped), expected["logits"])


def test_flagged_classes() -> None:
    for case in golden("baselines")["nc"]["outliers"]:
        norms = torch.tensor(case["norms"], dtype=torch.float64)
        index = anomaly_indices(norms)
        flagged = [[k, norms[k].item()] for k in sorted(range(10), key=lambda k: -index[k].item()) if index[k] > 2]
        assert flagged == case["flagged"]


@pytest.mark.parametrize("name", ["anomaly_a", "anomaly_b"])
def test_ssl_cleanses_index_is_this_one_corrected_twice(name: str) -> None:
    """It divides the deviation by 0.6745 once more, and takes the smallest value's."""
    case = golden("encoder_attacks")["rest"][name]
    values = torch.tensor(case["values"], dtype=torch.float64)
    assert values.median().item() == pytest.approx(case["median"], rel=1e-12)
    index = anomaly_indices(values)[values.argmin()].item()
    assert 0.6745 * index == pytest.approx(case["anomaly"], rel=1e-9)


def test_classes_side_by_side_are_classes_alone() -> None:
    case = golden("baselines")["nc"]
    together, batches = make_search(case, [3, 9, 0], classes_at_once=2)
    alone = [make_search(case, [k])[0] for k in (3, 9, 0)]
    costs = torch.tensor([1e-3, 2e-2, 0.1], dtype=torch.float64)
    together.cost.copy_(costs)
    for step, cost in zip(alone, costs, strict=True):
        step.cost.fill_(cost)
    for epoch in range(2):
        for step in (together, *alone):
            for number, batch in enumerate(batches):
                step(batch, Position(epoch=epoch, batch=number))
            step.end_epoch()
    for name in ("a", "b", "cost", "masks", "best"):
        torch.testing.assert_close(
            getattr(together, name), torch.cat([getattr(step, name) for step in alone]), rtol=1e-9, atol=1e-12
        )
