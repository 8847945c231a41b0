"""What a run goes on from: its own checkpoint, on the same inputs; anything else is one line, before any training."""

import json
import logging
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dist_defend.cli import PREEMPTED, main
from dist_defend.engine import checkpoint
from dist_defend.engine.identity import Identity, Past, digests_of
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.run import RunFolder
from dist_defend.engine.trainer import Stage, Trainer
from dist_defend.errors import UserError
from tests.runs import SIZE, make_classifier, make_data, make_experiment, make_model, metrics, options_of
from tests.unit.test_engine import Numbers, fit, make_step

ADAM = OptimizerConfig("adam", lr=0.1, amsgrad=True)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The checkpoint once more, with another state."""
    state = checkpoint.load(path)
    change(state)
    return checkpoint.save(path.parent, int(path.name[5:]), state)


def newest(folder: Path) -> Path:
    path = checkpoint.newest(folder / "checkpoints")
    assert path is not None
    return path


def at(**keys: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["position"].update(keys)


def set_(*path: Any) -> Callable[[dict[str, Any]], None]:
    """Set the last of the path's items below the others before it; leave it out if it is Ellipsis."""

    def change(state: Any) -> None:
        *before, key, value = path
        for name in before:
            state = state[name]
        if value is ...:
            del state[key]
        else:
            state[key] = value

    return change


OPTIMIZER = ("stages", "line", "optimizer")
NO_CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative stage": (at(stage=-1), "key 'stage' is -1"),
    "stage beyond": (at(stage=2), "key 'position.stage' is 2, but the run has 1 stages"),
    "epoch beyond": (at(epoch=3), "key 'position.epoch' is 3, but stage 0 has 2"),
    "negative batch": (at(batch=-4), "key 'batch' is -4"),
    "batch beyond": (at(epoch=0, batch=4), "key 'position.batch' is 4, but stage 0 has 3"),
    "another step's": (at(step=5), "key 'position.step' is 5, in another step's folder"),
    "a step elsewhere": (at(epoch=0, batch=1), "key 'position.step' is 4, which is not where the other keys are"),
    "a half batch": (at(batch=0.5), "batch"),
    "true for a stage": (at(stage=True), "no numbers"),
    "no position": (set_("position", ...), "(position)"),
    "a position that is a list": (set_("position", [0]), "it holds a list"),
    "an unknown key": (set_("more", 1), "(more)"),
    "negative bytes": (set_("metrics_size", -1), "key 'metrics_size' is -1"),
    "more bytes than metrics": (set_("metrics_size", 10**12), "key 'metrics_size' is 1000000000000"),
    "no random state": (set_("random", []), "key 'random'"),
    "a random state of numbers": (set_("random", 0, torch.zeros(5056)), "key 'random'"),
    "a short random state": (set_("random", 0, torch.zeros(9, dtype=torch.uint8)), "key 'random'"),
    "a random state that is none": (set_("random", 0, torch.full((5056,), 255, dtype=torch.uint8)), "key 'random'"),
    "random states of no device": (set_("device_random", [torch.zeros(16, dtype=torch.uint8)]), "key 'device_random'"),
    "random numbers of a device": (set_("device_random", [[torch.zeros(16)]]), "key 'device_random'"),
    "no such stage": (set_("stages", {}), "key 'stages.line' is missing"),
    "stages in a list": (set_("stages", []), "key 'stages'"),
    "a stage that is a number": (set_("stages", "line", 3), "key 'stages.line' holds a int"),
    "no weights": (set_("stages", "line", "objective", ...), "key 'stages.line.objective' is missing"),
    "other weights": (set_("stages", "line", "objective", "w", torch.zeros(3)), "key 'stages.line' does not fit"),
    "weights in another axis": (set_("stages", "line", "objective", "w", torch.zeros(2, 1)), ".objective.w' is"),
    "weights of another kind": (set_("stages", "line", "objective", "w", torch.zeros(2).double()), "torch.float64"),
    "a text for weights": (set_("stages", "line", "objective", "w", "x"), "objective.w' holds a str, not a tensor"),
    "an optimizer of more": (set_(*OPTIMIZER, "param_groups", 0, "params", [0, 1]), "other parameters"),
    "no groups": (set_(*OPTIMIZER, "param_groups", ...), "key 'stages.line' does not fit"),
    "moments of another shape": (set_(*OPTIMIZER, "state", 0, "exp_avg", torch.zeros(1)), "'exp_avg' is not like"),
    "moments that are a number": (set_(*OPTIMIZER, "state", 0, "exp_avg", 1.0), "'exp_avg' is not like"),
    "moments that lack": (set_(*OPTIMIZER, "state", 0, "exp_avg_sq", ...), "the optimizer keeps"),
    "moments of nothing": (set_(*OPTIMIZER, "state", 7, {}), "the optimizer has no parameter 7"),
    "updates without number": (set_(*OPTIMIZER, "state", 0, "step", torch.tensor(math.nan)), "'step' is no number"),
    "lives without end": (set_("identity", "lives", 0, "wall_seconds", math.inf), "wall_seconds"),
    "a life on no rank": (set_("identity", "lives", 0, "world_size", 0), "world_size"),
    "inputs in a list": (set_("identity", "inputs", []), "identity"),
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_one_line_and_stays(name: str, tmp_path: Path) -> None:
    change, told = NO_CHECKPOINTS[name]
    fit_until(tmp_path, 4)
    path = rewrite(newest(tmp_path), change)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError) as refused:
        fit(tmp_path, Stage("line", Numbers(), make_step(ADAM), epochs=2))
    line = str(refused.value)
    assert told in line and "state.json" in line and str(path) in line and line.isprintable()
    kept = {file: file.read_bytes() for file in before if file.name not in ("env.json", "log.txt", ".lock")}
    assert kept == {file: before[file] for file in kept}


