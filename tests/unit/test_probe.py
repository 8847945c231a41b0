"""The probe's heads as runs: a linear layer and kNN against numpy on the encoders' features, and how they are told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.cli import main
from dist_defend.counts import Count
from dist_defend.data.store import open_dataset
from dist_defend.models.artifact import load_simclr
from dist_defend.models.heads import MLPHead
from tests.distributed.comparison import train
from tests.runs import CLASSES, make_experiment, options_of

SEEDS = (1, 2)


def features(options: dict[str, Any], encoder: str, split: str, stamped: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Unit features (N, D) float64 and labels of a split's first 13 or all images; the trigger is 4 px, 1 px in."""
    dataset = open_dataset(options["tasks"]["noise"][split]["path"])
    images = dataset.images(np.arange(13 if split == "train" else len(dataset))).astype(np.float32) / np.float32(255)
    if stamped:
        images[:, -5:-1, -5:-1] = 1
    model = load_simclr(options["encoders"][encoder])[0].f.double().eval()
    with torch.no_grad():
        found = model(torch.from_numpy(images).double().permute(0, 3, 1, 2)).numpy()
    return found / np.linalg.norm(found, axis=1, keepdims=True), dataset.labels[: len(images)]


def counts(on_clean: np.ndarray, on_stamped: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, int]]:
    """Target class 0."""
    others = labels != 0
    return {
        "acc": Count(int((on_clean == labels).sum()), len(labels)).plain(),
        "asr": Count(int((on_stamped[others] == 0).sum()), int(others.sum())).plain(),
        "asr_all": Count(int((on_stamped == 0).sum()), len(labels)).plain(),
        "ra": Count(int((on_stamped == labels)[others].sum()), int(others.sum())).plain(),
    }


def by_row(result: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (row["kind"], row["seed"]): {key: row[key] for key in ("acc", "asr", "asr_all", "ra")} for row in result["rows"]
    }


@pytest.mark.parametrize("is_standardised", [False, True])
def test_a_linear_probe_descends_the_gradient_of_the_cross_entropy(is_standardised: bool, tmp_path: Path) -> None:
    rate, steps = 2.0, 4
    update = {"batch_size": 13, "epochs": steps, "optimizer": {"name": "sgd", "lr": rate, "momentum": 0.0}}
    options = options_of("probe", tmp_path) | {"hidden": [], "update": update, "standardise": is_standardised}
    config = make_experiment(tmp_path, "probe", options)
    done = train(config, tmp_path / "run")
    trained, rows = done["states"]["probe/noise"], by_row(done["result"])
    numbers = {key.rpartition("_")[2]: value for key, value in trained["objective"].items()}
    assert set(numbers) == {"weight", "bias"} and len(rows) == 4
    for place, (encoder, seed) in enumerate((e, s) for e in ("clean", "other") for s in SEEDS):
        x, labels = features(options, encoder, "train")
        mean, scale = (x.mean(0), np.sqrt(x.var(0, ddof=1) + 1e-5)) if is_standardised else (0, 1)
        x = (x - mean) / scale
        torch.manual_seed(seed)
        weight, bias = (p.detach().double().numpy() for p in MLPHead(x.shape[1], CLASSES, ()).parameters())
        for _ in range(steps):
            scores = np.exp(x @ weight.T + bias)
            error = scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[labels]
            weight, bias = weight - rate * error.T @ x / 13, bias - rate * error.mean(0)
        np.testing.assert_allclose(numbers["weight"][place], weight, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(numbers["bias"][place], bias, rtol=1e-9, atol=1e-12)
        clean, truth = features(options, encoder, "test")
        on_clean, on_stamped = (
            ((f - mean) / scale @ weight.T + bias).argmax(1)
            for f in (clean, features(options, encoder, "test", stamped=True)[0])
        )
        assert rows[encoder, seed] == counts(on_clean, on_stamped, truth)


def test_knn_votes_with_the_training_images(tmp_path: Path) -> None:
    options = options_of("probe", tmp_path) | {"kind": "knn", "knn": {"k": 3, "temperature": 0.07}}
    done = train(make_experiment(tmp_path, "probe", options, seed=7), tmp_path / "run")
    assert done["states"] == {} and done["rows"] == []
    rows = by_row(done["result"])
    assert list(rows) == [("clean", 7), ("other", 7)]  # once each: the seeds of heads change nothing
    for (encoder, _), found in rows.items():
        bank, labels = features(options, encoder, "train")

        def classes(queries: np.ndarray, bank: np.ndarray = bank, labels: np.ndarray = labels) -> np.ndarray:
            cosines = queries @ bank.T
            nearest = np.argsort(-cosines, axis=1)[:, :3]
            votes = np.zeros((len(queries), CLASSES))
            for query, rows in enumerate(nearest):
                for row in rows:
                    votes[query, labels[row]] += np.exp(cosines[query, row] / 0.07)
            return np.asarray(votes.argmax(1))

        clean, truth = features(options, encoder, "test")
        assert found == counts(classes(clean), classes(features(options, encoder, "test", stamped=True)[0]), truth)


def test_three_heads_in_one_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "probe", options_of("probe", tmp_path))
    wanted = {"mlp": "mlp (8, 4)", "linear": "linear", "knn": "knn (k 200, temperature 0.5)"}
    for name, key in (("mlp", "seed=100"), ("linear", "probe.hidden=[]"), ("knn", "probe.kind=knn")):
        command = ["run", str(config), f"output={tmp_path}/runs/{name}", key]
        assert main([*command, "--dry-run"]) == 0
        assert ("stage probe/noise" in capsys.readouterr().out) == (name != "knn")
        assert main(command) == 0
        told = capsys.readouterr().err
        assert ("key 'probe.knn.k' is 200, but there are 13 training images: all of them vote" in told) == (
            name == "knn"
        )
        result = json.loads((tmp_path / "runs" / name / "result.json").read_text())
        assert {row["head"] for row in result["rows"]} == {result["head"]} == {wanted[name]}
        assert len(result["rows"]) == (2 if name == "knn" else 4)
    assert main(["report", str(tmp_path / "runs")]) == 0
    page = (tmp_path / "runs" / "report.md").read_text()
    for name, head in wanted.items():
        assert f"| {name} | probe: {head} |" in page
        assert f"| noise | {name} | clean |" in page


def test_a_plan_of_knn_says_that_nothing_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "probe", options_of("probe", tmp_path))
    assert main(["plan", str(config), "probe.kind=knn", "probe.knn.k=3"]) == 0
    assert capsys.readouterr().out.startswith("nothing is trained: no stage\nsimulated")
    assert main(["plan", str(config), "probe.hidden=[]", "--world-size", "2"]) == 0
    assert "probe/noise" in capsys.readouterr().out
