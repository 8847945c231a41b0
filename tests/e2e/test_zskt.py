"""Runs of zskt from files: resumed anywhere they end as uninterrupted ones, what they leave, what is refused."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.step import Position
from dist_defend.methods.defend.zskt import build
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.models.artifact import load_artifact
from tests.runs import SIZE, make_classifier, make_data, make_experiment, untimed

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
RETROSPECTION = {"inner_rounds": 2, "patched_fraction": 0.3, "K": 2, "start": 3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "vaccine, selected": {"vaccine": {"selection_batches": 5}, "grey": True, "bounded": True},
    "both": {"vaccine": {}, "retrospection": {**RETROSPECTION, "restart_lr": 1e-3}},
}


def options(folder: Path, arch: str = "wrn_10_1", **changes: Any) -> dict[str, Any]:
    return {
        "teacher": make_classifier(folder / "teacher", arch=arch, attack=ATTACK),
        "test": {"path": make_data(folder / "test", 13, seed=1)},
        "student": "wrn_10_1",
        "pseudo_batches": 6,
        "batch_size": 4,
        "z_dim": 5,
        "generator_width": 4,
        "student_steps": 2,
        "evaluate_every": 2,
        **changes,
    }


def run(folder: Path, **changes: Any) -> dict[str, Any]:
    """The entries of result.json."""
    assert main(["run", str(make_experiment(folder, "zskt", options(folder, **changes)))]) == 0
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return result


def told(run: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    return untimed(run)


@pytest.mark.parametrize("name", CASES)
def test_resumed_runs_end_as_uninterrupted_ones(name: str, tmp_path: Path) -> None:
    trainer = {"log_every": 1, "trackers": [], "checkpoint_every": 1, "keep_checkpoints": 100}
    path = make_experiment(tmp_path, "zskt", options(tmp_path, **CASES[name]), trainer=trainer)
    live, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["run", str(path)]) == 0
    live.rename(whole)
    expected = json.loads((whole / "result.json").read_text())
    checkpoints = sorted(folder.name for folder in (whole / "checkpoints").iterdir())
    for place in (0, 3, 4, len(checkpoints) - 1):
        shutil.copytree(whole, live)
        (live / "result.json").unlink()
        shutil.rmtree(live / "model")
        for later in checkpoints[place + 1 :]:
            shutil.rmtree(live / "checkpoints" / later)
        assert main(["run", str(path)]) == 0
        found = json.loads((live / "result.json").read_text())
        assert {key: found[key] for key in ("rows", "metrics", "model_sha256")} == {
            key: expected[key] for key in ("rows", "metrics", "model_sha256")
        }
        assert told(live) == told(whole)
        assert (live / "generated.png").read_bytes() == (whole / "generated.png").read_bytes()
        shutil.rmtree(live)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    result = run(tmp_path, vaccine={"selection_batches": 5}, retrospection=RETROSPECTION)
    (row,) = result["rows"]
    assert (row["kind"], row["task"], row["acc"]["n"], row["asr_all"]["n"]) == ("zskt+sv+sr", "noise", 13, 13)
    vaccine = result["metrics"]["vaccine"]
    assert vaccine["decision"] == "rejected" and len(vaccine["tail_ratios"]) == 8  # a few images have no tail
    assert 0 <= vaccine["oracle"]["auc"] <= 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "vaccine rejected: tail ratios 0.0000" in log
    _, card = load_artifact(tmp_path / "run" / "model")
    assert (card.arch, card.backdoored, card.image_size) == ("wrn_10_1", False, SIZE)
    lines = told(tmp_path / "run")
    assert [line["epoch"] for line in lines if "outer_loss" in line] == [3, 4, 5]
    assert [line["epoch"] for line in lines if "acc" in line] == [2, 4, 6]
    picture = Image.open(tmp_path / "run" / "generated.png")
    assert picture.size == (2 * (8 * SIZE + 7), 2 * (8 * SIZE + 7))
    assert np.asarray(picture).std() > 10
    assert load_file(tmp_path / "run/examples.safetensors")["noise/perturbation"].std() > 1


def test_without_a_defence_the_student_is_what_was_measured(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result["rows"][0]["kind"] == "zskt" and "vaccine" not in result["metrics"]
    _, card = load_artifact(tmp_path / "run" / "model")
    asr = result["rows"][0]["asr"]  # by the attack that the teacher's card names: at most 10 % clears the student
    assert card.backdoored is (10 * asr["correct"] > asr["n"])
    assert card.attack is not None and card.defended_by == "zskt"


def test_the_report_shows_generated_images(tmp_path: Path) -> None:
    run(tmp_path, pseudo_batches=1)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<h2>Generated images</h2>" in page
    assert base64.b64encode((tmp_path / "run" / "generated.png").read_bytes()).decode() in page


def test_other_networks_transfer_without_attention(tmp_path: Path) -> None:
    result = run(tmp_path, arch="small_resnet", student="ibau_vgg", attention=0.0, vaccine={}, pseudo_batches=2)
    assert result["metrics"]["vaccine"] == {
        "decision": "first", "tail_ratios": [], "oracle": result["metrics"]["vaccine"]["oracle"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ({"schedule": "cosine"}, [(1 + np.cos(np.pi * n / 4)) / 2 for n in range(4)]),
        ({"schedule": "multistep", "milestones": [1]}, [1, 0.1, 0.1, 0.1]),
    ],
)
def test_rates_follow_their_schedules(schedule: dict[str, Any], factors: list[float], tmp_path: Path) -> None:
    """Schedules count pseudo-batches; a restart forgets Adam's state and follows a cosine over what is left."""
    changes = options(tmp_path, pseudo_batches=4, retrospection={**RETROSPECTION, "start": 2, "restart_lr": 3e-4})
    changes["generator_optimizer"] = {"name": "adam", "lr": 1e-3, **schedule}
    changes["student_optimizer"] = {"name": "adam", "lr": 2e-3, **schedule}
    experiment = load_experiment(make_experiment(tmp_path, "zskt", changes))
    ranks = dist.start("fp64", None)
    plan = build(
        experiment.options, Context(ranks, experiment.seed, experiment.loader, tmp_path / "run", experiment.method)
    )
    (stage,), found, steps = plan.stages, [], []
    step: Any = stage.step
    for epoch in range(4):
        (batch,) = stage.loader.epoch(epoch)
        step(batch, Position(epoch=epoch))
        players = [step.players[name] for name in ("generator", "student")]
        found.append([player.rate for player in players])
        steps.append(int(players[1].state_dict()["state"][0]["step"]))
    assert [row[0] for row in found] == pytest.approx([1e-3 * factor for factor in factors])
    assert [row[1] for row in found] == pytest.approx([2e-3, 2e-3 * factors[1], 3e-4, 1.5e-4])
    assert steps == [2, 4, 2, 4]


