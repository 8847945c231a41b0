"""I-BAU's inner pass in several orders: which delta goes on, against passes by hand; resuming; the note."""

import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.bench.published import ibau as reference
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.engine import checkpoint
from dist_defend.methods.defend.ibau.orders import Orders
from dist_defend.methods.defend.ibau.step import UnlearningStep
from tests.numerics.test_ibau_rounds import in_float64, make_step, options, run
from tests.runs import make_experiment, untimed

ORDERS = 4  # of three batches each


def passes(step: UnlearningStep, round_: int) -> list[list[reference.Batch]]:
    """(images, labels) of the batches of each inner pass, in float64."""
    batches = [in_float64(batch) for batch in step.rounds.epoch(round_)]
    number = step.rounds.batches
    inner = batches[: step.rounds.inner_batches]
    return [[(b.images, b.labels) for b in inner[at : at + number]] for at in range(0, len(inner), number)]


def by_hand(step: UnlearningStep, round_: int) -> list[Tensor]:
    """What the published inner pass makes of each order, with the step's weights as they are."""
    return [reference.inner_pass(step.model, batches, step.delta.device) for batches in passes(step, round_)]


def norms(deltas: list[Tensor]) -> list[float]:
    return [delta.norm().item() for delta in deltas]


def test_the_delta_of_the_largest_norm_goes_on(tmp_path: Path) -> None:
    """Two rounds in float64; the weights are those of a step of one order that is given this delta."""
    step, single = make_step(tmp_path / "orders", orders=ORDERS), make_step(tmp_path / "single")
    assert step.orders is not None and single.orders is None
    places = set()
    for round_ in range(2):
        deltas = by_hand(step, round_)
        largest = int(np.argmax(norms(deltas)))
        *before, last = run(step, ORDERS * 3, round_ * (ORDERS + 1) * 3)
        assert step.orders.norms[round_].tolist() == pytest.approx(norms(deltas), rel=1e-9)
        torch.testing.assert_close(step.delta.detach(), deltas[largest], rtol=1e-8, atol=1e-10)
        assert last["delta_norm"].item() == last["delta_norm_max"].item() == pytest.approx(max(norms(deltas)), rel=1e-9)
        assert last["delta_norm_min"].item() == pytest.approx(min(norms(deltas)), rel=1e-9)
        assert [row["delta_norm"].item() for row in before[2::3]] == pytest.approx(norms(deltas)[:-1], rel=1e-9)
        assert not any("delta_norm_min" in row for row in before)
        places |= {largest, int(np.argmin(norms(deltas)))}
        run(single, 3, round_ * 6)
        with torch.no_grad():
            single.delta.copy_(step.delta)
        outer = run(step, 3, round_ * (ORDERS + 1) * 3 + ORDERS * 3)
        assert [row["outer_loss"].item() for row in outer] == [
            row["outer_loss"].item() for row in run(single, 3, round_ * 6 + 3)
        ]
        assert all(torch.equal(a, b) for a, b in zip(step.parameters, single.parameters, strict=True))
    assert len(places) > 1


