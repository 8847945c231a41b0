"""ResNet-50 and ViT-S of timm at 224 px through all four encoder methods: JPEG files, FFCV, two ranks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image
from sklearn.datasets import load_sample_images

from dist_defend import experiment
from dist_defend.cli import main
from dist_defend.config import load_experiment
from dist_defend.models.artifact import load_artifact, load_simclr
from tests.ranks import Pool
from tests.runs import make_experiment, metrics

BATCH, SIZE = 4, 224


def cut_photographs(folder: Path) -> None:
    """Two classes of JPEG files, 256 to 300 px: pieces of scikit-learn's two photographs."""
    generator = np.random.default_rng(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(BATCH):
            height, width = generator.integers(256, 300, 2)
            top = generator.integers(0, photograph.shape[0] - height)
            left = generator.integers(0, photograph.shape[1] - width)
            piece = photograph[top : top + height, left : left + width]
            Image.fromarray(piece).save(folder / name / f"{number}.jpg", quality=90)


def run(config: str) -> None:
    """`dist-defend run` on one of the pool's ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "end_training", lambda self: None)  # the pool's process group lives on
        experiment.run(load_experiment(config))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm:resnet50", "timm:vit_small_patch16_224"])
@pytest.mark.timeout(900)
def test_four_methods_at_224_pixels(arch: str, two_ranks: Pool, tmp_path: Path) -> None:
    cut_photographs(tmp_path / "photographs")
    for split, more in (("crops", []), ("squares", ["--image-size", str(SIZE)])):
        command = [
            "data",
            "prepare",
            "imagefolder",
            "--path",
            str(tmp_path / "photographs"),
            "--out",
            str(tmp_path / split),
        ]
        assert main([*command, "--write-mode", "jpg", *more]) == 0
    crops, squares = ({"path": str(next((tmp_path / s).rglob("manifest.json")).parent)} for s in ("crops", "squares"))
    update = {"batch_size": BATCH, "epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-3}}
    views = {"crop": "random_resized", "size": SIZE, "flip": 0.5, "jitter": 0.8, "grayscale": 0.2}
    stages: dict[str, dict[str, Any]] = {
        "simclr": {"data": crops, "arch": arch, "normalization": "imagenet", "augment": views, "update": update},
        "badencoder": {
            "clean_encoder": str(tmp_path / "simclr" / "run" / "model"),
            "shadow": squares,
            "reference": {"dataset": squares["path"], "target_class": 1},
            "attack": {"trigger": {"name": "badnets", "size": 50, "margin": 1}},
            "update": update,
        },
        "mimic": {
            "teacher": str(tmp_path / "badencoder" / "run" / "model"),
            "data": squares,
            "information": {"epochs": 1, "last_epochs": 1, "batch_size": BATCH, "hidden": 4, "max_inputs": 4096},
            "augment": views,
            "update": update,
        },
        "probe": {
            "encoders": {
                "backdoored": str(tmp_path / "badencoder" / "run" / "model"),
                "purified": str(tmp_path / "mimic" / "run" / "model"),
            },
            "tasks": {"photographs": {"train": squares, "test": squares, "target_class": 0}},
            "attack": {"trigger": {"name": "badnets", "size": 50, "margin": 1}},
            "hidden": [8, 4],
            "update": {"batch_size": BATCH, "epochs": 2, "optimizer": {"name": "adam", "lr": 1e-3}},
        },
    }
    for method, options in stages.items():
        config = make_experiment(tmp_path / method, method, options, loader={"backend": "ffcv", "workers": 1})
        two_ranks.run(run, str(config), timeout=400)
        rows = [row for row in metrics(tmp_path / method / "run") if "loss" in row]
        assert len(rows) == (4 if method == "probe" else 2)
        assert all(np.isfinite(row["loss"]) for row in rows)
        result = json.loads((tmp_path / method / "run" / "result.json").read_text())
        assert result["world_size"] == 2
    assert {row["acc"]["n"] for row in result["rows"]} == {2 * BATCH}
    purified, card = load_simclr(tmp_path / "mimic" / "run" / "model")
    assert (card.arch, card.image_size, purified.f.feature_dim) == (arch, SIZE, 2048 if "resnet" in arch else 384)
    assert load_artifact(tmp_path / "badencoder" / "run" / "model")[1].backdoored
