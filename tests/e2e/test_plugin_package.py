"""examples/plugin, installed as a user installs it: its method, trigger, network and constants in runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import make_data, make_experiment

EXAMPLE = Path(__file__).parents[2] / "examples/plugin"
UPDATE = {"batch_size": 16, "epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the example into, without network."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--target", str(folder / "packages"), str(folder / "source")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "packages"


def dist_defend(*words: str, packages: Path | None = None, status: int = 0) -> str:
    """What the program prints, to both streams, with the packages on Python's path or without."""
    path = os.pathsep.join([*([str(packages)] if packages else []), str(EXAMPLE.parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "dist_defend", *words],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "100"},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and run/ of a poisoned classifier of the package's architecture and normalization."""
    folder = tmp_path_factory.mktemp("trained")
    options: dict[str, Any] = {
        "data": {"path": make_data(folder / "data", 48)},
        "test": {"path": make_data(folder / "test", 24, seed=1)},
        "arch": "tiny_net",
        "normalization": "tiny_images",
        "augment": {"crop": "none"},
        "attack": {"trigger": {"name": "stripes", "amplitude": 60}, "target_class": 1, "rate": 0.2},
        "update": UPDATE | {"epochs": 12},
    }
    dist_defend("run", str(make_experiment(folder, "classifier", options)), packages=packages)
    return folder


def test_the_lists_name_the_package(packages: Path) -> None:
    line = next(line for line in dist_defend("methods", packages=packages).splitlines() if line.startswith("fine_tune"))
    assert line.split()[1:] == ["dist-defend-example", "1.0", "example_plugin.fine_tune"]
    models = {
        line.split()[0]: line.split()[1:3] for line in dist_defend("models", packages=packages).splitlines() if line
    }
    assert models["tiny_net"] == models["tiny_images"] == ["dist-defend-example", "1.0"]
    attacks = {
        line.split()[0]: line.split()[1:3] for line in dist_defend("attacks", packages=packages).splitlines() if line
    }
    assert attacks["stripes"] == ["dist-defend-example", "1.0"] and attacks["sig"][0] == "dist-defend"
    assert "amplitude: float = 20.0" in dist_defend("attacks", "stripes", packages=packages)
    assert "fine_tune" not in dist_defend("methods") and "tiny_net" not in dist_defend("models")
    assert "0.25 0.25 0.25" in dist_defend("models", "tiny_images", packages=packages)


def test_the_methods_keys_are_told(packages: Path) -> None:
    told = dist_defend("methods", "fine_tune", packages=packages)
    assert max(map(len, told.splitlines())) <= 100
    assert "  smoothing: float = 0.0\n      share of each label that is spread over all classes" in told
    assert "Liu et al. (2018" in told and "(no meaning" not in told


def test_its_experiment_file_is_whole(packages: Path) -> None:
    told = dist_defend("run", str(EXAMPLE / "fine_tune.yaml"), "--print-config", "seed=7", packages=packages)
    resolved = yaml.safe_load(told)
    assert resolved["fine_tune"]["update"] | {"optimizer": None} == {
        "batch_size": 128, "epochs": 5, "accumulation": 1, "max_grad_norm": None, "recompute": False, "compile": False,
        "optimizer": None,
    }  # fmt: skip
    assert resolved["fine_tune"]["update"]["optimizer"]["name"] == "sgd" and resolved["seed"] == 7


@pytest.mark.parametrize("change", ["smoothing=1", "smoothing=-0.1", "evaluate_every=0"])
def test_its_values_are_checked(change: str, packages: Path) -> None:
    words = ("run", str(EXAMPLE / "fine_tune.yaml"), f"fine_tune.{change}")
    told = dist_defend(*words, packages=packages, status=2)
    assert f"key 'fine_tune.{change.partition('=')[0]}' is" in told and told.count("\n") == 1


def test_its_method_cleans_a_model_of_its_architecture(packages: Path, trained: Path, tmp_path: Path) -> None:
    options = {
        "model": str(trained / "run/model"),
        "data": {"path": str(trained / "data"), "max_samples": 32},
        "test": {"path": str(trained / "test")},
        "augment": {"crop": "none"},
        "update": UPDATE,
    }
    experiment = str(make_experiment(tmp_path, "fine_tune", options))
    planned = dist_defend("plan", experiment, "--world-size", "2", packages=packages)
    assert "stage fine_tune: 2 rank(s), ddp, 1 micro-batch(es) of 8 images on each" in planned
    dist_defend("run", experiment, packages=packages)
    result = json.loads((tmp_path / "run/result.json").read_text())
    card = json.loads((tmp_path / "run/model/model.json").read_text())
    assert (card["arch"], card["normalization"], card["defended_by"]) == ("tiny_net", "tiny_images", "fine_tune")
    assert card["counts"]["before"]["acc"]["n"] == card["counts"]["after"]["acc"]["n"] == 24
    wanted = {"name": "stripes", "width": 2, "amplitude": 60.0}
    assert card["attack"]["trigger"] == wanted
    assert card["counts"]["before"]["asr"]["n"] == 16  # images of the other two classes
    assert card["counts"]["after"]["acc"]["correct"] > 8  # of three classes that brightness tells
    assert result["metrics"]["acc_before"] == pytest.approx(100 * card["counts"]["before"]["acc"]["correct"] / 24)
    words = ("evaluate", str(tmp_path / "run/model"), "--data", str(trained / "test"), "--out", str(tmp_path / "seen"))
    dist_defend(*words, packages=packages)
    seen = json.loads((tmp_path / "seen/result.json").read_text())["rows"][0]
    assert [seen[key] for key in ("acc", "asr")] == [card["counts"]["after"][key] for key in ("acc", "asr")]
    told = dist_defend(*words, status=2)  # on a machine without the package
    assert "unknown arch 'tiny_net'" in told and told.count("\n") == 1
