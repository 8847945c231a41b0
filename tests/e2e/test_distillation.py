"""Runs of kd, ood and cmi from files: resumed anywhere they end as uninterrupted ones; what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_artifact
from tests.runs import SIZE, make_classifier, make_data, make_experiment, untimed

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
RETROSPECTION = {"start": 1, "inner_rounds": 2}
SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "schedule": "cosine"}
SYNTHESIS = {
    "batch_size": 6, "iterations": 7, "width": 4, "latent_dim": 5,
    "contrast": {"negatives": 7, "bank_size": 10, "dim": 4},
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd", {}),
    "ood_both": ("ood", {"vaccine": {}, "retrospection": RETROSPECTION}),
    "ood_selected": ("ood", {"vaccine": {"selection_batches": 13}, "update": {"batch_size": 1, "epochs": 1}}),
    "cmi": ("cmi", {"update": {"batch_size": 4, "epochs": 2, "optimizer": SGD}}),
    "cmi_both": ("cmi", {"vaccine": {"selection_batches": 12}, "retrospection": {**RETROSPECTION, "start": 2}}),
}


def options(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    own = {"distillation_steps": 2, "synthesis": SYNTHESIS} if method == "cmi" else {}
    data = {"data": {"path": make_data(folder / "data", 16)}} if method != "cmi" else {}
    return {
        "teacher": make_classifier(folder / "teacher", arch="wrn_10_1", attack=ATTACK),
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "student": "wrn_10_1",
        "update": {"batch_size": 4, "epochs": 3 if method == "cmi" else 2, "optimizer": SGD},
        **data,
        **own,
        **changes,
    }


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    return untimed(run)


@pytest.mark.parametrize("name", CASES)
def test_resumed_runs_end_as_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    method, changes = CASES[name]
    trainer = {"log_every": 1, "trackers": [], "checkpoint_every": 1, "keep_checkpoints": 100}
    path = make_experiment(tmp_path, method, options(tmp_path, method, **changes), trainer=trainer)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["run", str(path)]) == 0
    run.rename(whole)
    expected = json.loads((whole / "result.json").read_text())
    checkpoints = sorted(folder.name for folder in (whole / "checkpoints").iterdir())
    places = [len(checkpoints) // 5, len(checkpoints) // 2, len(checkpoints) - 1]
    for place in places:
        shutil.copytree(whole, run)
        (run / "result.json").unlink()
        shutil.rmtree(run / "model")
        for later in checkpoints[place + 1 :]:
            shutil.rmtree(run / "checkpoints" / later)
        assert main(["run", str(path)]) == 0
        found = json.loads((run / "result.json").read_text())
        assert {key: found[key] for key in ("rows", "metrics", "model_sha256")} == {
            key: expected[key] for key in ("rows", "metrics", "model_sha256")
        }
        assert log_of(run) == log_of(whole)
        shutil.rmtree(run)


@pytest.mark.parametrize("name", ["ood_both", "cmi_both", "cmi"])
def test_what_retrospection_perturbed_by_is_kept_for_the_report(name: str, tmp_path: Path) -> None:
    method, changes = CASES[name]
    assert main(["run", str(make_experiment(tmp_path, method, options(tmp_path, method, **changes)))]) == 0
    kept = load_file(tmp_path / "run/examples.safetensors").get("noise/perturbation")
    assert (kept is None) == ("retrospection" not in changes)
    assert kept is None or (kept.shape == (1, SIZE, SIZE, 3) and kept.std() > 1)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    method, changes = CASES["cmi_both"]
    assert main(["run", str(make_experiment(tmp_path, method, options(tmp_path, method, **changes), seed=7))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (row,) = result["rows"]
    assert (row["kind"], row["task"], row["seed"]) == ("cmi+sv+sr", "noise", 7)
    assert (row["acc"]["n"], row["asr_all"]["n"]) == (13, 13)
    assert result["metrics"]["synthesised_images"] == 18
    told = result["metrics"]["vaccine"]
    assert 1 <= len(told["tail_ratios"]) <= 8 and 0 <= told["oracle"]["auc"] <= 1
    with Image.open(tmp_path / "run" / "generated.png") as grid:
        assert grid.size == (2 * (8 * 17 - 1), 2 * (3 * 17 - 1))
    _, card = load_artifact(tmp_path / "run" / "model")
    is_held = (
        10 * row["asr"]["correct"] > row["asr"]["n"]
    )  # the teacher's card names the attack; 10 % is what is let go
    assert (card.arch, card.backdoored, card.provenance["method"]) == ("wrn_10_1", is_held, "cmi+sv+sr")
    assert card.counts is not None and card.defended_by == "cmi+sv+sr"
    assert card.counts["after"] == {k: row[k] for k in ("acc", "asr", "asr_all", "ra")}
    scalars = {key for line in log_of(tmp_path / "run") for key in line}
    assert {"bn", "one_hot", "adversarial", "contrast", "synthesis_loss", "loss", "outer_loss", "asr"} <= scalars


@pytest.mark.parametrize(
    ("method", "preset", "expected"),
    [
        ("kd", "zskt_code", {"temperature": 6.0, "alpha": 0.95}),
        ("kd", "cmi_code", {"temperature": 1.0, "alpha": 1.0}),
        ("ood", "plain", {"temperature": 8.0, "vaccine": None, "retrospection": None}),
        ("ood", "both", {"retrospection_convention": "mean"}),
        ("ood", "published", {"retrospection_convention": "batchmean"}),
        ("cmi", "plain", {"temperature": 20.0, "distillation_steps": 400, "vaccine": None}),
        ("cmi", "both", {"temperature": 20.0}),
    ],
)
def test_presets(method: str, preset: str, expected: dict[str, Any], tmp_path: Path) -> None:
    section = {"preset": preset, "teacher": "t", "test": {"path": "p"}}
    if method != "cmi":
        section["data"] = {"path": "d"}
    config = load_experiment(make_experiment(tmp_path, method, section)).options
    assert {key: getattr(config, key) for key in expected} == expected
    sizes = {"zskt_code": (128, 170), "cmi_code": (128, 200)}.get(preset, (512, 300) if method == "ood" else (128, 200))
    assert (config.update.batch_size, config.update.epochs) == sizes
    if preset in ("both", "published"):
        late = config.retrospection
        assert (late.start, late.restart_lr, late.inner_rounds) == (297 if method == "ood" else 197, 5e-4, 10)
        assert (late.synthesis_penalty, late.detach_reference, late.perturbs) == (0.0, False, "teacher")
        assert (config.vaccine.weight, config.vaccine.members, config.vaccine.layers) == (0.1, 3, 5)
    if method == "ood":
        optimizer = config.update.optimizer
        assert (optimizer.lr, optimizer.milestones, optimizer.gamma) == (1e-3, (150, 300, 600), 0.5)
        assert (config.cutmix.probability, config.cutmix.beta) == (1.0, 0.25)
    if method == "cmi":
        made = config.synthesis
        assert (made.batch_size, made.iterations, made.lr, made.latent_dim, made.width) == (256, 200, 1e-3, 256, 64)
        assert (made.bn, made.one_hot, made.adversarial) == (1.0, 1.0, 0.5)
        contrast = made.contrast
        assert (contrast.weight, contrast.temperature, contrast.negatives, contrast.bank_size, contrast.dim) == (
            0.8, 0.1, 4096, 40960, 256,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("kd", {"alpha": 1.5}, "'kd.alpha' is 1.5"),
        ("kd", {"temperature": 0}, "'kd.temperature'"),
        ("ood", {"cutmix": {"beta": 0}}, "'ood.cutmix.beta'"),
        ("ood", {"vaccine": {"selection_batches": 11}}, "'ood.vaccine.selection_batches' is 11; it must be more than"),
        ("ood", {"retrospection": {"start": 2}}, "'ood.retrospection.start' is 2; it must be below the 2 epochs"),
        ("ood", {"retrospection_convention": "sum"}, "'ood.retrospection_convention'"),
        ("cmi", {"synthesis": {"batch_size": 20, "contrast": {"bank_size": 19}}}, "bank_size' is 19; it must hold"),
        ("cmi", {"synthesis": {"global_view": {"jitter": 0.5}}}, "'cmi.synthesis.global_view' must be a crop"),
        ("cmi", {"distillation_steps": 0}, "'cmi.distillation_steps' is 0"),
        ("cmi", {"data": {"path": "d"}}, "unknown key 'cmi.data'"),
    ],
)
def test_values_that_mean_nothing_are_refused(
    method: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = {} if method == "cmi" else {"data": {"path": "d"}}
    section = {"teacher": "t", "test": {"path": "p"}, "update": {"epochs": 2}, **data, **changes}
    with pytest.raises(UserError, match=message) as caught:
        load_experiment(make_experiment(tmp_path, method, section))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("ood", {"vaccine": {"selection_batches": 12}}, "but there are 8 batches before"),
        ("ood", {"augment": {"size": 8}}, "key 'ood.augment.size' is 8"),
        ("kd", {"student": "wrn_1"}, "unknown arch 'wrn_1'"),
        ("cmi", {"attack": {**ATTACK, "target_class": 3}}, "key 'cmi.attack.target_class' is 3"),
        ("cmi", {"graph": "on"}, None),  # only the retrospection's updates are graphs
        ("cmi", {"graph": "on", "retrospection": RETROSPECTION}, "key 'graph' is on"),
    ],
)
def test_what_does_not_fit_costs_one_line(
    method: str, changes: dict[str, Any], message: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_experiment(tmp_path, method, options(tmp_path, method, **changes))
    assert main(["run", str(path), "--dry-run"]) == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


def test_images_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = options(tmp_path, "ood", data={"path": make_data(tmp_path / "large", size=20)})
    assert main(["run", str(make_experiment(tmp_path, "ood", section)), "--dry-run"]) == 2
    assert "prepare it with --image-size 16" in capsys.readouterr().err


def test_a_teacher_without_batch_norm_cannot_be_inverted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = options(tmp_path, "cmi", teacher=make_classifier(tmp_path / "plain", arch="timm:test_vit"))
    assert main(["run", str(make_experiment(tmp_path, "cmi", section)), "--dry-run"]) == 2
    assert "timm:test_vit has no batch norm" in capsys.readouterr().err
