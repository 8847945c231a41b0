"""Bad input: exit status 2, exactly one line, nothing written, and nothing of a pickle executed."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dist_defend.cli import main
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from dist_defend.templates import template
from tests.forging import seal
from tests.runs import SIZE, make_data, make_experiment, make_model, options_of


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command prints."""
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "{}"],
        ["run", "configs/{}.yaml"],
        ["run", "pretrain/simclr_cifar10.yaml", "simclr.data.path={}"],
        ["run", "pretrain/simclr_cifar10.yaml", "output={}"],
        ["run", "defend/ft_cifar10.yaml", "ft.model={}"],
        ["data", "prepare", "imagefolder", "--path", "{}", "--out", "out"],
        ["data", "info", "{}"],
        ["import", "{}", "--out", "out"],
        ["evaluate", "{}", "--data", "data"],
        ["export", "--to", "hf", "{}", "--out", "out"],
        ["report", "{}"],
        ["runs", "{}"],
        ["sweep", "plan", "{}"],
        ["reproduce", "{}"],
        ["zoo", "add", "{}"],
        ["init", "{}"],
    ],
    ids=" ".join,
)
def test_a_name_that_the_system_refuses_is_bad_input(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(template("configs") / word) if word.endswith("_cifar10.yaml") else word for word in argv]
    line = refused([word.format("n" * 300) for word in words], capsys)
    assert line.startswith("error: ") and "nnnn" in line
    assert not list(tmp_path.iterdir())


Change = Callable[[dict[str, Any], Path], dict[str, Any] | None]  # of the options; may give keys beside them


def setting(place: str, value: Any) -> Change:
    """Set options' key; {folder} in a text is the test's folder."""

    def change(options: dict[str, Any], folder: Path) -> None:
        *parents, last = place.split(".")
        for parent in parents:
            options = options.setdefault(parent, {})
        options[last] = value.format(folder=folder) if isinstance(value, str) else value

    return change


def beside(**keys: Any) -> Change:
    return lambda options, folder: keys


def cut_data(options: dict[str, Any], folder: Path) -> None:
    path = folder / "data" / "images.npy"
    path.write_bytes(path.read_bytes()[:-1])


def cut_labels(options: dict[str, Any], folder: Path) -> None:
    (folder / "data" / "labels.npy").unlink()


def unlabelled(options: dict[str, Any], folder: Path) -> None:
    labels = np.load(folder / "test" / "labels.npy")
    np.save(folder / "test" / "labels.npy", np.full_like(labels, -1))
    seal(folder / "test", class_counts=[0, 0, 0])


NO_FILE = {"name": "file", "file": "none.npz"}


def renamed(now: str, before: str) -> Change:
    """A key as an earlier version called it."""

    def change(options: dict[str, Any], folder: Path) -> None:
        options[before] = options.pop(now)

    return change


def small_trigger(options: dict[str, Any], folder: Path) -> None:
    shape = (1, SIZE - 1, SIZE - 1, 3)
    np.savez(folder / "trigger.npz", t=np.zeros(shape), tm=np.ones(shape, dtype=np.int64))
    options["attack"] = {"trigger": {"name": "file", "file": str(folder / "trigger.npz")}}


def pickled_trigger(options: dict[str, Any], folder: Path) -> None:
    bomb = np.array([Bomb(folder / "executed")], dtype=object)
    np.savez(folder / "trigger.npz", t=bomb, tm=bomb)
    options["attack"] = {"trigger": {"name": "file", "file": str(folder / "trigger.npz")}}


def more_references(options: dict[str, Any], folder: Path) -> None:
    np.savez(folder / "references.npz", x=np.zeros((2, SIZE, SIZE, 3), dtype=np.uint8), y=np.array([0, 1]))
    options["reference"] = {"file": str(folder / "references.npz")}


def pickled_weights(options: dict[str, Any], folder: Path) -> None:
    (folder / "clean" / "model.safetensors").write_bytes(pickle.dumps(Bomb(folder / "executed")))


def pickled_model_file(options: dict[str, Any], folder: Path) -> None:
    torch.save({"state_dict": Bomb(folder / "executed")}, folder / "encoder.pth")
    options["clean_encoder"] = str(folder / "encoder.pth")


