"""Tiny data sets, models and experiment files that a run needs seconds for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from dist_defend.data.sources import ArraySource
from dist_defend.data.store import write_dataset
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_simclr

SIZE = 16  # pixels
CLASSES = 3


def make_data(folder: Path, count: int = 24, seed: int = 0, size: int = SIZE, storage: str = "npy") -> str:
    """A prepared data set of noise whose brightness tells its class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    noise = generator.integers(0, 120, (count, size, size, 3))
    images = (noise + 60 * labels[:, None, None, None]).astype(np.uint8)
    names = [f"class {c}" for c in range(CLASSES)]
    write_dataset(ArraySource(images, labels, names), folder, name="noise", split="train", storage=storage)
    return str(folder)


def make_model(folder: Path, seed: int = 0, size: int = SIZE, arch: str = "small_cifar", projector: bool = True) -> str:
    """A model folder with an encoder of fresh weights, whose batch norms have seen some noise."""
    torch.manual_seed(seed)
    model = build_simclr(arch, "cifar10", image_size=size, projector=projector)
    with torch.no_grad():
        model.train()(torch.rand(16, 3, size, size))
    save_artifact(folder, model, ModelCard(model.kind, arch, "cifar10", size, model.f.feature_dim))
    return str(folder)


def make_classifier(
    folder: Path, seed: int = 0, size: int = SIZE, arch: str = "small_resnet", attack: dict[str, Any] | None = None
) -> str:
    """As make_model, a classifier; ``attack``: the one (AttackConfig's fields) that its card tells of."""
    torch.manual_seed(seed)
    model = build_classifier(arch, CLASSES, "none", image_size=size)
    with torch.no_grad():
        model.train()(torch.rand(16, 3, size, size))
    card = ModelCard(
        "classifier", arch, "none", size, num_classes=CLASSES, backdoored=attack is not None, attack=attack
    )
    save_artifact(folder, model, card)
    return str(folder)


def make_experiment(folder: Path, method: str, options: dict[str, Any], **changes: Any) -> Path:
    """folder/<method>.yaml with output folder/run; changes replace keys beside the method's section."""
    content = {
        "method": method,
        "output": str(folder / "run"),
        "trainer": {"log_every": 1, "trackers": []},
        "loader": {"backend": "resident", "workers": 1},
        **changes,
        method: options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def options_of(method: str, folder: Path) -> dict[str, Any]:
    """The method's section for two epochs of two updates, with everything it reads made in ``folder``."""
    optimizer = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    update = {"batch_size": 4, "epochs": 2, "optimizer": optimizer}
    augment = {"flip": 0.5}
    size = 32 if method in ("mimic", "nad_simclr") else SIZE  # 16 pixels end in an attention map of one
    data = {"path": make_data(folder / "data", size=size), "max_samples": 8}
    if method == "simclr":
        return {"data": data, "arch": "small_cifar", "augment": augment, "update": update}
    if method == "classifier":
        return {
            "data": data,
            "test": {"path": make_data(folder / "test", 13, seed=1)},
            "arch": "small_resnet",
            "normalization": "none",
            "augment": {"crop": "pad", "flip": 0.5},
            "attack": {"trigger": {"name": "badnets"}, "target_class": 1, "count": 3},
            "update": update,
        }
    if method in ("badencoder", "drupe"):
        return {
            "clean_encoder": make_model(folder / "clean"),
            "shadow": data,
            "reference": {"dataset": data["path"], "target_class": 1, "count": 2 if method == "drupe" else 1},
            "attack": {"trigger": {"name": "badnets", "size": 4, "margin": 1}},
            "augment": augment,
            "update": update,
        }
    if method in ("kd", "ood"):
        return {
            "teacher": make_classifier(folder / "teacher", attack={"trigger": {"name": "badnets"}, "target_class": 1}),
            "data": data,
            "test": {"path": make_data(folder / "test", 13, seed=1)},
            "student": "small_resnet",
            "update": update,
        }
    if method in ("ft_simclr", "nad_simclr"):
        own = {"teacher": make_model(folder / "teacher", 1, size)} if method == "nad_simclr" else {}
        return {
            "model": make_model(folder / "suspect", size=size),
            "data": data,
            "augment": augment,
            "update": update,
        } | own
    if method == "mimic":
        information = {"epochs": 2, "last_epochs": 1, "batch_size": 5, "hidden": 8}
        teacher = make_model(folder / "teacher", size=size)
        return {"teacher": teacher, "data": data, "information": information, "augment": augment, "update": update}
    return {
        "encoders": {"clean": make_model(folder / "clean"), "other": make_model(folder / "other", seed=1)},
        "tasks": {
            "noise": {
                "train": data | {"max_samples": 13},
                "test": {"path": make_data(folder / "test", 21, seed=1)},
                "target_class": 0,
            }
        },
        "attack": {"trigger": {"name": "badnets", "size": 4, "margin": 1}},
        "seeds": [1, 2],
        "hidden": [8, 4],
        "update": {"batch_size": 4, "epochs": 4, "optimizer": {"name": "adam", "lr": 0.03}},
    }


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The same without what a clock says."""
    clocks = ("time", "work_seconds", "images_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in metrics(run)]
