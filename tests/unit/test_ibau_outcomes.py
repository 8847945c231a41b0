"""The study of I-BAU's luck: both sides do one round alike, arms differ in what they say, and the tests of samples."""

import csv
from pathlib import Path

import pytest
import torch

from dist_defend.bench import ibau_outcomes as outcomes
from dist_defend.bench import runner
from dist_defend.models.artifact import card_of, save_artifact
from dist_defend.models.classifier import build_classifier


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a study in float64 of a small network on noise of 8 px: 6 images in batches of 3, 8 of the test."""
    torch.manual_seed(0)
    model = build_classifier("small_resnet", 10, "none", 8)
    save_artifact(tmp_path / "model", model, card_of(model))
    (tmp_path / "attack.yaml").write_text("{trigger: {name: badnets, size: 3}, target_class: 8}")
    runner.prepare(runner.random_images(14, seed=5), tmp_path, "data", 10, storage="npy")
    sizes = ["--num-images", "6", "--num-test", "8", "--batch-size", "3", "--precision", "fp64", "--resize", "8"]
    where = ["--attack", str(tmp_path / "attack.yaml")]
    return [str(tmp_path / "model"), str(tmp_path / "data"), *where, "--out", str(tmp_path / "rows.csv"), *sizes]


def test_a_round_is_the_published_one(arguments: list[str]) -> None:
    study = outcomes.Study(outcomes.parser().parse_args(arguments))
    found = []
    for name in ("ours", "published_our_draws"):
        arm, rows = outcomes.ARMS[name], outcomes.order_of(6, seed=3)
        run = study.ours if arm.side == "ours" else study.published
        found.append(run(arm, rows, study.batches(rows), seed=3))
    (ours, our_delta, our_norm, our_loss, _), (theirs, their_delta, their_norm, their_loss, _) = found
    assert our_norm == pytest.approx(their_norm, rel=1e-9) and our_loss == pytest.approx(their_loss, rel=1e-8)
    torch.testing.assert_close(our_delta, their_delta, rtol=1e-8, atol=1e-10)
    suspect = study.suspect()
    for mine, other, start in zip(ours.parameters(), theirs.parameters(), suspect.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-7)
        assert not torch.equal(mine, start)


def test_rows_of_arms(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seed 0 is one run for all arms that vary order or patched images; another seed changes what varies alone."""
    arms = ["ours", "order_alone", "patched_alone", "published", "orders_8"]
    assert outcomes.main([*arguments, "--seeds", "2", "--arms", *arms]) == 0
    with (tmp_path / "rows.csv").open() as file:
        suspect, *rows = csv.DictReader(file)
    assert (suspect["arm"], suspect["acc_n"], suspect["asr_all_n"]) == ("suspect", "8", "8")
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for seed in "01" for arm in arms]
    by = {(row.pop("arm"), row.pop("seed")): row for row in rows}
    for row in by.values():
        row.pop("cpu_seconds")
    assert by["ours", "0"] == by["order_alone", "0"] == by["patched_alone", "0"]
    assert by["patched_alone", "1"]["delta_norm"] == by["ours", "0"]["delta_norm"]  # delta knows no patched image
    assert by["patched_alone", "1"]["outer_loss"] != by["ours", "0"]["outer_loss"]
    assert by["order_alone", "1"]["delta_norm"] == by["ours", "1"]["delta_norm"] == by["published", "1"]["delta_norm"]
    for seed in "01":  # of eight orders the first one is that of ``ours``
        several = by["orders_8", seed]
        most, own, least = several["delta_norm"], by["ours", seed]["delta_norm"], several["delta_norm_min"]
        assert float(most) >= float(own) >= float(least) and float(most) > float(least)
        assert by["ours", seed]["delta_norm_min"] == ""
    assert "ours against published, asr: KS p = " in capsys.readouterr().out


def test_two_samples() -> None:
    """Two apart from two: of 6 ways to part four values two are as far apart; alike: nothing to see."""
    assert outcomes.compared([1.0, 2.0], [5.0, 6.0]) == pytest.approx((1 / 3, 1 / 3))
    assert outcomes.compared([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == pytest.approx((1.0, 1.0))


def test_images_that_a_perturbation_moves() -> None:
    """Three classes; of the three images outside class 2 delta moves two there, and none elsewhere."""

    class First(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, :, 0, 0]

    images = torch.zeros(4, 3, 1, 1)
    images[0, 0], images[1, 1], images[2, 2], images[3, 0] = 1, 1, 1, 9
    share, place = outcomes.moved(First(), images, torch.tensor([0.0, 0.0, 2.0]).view(1, 3, 1, 1))
    assert share == pytest.approx(200 / 3) and place == 2