def altered_weights(options: dict[str, Any], folder: Path) -> None:
    path = folder / "clean" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def no_card(options: dict[str, Any], folder: Path) -> None:
    (folder / "clean" / "model.json").unlink()


def file_as_output(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "file").touch()
    return {"output": str(folder / "file" / "run")}


CASES: list[tuple[str, str, Change, str]] = [  # name, method, change, what the line says
    ("unknown key", "simclr", setting("update.epoch", 1), "unknown key 'simclr.update.epoch'; did you mean 'simclr.up"),
    ("wrong type", "simclr", setting("update.epochs", "two"), "key 'simclr.update.epochs' is 'two'; expected int"),
    ("no data", "simclr", setting("data.path", "{folder}/none"), "/none: not a prepared data set"),
    ("cut data", "simclr", cut_data, "data/images.npy: has"),
    ("no labels file", "simclr", cut_labels, "data/labels.npy: is missing"),
    ("no images", "simclr", setting("data.fraction", 0.01), "is none; raise it"),
    ("small subset", "simclr", setting("data.max_samples", 3), "3 samples are fewer than batch_size 4"),
    ("micro-batches", "simclr", setting("update.accumulation", 3), "key 'batch_size' is 4, not divisible by 1 ranks x"),
    ("architecture", "simclr", setting("arch", "small_cifr"), "unknown arch 'small_cifr': did you mean 'small_cifar'?"),
    ("normalization", "simclr", setting("normalization", "cifar"), "unknown normalization 'cifar'"),
    (
        "momentum",
        "simclr",
        setting("update.optimizer.momentum", -1.0),
        "simclr.update.optimizer.momentum' is -1.0",
    ),
    ("world size", "simclr", beside(world_size=2), "key 'world_size' asks for 2 ranks but 1 started; launch with"),
    ("half precision", "simclr", beside(precision="fp16"), "key 'precision' is fp16, which needs a GPU"),
    ("tracker", "simclr", beside(trainer={"trackers": ["tensorbord"]}), "key 'trainer.trackers' names 'tensorbord'"),
    ("output", "simclr", file_as_output, "file is not a folder that can be written"),
    ("no model", "badencoder", setting("clean_encoder", "{folder}/none"), "none/model.json does not exist"),
    ("no card", "badencoder", no_card, "clean/model.json does not exist"),
    ("altered weights", "badencoder", altered_weights, "model.safetensors was altered"),
    ("pickled weights", "badencoder", pickled_weights, "model.safetensors is a pickle"),
    ("pickled file", "badencoder", pickled_model_file, "encoder.pth is a file, not a model folder"),
    ("trigger's size", "badencoder", small_trigger, "is 15x15 px but the images are 16x16 px"),
    ("large trigger", "badencoder", setting("attack.trigger.size", 16), "does not fit into 16 px images"),
    ("pickled trigger", "badencoder", pickled_trigger, "trigger.npz is damaged, pickled or no npz file"),
    ("no trigger", "badencoder", setting("attack.trigger", NO_FILE), "none.npz does not exist"),
    ("only a trigger", "badencoder", setting("attack.rate", 0.5), "key 'badencoder.attack.rate' is 0.5; all shadow"),
    ("old poison", "classifier", renamed("attack", "poison"), "'classifier.poison' is called 'classifier.attack' now"),
    ("old trigger", "probe", renamed("attack", "trigger"), "key 'probe.trigger' is called 'probe.attack.trigger' now"),
    ("references", "badencoder", more_references, "2 references need as many triggers"),
    ("reference class", "badencoder", setting("reference.target_class", 3), "key 'reference.target_class' is 3"),
    ("reference number", "badencoder", setting("reference.number", 8), "key 'reference.number' is 8"),
    ("small shadow", "badencoder", setting("shadow.max_samples", 3), "3 samples are fewer than batch_size 4"),
    ("no teacher", "mimic", setting("teacher", "{folder}/none"), "none/model.json does not exist"),
    ("three weights", "mimic", setting("attention_weights", [1, 1, 1]), "key 'mimic.attention_weights' has 3 values"),
    ("last epochs", "mimic", setting("information.last_epochs", 3), "key 'mimic.information.last_epochs' is 3"),
    ("small clean data", "mimic", setting("data.max_samples", 3), "3 samples are fewer than batch_size 4"),
    ("target class", "probe", setting("tasks.noise.target_class", 3), "key 'probe.tasks.noise.target_class' is 3"),
    ("small task", "probe", setting("update.batch_size", 14), "13 images are fewer than key 'probe.update.batch_size'"),
    ("probe's trigger", "probe", small_trigger, "is 15x15 px but the images are 16x16 px"),
    ("unlabelled", "probe", unlabelled, "test: has images without a label"),
    ("probe's encoder", "probe", setting("encoders.other", "{folder}/none"), "none/model.json does not exist"),
]