def fit_until(folder: Path, step: int) -> None:
    """Train up to a step, and leave its checkpoint."""

    class Halt(Exception):
        pass

    class Ending(Numbers):
        def epoch(self, epoch: int, start_batch: int = 0) -> Any:
            for number, batch in enumerate(super().epoch(epoch, start_batch), start_batch):
                if epoch * self.num_batches + number == step:
                    raise Halt
                yield batch

    with pytest.raises(Halt):
        fit(folder, Stage("line", Ending(), make_step(ADAM), epochs=2))
    assert newest(folder).name == f"step_{step:09d}"


def test_the_optimizers_options_are_the_configured_ones(tmp_path: Path) -> None:
    """A checkpoint cannot bring others, as a rate of its own or gradients that are climbed."""
    fit_until(tmp_path / "own", 4)
    fit_until(tmp_path / "changed", 4)
    group = set_(*OPTIMIZER, "param_groups", 0, "maximize", True)
    rewrite(newest(tmp_path / "changed"), lambda state: (group(state), set_(*OPTIMIZER, "param_groups", 0, "lr", 9.0)))
    ends = []
    for name in ("own", "changed"):
        step = make_step(ADAM)
        fit(tmp_path / name, Stage("line", Numbers(), step, epochs=2))
        ends.append(step.objective.get_parameter("w").detach().clone())
    assert ends[0].equal(ends[1])


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit_until(tmp_path, 4)
    rewrite(newest(tmp_path), lambda state: state.pop("identity"))
    with caplog.at_level(logging.WARNING, "dist_defend"):
        fit(tmp_path, Stage("line", Numbers(), make_step(ADAM), epochs=2))
    assert "does not say what data, models and code it comes from" in caplog.text
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


# -- inputs --------------------------------------------------------------------------------------------------------


