"""A run of DECREE: its row, pictures and files, the share of the mask in the card's trigger, and how it goes on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dist_defend import detection
from dist_defend.cli import main
from dist_defend.methods.measure import decree
from dist_defend.methods.measure.decree import InversionStep, region_of, starts
from dist_defend.models.artifact import ModelCard, load_simclr, save_artifact
from tests.runs import SIZE, make_data, make_experiment, make_model, metrics

ATTACK = {"trigger": {"name": "badnets", "size": 4, "margin": 1}, "target_class": 1}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """A search of two seeds that finds masks at once."""
    data = {"path": make_data(folder / "data"), "max_samples": 9}
    own = {"encoder": make_model(folder / "model"), "data": data, "batch_size": 4, "epochs": 3, "seeds": [3, 4]}
    return {**own, "threshold": 0.5, **changes}


def with_card(folder: str, **changes: Any) -> str:
    """The model folder, whose card says other things."""
    model, card = load_simclr(folder)
    save_artifact(folder, model, ModelCard(**{**vars(card), **changes}))
    return folder


def run(folder: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    assert main(["run", str(make_experiment(folder, "decree", section, **changes))]) == 0
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return result


def test_a_row_of_kind_detector_with_score_and_verdict(tmp_path: Path) -> None:
    section = options(tmp_path, bound=1.0)
    with_card(section["encoder"], backdoored=True, attack=ATTACK)
    result = run(tmp_path, section)
    (row,) = result["rows"]
    pl1 = result["metrics"]["pl1"]
    assert (row["kind"], row["detector"], row["quantity"], row["task"]) == ("detector", "decree", "PL1", "noise")
    assert (row["score"], row["low"], row["high"]) == (sum(pl1) / 2, min(pl1), max(pl1))  # the median of two
    assert (row["verdict"], row["truth"], row["flags"], row["bound"]) == ("backdoored", "backdoored", "below", 1.0)
    kept = load_file(tmp_path / "run" / "triggers.safetensors")
    masks, patterns = kept["masks"], kept["patterns"]
    assert masks.shape == (2, 1, SIZE, SIZE) and patterns.shape == (2, 3, SIZE, SIZE)
    assert masks.flatten(1).mean(1).tolist() == pytest.approx(pl1, rel=1e-5)
    inside = [float(mask[0, -5:-1, -5:-1].sum() / mask.sum()) for mask in masks]
    assert result["metrics"]["mask_in_trigger"] == pytest.approx(inside)
    assert result["metrics"]["trigger_area"] == pytest.approx(16 / SIZE**2)
    assert row["note"].startswith("2 of 2 seeds found a mask") and "6% of the picture" in row["note"]
    with Image.open(tmp_path / "run" / "found.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))[::2, ::2]
    assert sheet.shape == (2 * SIZE + 1, 3 * SIZE + 2, 3)  # mask, pattern and product, a row for each seed
    product = (masks[1] * patterns[1] * 255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(sheet[-SIZE:, -SIZE:], product)


def test_the_median_of_the_seeds_decides(tmp_path: Path) -> None:
    section = options(tmp_path, seeds=[3, 4, 5])
    first = run(tmp_path / "first", section)
    pl1 = sorted(first["metrics"]["pl1"])
    assert pl1[0] < pl1[1] < pl1[2]
    for bound, verdict in (((pl1[0] + pl1[1]) / 2, "clean"), ((pl1[1] + pl1[2]) / 2, "backdoored")):
        (row,) = run(tmp_path / verdict, {**section, "bound": bound})["rows"]
        assert (row["score"], row["verdict"], row["truth"]) == (pl1[1], verdict, "clean")


def test_none_found_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, options(tmp_path, threshold=1.0))  # a mean cosine is never above 1
    (row,) = result["rows"]
    assert [row[key] for key in ("score", "low", "high", "verdict")] == [None] * 4
    assert result["metrics"]["pl1"] == [None, None] and row["note"] == "0 of 2 seeds found a mask"
    assert "none found, so no verdict" in capsys.readouterr().err


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = options(tmp_path, epochs=4, threshold=0.9)
    expected = run(tmp_path / "undisturbed", section)
    step, calls = InversionStep.__call__, 0

    def fail(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return step(*args)

    trainer = {"log_every": 1, "checkpoint_every": 1, "trackers": []}
    config = make_experiment(tmp_path / "killed", "decree", section, trainer=trainer)
    with monkeypatch.context() as patch:
        patch.setattr(InversionStep, "__call__", fail)
        assert main(["run", str(config)]) != 0
    assert not (tmp_path / "killed" / "run" / "result.json").exists()
    found = run(tmp_path / "killed", section, trainer=trainer)
    assert found["metrics"] == expected["metrics"] and found["rows"] == expected["rows"]
    logged = [[row["loss"] for row in metrics(tmp_path / name / "run")] for name in ("undisturbed", "killed")]
    assert logged[0] == logged[1]
    kept = [load_file(tmp_path / name / "run" / "triggers.safetensors") for name in ("undisturbed", "killed")]
    assert all(kept[0][name].equal(kept[1][name]) for name in kept[0])


def test_starts_are_the_seeds_own_and_uniform() -> None:
    m, p = starts((7, 8), 64)
    again, _ = starts((8,), 64)
    assert m[1:].equal(again) and not m[0].equal(m[1])
    for each in (m, p):
        value = torch.tanh(each) / (2 - 1e-7) + 0.5
        assert 0 <= value.min() < 0.01 and 0.99 < value.max() <= 1 and abs(value.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("trigger", "expected"),
    [
        (ATTACK["trigger"], 16 / 256),
        ({"name": "blended", "alpha": 0.2}, 1.0),
        ({"name": "wanet"}, None),  # moves pixels, so it leaves plain images alone
    ],
)
def test_the_region_is_what_the_trigger_changes(trigger: dict[str, Any], expected: float | None) -> None:
    card = ModelCard("simclr", "small_cifar", "cifar10", 16, 8, attack={"trigger": trigger, "target_class": 0})
    region = region_of(card)
    assert (None if region is None else float(region.double().mean())) == expected
    assert region_of(ModelCard("simclr", "small_cifar", "cifar10", 16, 8)) is None


def test_a_last_batch_of_one_image_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    keep = decree.InversionStep.learn

    def noted(self: InversionStep, images: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(images))
        return keep(self, images)

    monkeypatch.setattr(decree.InversionStep, "learn", noted)
    run(tmp_path, options(tmp_path, epochs=1))  # 9 images in batches of 4
    assert seen == [4, 4]


def test_images_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = options(tmp_path, encoder=make_model(tmp_path / "large", size=32))
    assert main(["run", str(make_experiment(tmp_path, "decree", section))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "(16, 16, 3)" in line and "--image-size 32" in line


def scored(truth: str, score: float | None, **changes: Any) -> detection.Detection:
    own: dict[str, Any] = {"detector": "d", "quantity": "q", "bound": 0.5, "flags": "above", "truth": truth}
    return detection.Detection(**{**own, "score": score, "low": score, "high": score} | changes)


def test_auc_is_the_share_of_pairs_in_order() -> None:
    assert detection.auc([3, 4], [1, 2]) == 1
    assert detection.auc([1, 2], [3, 4]) == 0
    assert detection.auc([1, 3], [2]) == 0.5
    assert detection.auc([1], [1]) == 0.5
    assert detection.auc([1, 2, 4], [1, 3]) == (0.5 + 0 + 1 + 0 + 1 + 1) / 6
    assert detection.auc([], [1]) != detection.auc([], [1])


def test_separation_counts_verdicts_and_leaves_out_what_was_defended() -> None:
    found = [scored("backdoored", 0.9), scored("backdoored", 0.4), scored("clean", 0.6), scored("clean", 0.1)]
    found += [scored("clean", None), scored("defended", 0.0), scored("defended", None)]
    one = detection.separation(found)
    assert one.auc == 3 / 4 and one.unscored == 1
    assert (one.backdoored.plain(), one.clean.plain()) == ({"correct": 1, "n": 2}, {"correct": 1, "n": 2})
    below = [scored(each.truth, each.score, flags="below") for each in found]
    assert detection.separation(below).auc == 1 / 4


@pytest.mark.parametrize(
    "changes", [{"low": None}, {"low": 0.8}, {"high": 0.1}, {"high": float("nan")}, {"bound": 1e99}]
)
def test_scores_that_cannot_be_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="low, score and high"):
        scored("clean", 0.7, **changes)