@pytest.mark.parametrize(("method", "change", "told"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_run_is_refused(
    method: str, change: Change, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(method, tmp_path)
    config = make_experiment(tmp_path, method, options)
    content = yaml.safe_load(config.read_text())
    content |= change(content[method], tmp_path) or {}
    config.write_text(yaml.safe_dump(content))
    for dry in ([], ["--dry-run"]):  # which refuses whatever a run refuses
        assert told in refused(["run", str(config), *dry], capsys)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "executed").exists()


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path: Path) -> None:
    """What the tests above stand on."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_missing_or_binary_experiment_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml: cannot read the configuration: No such file" in refused(
        ["run", str(tmp_path / "none.yaml")], capsys
    )
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the configuration: not a text file" in refused(["run", str(tmp_path / "x.yaml")], capsys)


@pytest.mark.skipif(not ffcv_installed(), reason="only ffcv writes .beton")
def test_a_truncated_beton(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("simclr", tmp_path) | {"data": {"path": make_data(tmp_path / "beton", storage="beton")}}
    path = tmp_path / "beton" / "data.beton"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    config = make_experiment(tmp_path, "simclr", options, loader={"backend": "auto"})
    assert "beton/data.beton: has" in refused(["run", str(config)], capsys)
    assert "beton/data.beton: has" in refused(["data", "info", str(tmp_path / "beton")], capsys)
    manifest = tmp_path / "beton" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["data.beton"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not a whole"):  # the file itself is checked too
        open_dataset(tmp_path / "beton").images(np.array([0]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["objects", "cut", "pickle"])
def test_npz_files_that_are_not_images(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, labels = tmp_path / "train.npz", np.zeros(4, dtype=np.int64)
    if damage == "objects":
        np.savez(path, x=np.array([Bomb(tmp_path / "executed")] * 4, dtype=object), y=labels)
    else:
        np.savez(path, x=np.zeros((4, 8, 8, 3), dtype=np.uint8), y=labels)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    if damage == "pickle":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    told = refused(["data", "prepare", "npz", "--path", str(path), "--out", str(tmp_path / "out")], capsys)
    assert str(path) in told
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Bomb(tmp_path / "executed")}, tmp_path / "encoder.pth")
    told = refused(["import", str(tmp_path / "encoder.pth"), "--out", str(tmp_path / "model")], capsys)
    assert "could run code, and was not loaded" in told
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "model").exists()


def test_a_pickle_as_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even one whose checksums were put right."""
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    folder = tmp_path / "run" / "checkpoints" / "step_000000001"
    folder.mkdir(parents=True)
    content = {"tensors.safetensors": pickle.dumps(Bomb(tmp_path / "executed")), "state.json": b"{}"}
    for name, data in content.items():
        (folder / name).write_bytes(data)
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
    (folder / "COMPLETE").write_text(json.dumps(sums))
    capsys.readouterr()
    assert main(["run", str(config)]) == 2
    assert "step_000000001: not a checkpoint of this program" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "executed").exists()


def test_another_experiment_in_the_same_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path))
    assert main(["run", str(config)]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    told = refused(["run", str(config), "simclr.update.optimizer.lr=0.5"], capsys)
    assert "holds another experiment: key 'simclr.update.optimizer.lr' is 0.01 there and 0.5 here" in told
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_encoders_of_two_widths_do_not_fit_one_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("probe", tmp_path)
    make_model(tmp_path / "wide", arch="resnet18_cifar")
    options["encoders"]["wide"] = str(tmp_path / "wide")
    config = make_experiment(tmp_path, "probe", options)
    assert "key 'encoders' mixes feature sizes [256, 512]" in refused(["run", str(config)], capsys)