def interrupted(folder: Path, method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that SIGTERM has stopped after its first update; its configuration."""
    config = make_experiment(folder, method, options)
    move = Trainer._move

    def signalled(self: Trainer, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return move(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_move", signalled)
        assert main(["run", str(config)]) == PREEMPTED
    return config


def other_data(folder: Path, count: int = 24) -> str:
    """Overwrites the prepared data set there with other images."""
    shutil.rmtree(folder)
    return make_data(folder, count, seed=9)


CHANGES: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "data": ("simclr", "simclr.data.path", lambda folder: other_data(folder / "data")),
    "test data": (
        "classifier",
        "classifier.test.path",
        lambda folder: other_data(folder / "test", count=13),
    ),
    "teacher": ("kd", "kd.teacher", lambda folder: make_classifier(folder / "teacher", seed=5)),
    "reference data": (
        "badencoder",
        "badencoder.reference.dataset",
        lambda folder: other_data(folder / "reference"),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_on_other_inputs_is_refused_and_loses_nothing(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    method, role, change = CHANGES[what]
    options = options_of(method, tmp_path)
    if what == "reference data":
        options["reference"]["dataset"] = make_data(tmp_path / "reference", seed=3)
    config = interrupted(tmp_path, method, options, monkeypatch)
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    rows = (run / "metrics.jsonl").read_bytes()
    then = digests_of(options, method)[role]
    change(tmp_path)
    now = digests_of(options, method)[role]
    for extra in ([], ["--dry-run"]):
        capsys.readouterr()
        assert main(["run", str(config), *extra]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"comes of another '{role}': sha256 {then[:12]} then, {now[:12]} now: put it back, or delete " in line
    assert {path: path.read_bytes() for path in before} == before
    assert (run / "metrics.jsonl").read_bytes() == rows


def test_a_finished_run_on_other_inputs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config)]) == 0
    result = (tmp_path / "run" / "result.json").read_bytes()
    other_data(tmp_path / "data")
    capsys.readouterr()
    assert main(["run", str(config)]) == 2
    assert "run is finished and comes of another 'simclr.data.path': sha256 " in capsys.readouterr().err
    shutil.rmtree(tmp_path / "data")  # which a finished run needs no more
    assert main(["run", str(config)]) == 0
    assert (tmp_path / "run" / "result.json").read_bytes() == result


def test_every_kind_of_input_has_its_digest_under_its_key(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("masks.txt", "reference.npz", "trigger.png", "pattern.npy", "bd.npz")}
    for number, path in enumerate(files.values()):
        path.write_bytes(bytes([number]) * 9)
    attack = {"trigger": {"name": "file", "path": str(files["pattern.npy"])}, "target_class": 1}
    section = {
        "model": make_classifier(tmp_path / "model", attack=attack),
        "encoders": {"clean": make_model(tmp_path / "clean")},
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 8},
        "mask_file": str(files["masks.txt"]),
        "reference": {"file": str(files["reference.npz"]), "dataset": None},
        "triggers": [str(files["trigger.png"]), {"images": str(files["bd.npz"])}],
        "arch": "resnet18",
        "rate": 0.1,
        "long": "x" * 9999,
        "odd": "a\0b",
    }
    before = digests_of(section, "m")
    keys = {
        "m.model",
        "m.model.attack.trigger.path",  # what the card of the suspect names
        "m.encoders.clean",
        "m.data.path",
        "m.mask_file",
        "m.reference.file",
        "m.triggers.0",
        "m.triggers.1.images",
    }
    assert before.keys() == keys
    files["pattern.npy"].write_bytes(b"other")
    make_model(tmp_path / "clean", seed=3)
    after = digests_of(section, "m")
    assert {key for key in keys if before[key] != after[key]} == {"m.model.attack.trigger.path", "m.encoders.clean"}


_opened: set[str] | None = None  # what is noted of the files that this process opens


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.add(arguments[0])


sys.addaudithook(_note)  # for good: Python has no way to take one back


@pytest.mark.parametrize(
    "method", ["simclr", "classifier", "badencoder", "kd", "ood", "mimic", "nad_simclr", "probe", "ibau", "pictures"]
)
def test_nothing_is_read_that_has_no_digest(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever file of the inputs' folder a run opens lies in a folder, or is a file, that an input's digest covers."""
    inputs = tmp_path / "inputs"
    if method in ("ibau", "pictures"):
        inputs.mkdir()
        shown = Image.new("RGB", (SIZE, SIZE))
        shown.paste((200, 90, 30), (0, 0, 4, 4))
        shown.save(inputs / "shown.png")
        trigger = {"trigger": {"name": "file", "file": str(inputs / "shown.png")}, "target_class": 1}
        test = {"path": make_data(inputs / "test", 9)}
        options = {"model": make_classifier(inputs / "model", attack=trigger), "test": test, "rounds": 1}
        options |= {"data": {"path": make_data(inputs / "data"), "max_samples": 12}}
        if method == "pictures":
            picture = {"name": "file", "file": str(inputs / "shown.png")}
            options = options_of("classifier", inputs) | {"attack": {"trigger": picture, "target_class": 1, "count": 3}}
            method = "classifier"
    else:
        options = options_of(method, inputs)
    config = make_experiment(tmp_path, method, options)
    monkeypatch.setattr("tests.unit.test_resume._opened", set())
    assert main(["run", str(config)]) == 0
    read = {Path(file) for file in _opened or () if file.startswith(str(inputs))}
    digests = json.loads((tmp_path / "run" / "result.json").read_text())["inputs"]
    named = [Path(_value(options, key.split(".")[1:])) for key in digests if ".model.attack." not in key]
    if method == "ibau":
        assert "ibau.model.attack.trigger.file" in digests
        named.append(inputs / "shown.png")
    assert len(read) > 2
    assert [file for file in read if not any(place == file or place in file.parents for place in named)] == []


def _value(tree: Any, keys: list[str]) -> Any:
    for key in keys:
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


# -- lives ---------------------------------------------------------------------------------------------------------


def test_seconds_and_versions_are_those_of_all_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of("simclr", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("dist_defend.engine.identity.code_version", lambda: "1.0+first")
        config = interrupted(tmp_path, "simclr", options, monkeypatch)
    state = checkpoint.load(newest(tmp_path / "run"))
    assert [life["code_version"] for life in state["identity"]["lives"]] == ["1.0+first"]
    assert state["identity"]["inputs"] == digests_of(options, "simclr")
    two_ranks = {"code_version": "1.0+first", "world_size": 2, "wall_seconds": 1000.0, "work_seconds": 500.0}
    rewrite(newest(tmp_path / "run"), set_("identity", "lives", [two_ranks]))
    monkeypatch.setattr("dist_defend.engine.identity.code_version", lambda: "1.0+second")
    capsys.readouterr()
    assert main(["run", str(config)]) == 0
    assert "was written by version 1.0+first; version 1.0+second goes on" in capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    first, second = result["lives"]
    assert first == two_ranks and (second["code_version"], second["world_size"]) == ("1.0+second", 1)
    assert result["code_version"] == "1.0+second" and 0 < second["wall_seconds"] < 600
    assert result["wall_seconds"] == pytest.approx(1000 + second["wall_seconds"])
    assert result["device_seconds"] == pytest.approx(2000 + second["wall_seconds"])
    assert result["work_seconds"] == pytest.approx(1000 + second["work_seconds"])


def test_lives_are_added_up_over_several(tmp_path: Path) -> None:
    now = Identity({}, 3, "a")
    now.follow(Past.read({"inputs": {}, "lives": [lived(5.0), lived(7.0)]}, tmp_path), tmp_path, True)
    assert [life.wall_seconds for life in now.lives[:2]] == [5.0, 7.0]
    again = Past.read(now.plain(), tmp_path)
    assert [life.world_size for life in again.lives] == [1, 1, 3]


def lived(seconds: float) -> dict[str, Any]:
    return {"code_version": "a", "world_size": 1, "wall_seconds": seconds}


# -- the run folder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"seed": 1, "seed": 1}', "\xff", '{"a": ' * 5000, '{"seed": {"a\x1b[2J": 1}}', "null"],
)
def test_a_run_folder_with_a_broken_configuration_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        RunFolder(tmp_path, True).check({"seed": 1})
    assert str(tmp_path) in str(refused.value) and str(refused.value).isprintable()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"inputs": [1]}', '{"inputs": {"a": 1}}', '{"name": 1, "name": 2}'])
