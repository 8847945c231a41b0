"""The encoder and classifier methods on a GPU: the CPU's first loss, half precisions, bit-exact resume."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dist_defend.cli import main
from tests.runs import make_experiment, metrics, options_of

METHODS = ["simclr", "badencoder", "mimic", "probe", "classifier"]
# Six times what rounding a convolution's images and weights to TF32 changes on a CPU, or more. MIMIC's stages are
# weighted by estimates of mutual information, small differences of sums, which it changes by up to two fifths.
TF32_LIMITS = dict.fromkeys(METHODS, 3e-3) | {"mimic": 0.12}


def first_loss(run: Path) -> float:
    return next(float(row["loss"]) for row in metrics(run) if "loss" in row)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("is_rounded", [False, True])
def test_the_first_loss_is_the_cpus(
    method: str, is_rounded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full float32, and with the TF32 convolutions that a GPU takes by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", is_rounded)
    config = make_experiment(tmp_path, method, options_of(method, tmp_path))
    assert main(["run", str(config)]) == 0
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "dist_defend", "run", str(config), f"output={tmp_path / 'cpu'}"]
    subprocess.run(command, env=hidden, check=True, timeout=240)
    assert json.loads((tmp_path / "cpu" / "result.json").read_text())["device"] == "cpu"
    assert first_loss(tmp_path / "run") == pytest.approx(
        first_loss(tmp_path / "cpu"), rel=TF32_LIMITS[method] if is_rounded else 1e-3
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precisions_train(method: str, precision: str, tmp_path: Path) -> None:
    config = make_experiment(tmp_path, method, options_of(method, tmp_path))
    assert main(["run", str(config), f"precision={precision}"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["device"] == torch.cuda.get_device_name()
    assert all(abs(row["loss"]) < 1e4 for row in metrics(tmp_path / "run") if "loss" in row)


@pytest.mark.parametrize("method", ["simclr", "mimic", "classifier"])
def test_a_run_that_was_cut_ends_like_a_whole_one(method: str, tmp_path: Path) -> None:
    config = make_experiment(tmp_path, method, options_of(method, tmp_path))
    command = ["run", str(config), "trainer.checkpoint_every=1", "trainer.keep_checkpoints=99"]
    assert main(command) == 0
    run = tmp_path / "run"
    weights = load_file(run / "model" / "model.safetensors")
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    for later in sorted((run / "checkpoints").glob("step_*"))[2:]:
        shutil.rmtree(later)
    assert main(command) == 0
    again = load_file(run / "model" / "model.safetensors")
    assert all(again[key].equal(value) for key, value in weights.items())