def test_z_depends_on_seed_and_pseudo_batch(tmp_path: Path) -> None:
    ranks = dist.start("fp64", None)
    batches = LatentBatches(3, 4, 0, ranks)
    assert batches.draw(1).equal(batches.draw(1)) and not batches.draw(1).equal(batches.draw(2))
    assert not batches.draw(1).equal(LatentBatches(3, 4, 1, ranks).draw(1))
    assert torch.cat([batches.draw(n) for n in range(500)]).std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("cifar10", (80_000, 250.0, 1.0, None, None, None)),
        ("cifar10_vaccine", (80_000, 250.0, 1.0, 0, None, None)),
        ("cifar10_retrospection", (80_000, 250.0, 1.0, None, 79_400, 5e-4)),
        ("cifar10_both", (80_000, 250.0, 1.0, 0, 79_400, 5e-4)),
        ("gtsrb", (10_000, 0.0, 0.5, None, None, None)),
        ("gtsrb_vaccine", (10_000, 0.0, 0.5, 50, None, None)),
        ("gtsrb_retrospection", (10_000, 0.0, 0.5, None, 9_800, 5e-4)),
        ("gtsrb_both", (10_000, 0.0, 0.5, 50, 9_800, 5e-4)),
    ],
)
def test_presets(preset: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    section = {"preset": preset, "teacher": "t", "test": {"path": "p"}}
    config = load_experiment(make_experiment(tmp_path, "zskt", section)).options
    vaccine, retrospection = config.vaccine, config.retrospection
    found: tuple[Any, ...] = (config.pseudo_batches, config.attention, config.temperature)
    found += (vaccine and vaccine.selection_batches,)
    found += (retrospection and retrospection.start, retrospection and retrospection.restart_lr)
    assert found == expected
    assert (config.batch_size, config.student_steps, config.generator_optimizer.lr, config.student_optimizer.lr) == (
        128, 10, 1e-3, 2e-3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vaccine": {"selection_batches": 3}}, "key 'zskt.vaccine.selection_batches' is 3"),
        ({"vaccine": {"weight": 0}}, "key 'zskt.vaccine.weight' is 0.0"),
        ({"retrospection": {"start": 6}}, "key 'zskt.retrospection.start' is 6"),
        ({"student": "small_resnet"}, "key 'zskt.attention' is 250, but attention transfer needs WideResNets"),
        ({"student": "wrn_10_2"}, "unknown arch 'wrn_10_2'"),
        ({"generator_width": 5}, "key 'zskt.generator_width' is 5"),
        ({"student_optimizer": {"warmup_epochs": 1}}, "key 'zskt.student_optimizer.warmup_epochs' is 1"),
        ({"graph": "on"}, "key 'graph' is on"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(make_experiment(tmp_path, "zskt", options(tmp_path, **changes)))]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ") and message in line