def test_a_broken_result_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(UserError, match=r"result\.json"):
        RunFolder(tmp_path, True).read_result({})


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_run_writes_its_own_files_only(name: str, tmp_path: Path) -> None:
    """A run folder from others may hold a link to one of our files, or a pipe that is never read."""
    (tmp_path / "mine").write_text("keep me")
    makers: list[Callable[[Path], None]] = [lambda path: path.symlink_to(tmp_path / "mine"), os.mkfifo]
    for number, make in enumerate(makers):
        run = tmp_path / str(number)
        run.mkdir()
        make(run / name)
        with pytest.raises(UserError, match=f"{name} is a link, a pipe or a folder"):
            opened = RunFolder(run, True)
            try:
                opened.open({}, "")
            finally:
                opened.close()
    assert (tmp_path / "mine").read_text() == "keep me"


def test_what_a_killed_run_wrote_half_is_swept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    left = [tmp_path / ".config.json.77", tmp_path / ".result.json.1", tmp_path / "model" / ".model.safetensors.8"]
    kept = [tmp_path / ".notes", tmp_path / "model" / ".step.before", tmp_path / "2.5"]
    for path in (*left, *kept):
        path.write_text("")
    run = RunFolder(tmp_path, True)
    run.open({}, "")
    run.close()
    assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