def test_orders_are_drawn_by_seed_round_and_number(tmp_path: Path) -> None:
    step = make_step(tmp_path, orders=ORDERS)
    rows = {
        (round_, number // 3): torch.cat([b.index for b in list(step.rounds.epoch(round_))[number : number + 3]])
        for round_ in range(2)
        for number in range(0, 15, 3)
    }
    published = list(range(11))
    assert {tuple(sorted(order.tolist())) for order in rows.values()} == {tuple(published)}
    for round_ in range(2):  # the first pass, and the outer one
        assert rows[round_, 0].tolist() == rows[round_, ORDERS].tolist() == published
    assert len({tuple(order.tolist()) for order in rows.values()}) == 1 + 2 * (ORDERS - 1)
    whole = [batch.index.tolist() for batch in step.rounds.epoch(1)]
    for start in range(len(whole)):
        assert [batch.index.tolist() for batch in step.rounds.epoch(1, start)] == whole[start:]
    again = make_step(tmp_path / "again", orders=ORDERS)
    assert [batch.index.tolist() for batch in again.rounds.epoch(1)] == whole


def test_one_order_is_the_published_method(tmp_path: Path) -> None:
    plain, one = make_step(tmp_path / "plain"), make_step(tmp_path / "one", orders=1)
    assert one.rounds.num_batches == 6 and one.state_dict().keys() == plain.state_dict().keys()
    for mine, theirs in zip(run(one, 12), run(plain, 12), strict=True):
        assert mine == theirs
    path = make_experiment(tmp_path, "ibau", options(tmp_path))
    assert "orders" not in load_experiment(path).resolved()["ibau"]  # so digests are what they were


def test_orders_with_augmentation_are_the_loaders_epochs(tmp_path: Path) -> None:
    step = make_step(tmp_path, orders=2, augment={"crop": "pad", "flip": 0.5})
    for round_ in range(2):
        found = [batch.images for batch in step.rounds.epoch(round_)]
        wanted = [b.images for e in (1 + 2 * round_, 2 + 2 * round_, 0) for b in step.rounds.loader.epoch(e)]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_chosen_delta_is_projected_and_the_others_are_not(tmp_path: Path) -> None:
    step = make_step(tmp_path, orders=2, project_radius=0.5, inner={"name": "adam", "lr": 0.3})
    *_, last = run(step, 6)
    assert step.orders is not None
    assert last["delta_norm"].item() == step.orders.norms[0].max().item() > step.orders.norms[0].min().item() > 0.5
    assert step.delta.norm().item() == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize("augment", [None, {"crop": "pad", "flip": 0.5}])
def test_resuming_anywhere_is_bit_exact(augment: dict[str, Any] | None, tmp_path: Path) -> None:
    changes = {"orders": 3, "augment": augment, "inner": {"name": "sgd", "lr": 1.0, "momentum": 0.5}}
    whole = make_step(tmp_path / "whole", **changes)
    expected = run(whole, 20)
    for stop in (1, 3, 5, 6, 8, 9, 11, 15):  # in and between passes, in the outer one, in the next round
        first, second = (make_step(tmp_path / f"{name}{stop}", **changes) for name in ("first", "second"))
        run(first, stop)
        checkpoint.save(tmp_path / f"saved{stop}", stop, {"step": first.state_dict()}, keep=1)
        newest = checkpoint.newest(tmp_path / f"saved{stop}")
        assert newest is not None
        second.load_state_dict(checkpoint.load(newest, torch.device("cpu"))["step"])
        assert run(second, 20 - stop, stop) == expected[stop:]
        for mine, theirs in zip([second.delta, *second.parameters], [whole.delta, *whole.parameters], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("stop", [4, 8, 14])
def test_a_run_that_is_stopped_between_orders_ends_as_if_it_were_not(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = options(tmp_path, orders=3, inner={"name": "sgd", "lr": 3.0, "momentum": 0.0})
    assert main(["run", str(make_experiment(tmp_path / "whole", "ibau", section))]) == 0
    config, call = str(make_experiment(tmp_path / "halves", "ibau", section)), UnlearningStep.__call__

    def stopped(self: UnlearningStep, batch: Any, at: Any) -> dict[str, Tensor]:
        if at.step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(self, batch, at)

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningStep, "__call__", stopped)
        assert main(["run", config]) != 0
    assert not (tmp_path / "halves/run/result.json").exists()
    assert main(["run", config]) == 0
    results = [json.loads((tmp_path / name / "run/result.json").read_text()) for name in ("whole", "halves")]
    for key in ("model_sha256", "rows", "metrics", "notes"):
        assert results[0][key] == results[1][key]
    assert untimed(tmp_path / "whole/run") == untimed(tmp_path / "halves/run")


def noted(of_rounds: list[list[float]]) -> str | None:
    """What a run with these norms tells."""
    orders = Orders(torch.zeros(1, 3, 2, 2), len(of_rounds), len(of_rounds[0]))
    orders.norms.copy_(torch.tensor(of_rounds))
    return orders.disagreement()


def test_orders_that_disagree_are_told() -> None:
    assert noted([[2.0, 1.0, 1.5], [0.0, 0.0, 0.0]]) is None  # twice is not more than twice
    told = noted([[2.0, 1.9, 1.8], [5.0, 40.0, 8.0], [3.0, 1.0, 2.0]])
    assert told is not None and "of 3 orders the largest norm of delta was more than 2 times the smallest" in told
    assert "(40 against 5 in round 2, 3 against 1 in round 3)" in told and "\n" not in told


def test_of_equal_norms_the_first_one_stays() -> None:
    orders = Orders(torch.zeros(1, 1, 1, 2), 1, 3)
    for number, values in enumerate(([3.0, 4.0], [4.0, 3.0], [0.0, 1.0])):
        delta = torch.tensor(values).view(1, 1, 1, 2)
        orders.note(delta, 0, number)
    assert delta.flatten().tolist() == [3.0, 4.0]


def test_a_run_warns_once_where_orders_disagree(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for all rounds, in the log and in result.json; a run with one order tells nothing."""
    monkeypatch.setattr("dist_defend.methods.defend.ibau.orders.APART", 1.0)
    for name, orders, expected in (("three", 3, 1), ("one", 1, 0)):
        caplog.clear()
        section = options(tmp_path / name, orders=orders)
        with caplog.at_level(logging.WARNING, "dist_defend"):
            assert main(["run", str(make_experiment(tmp_path / name, "ibau", section))]) == 0
        result = json.loads((tmp_path / name / "run/result.json").read_text())
        lines = [record.getMessage() for record in caplog.records if "order of the images" in record.getMessage()]
        assert len(lines) == expected
        assert [note for note in result.get("notes", []) if "order of the images" in note] == lines
        assert all("in round 1" in line and "in round 2" in line for line in lines)


def test_no_order_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_experiment(tmp_path, "ibau", options(tmp_path, orders=0))
    assert main(["run", str(path), "--dry-run"]) == 2
    assert "'ibau.orders' is 0; it must be at least 1" in capsys.readouterr().err
