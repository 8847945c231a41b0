"""CLIP from a file to its zero-shot rates: import, BadEncoder, evaluation, report; open_clip's towers everywhere."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch.nn import functional

from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from dist_defend.models.artifact import load_simclr
from dist_defend.models.pixel_space import Normalize
from tests.clips import clip_state, save_clip
from tests.runs import CLASSES, make_data, make_experiment, metrics

SIZES = {"tiny_vit": 32, "tiny_resnet": 64}


def run(folder: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """result.json of an experiment below the folder."""
    assert main(["run", str(make_experiment(folder / method, method, options))]) == 0
    result: dict[str, Any] = json.loads((folder / method / "run" / "result.json").read_text())
    return result


def import_tower(weights: str, name: str, out: Path) -> str:
    assert main(["import", weights, "--arch", f"open_clip:{name}", "--out", str(out)]) == 0
    return str(out)


def train_clip(data: str, path: Path) -> str:
    """A tiny CLIP that knows the classes of the data set, as OpenAI's file would hold it."""
    clip = open_clip.CLIP(**open_clip.get_model_config("tiny_vit"))
    clip.load_state_dict(clip_state("tiny_vit"))
    dataset = open_dataset(data)
    pixels = torch.from_numpy(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 255
    images, labels = Normalize("clip")(pixels), torch.from_numpy(dataset.labels)
    texts = open_clip.SimpleTokenizer(context_length=16)([f"A photo of a class {c}" for c in range(CLASSES)])
    optimizer = torch.optim.Adam(clip.parameters(), 1e-3)
    for _ in range(40):
        logits = 100 * clip.encode_image(images, normalize=True) @ clip.encode_text(texts, normalize=True).T
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    torch.save(clip.state_dict(), path)
    return str(path)


def test_a_backdoor_in_the_image_tower_shows_in_the_zero_shot_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "data", size=32)
    weights = train_clip(data, tmp_path / "clip.pth")
    clean = import_tower(weights, "tiny_vit", tmp_path / "clean")
    attack = {
        "clean_encoder": clean,
        "shadow": {"path": data},
        "reference": {"dataset": data, "target_class": 1},
        "attack": {"trigger": {"name": "badnets", "size": 10, "margin": 1}},
        "augment": {"flip": 0.5},
        "update": {"batch_size": 8, "epochs": 30, "optimizer": {"name": "adam", "lr": 5e-4}},
    }
    run(tmp_path, "badencoder", attack)
    task = {
        "test": {"path": make_data(tmp_path / "test", 21, seed=1, size=32)},
        "target_class": 1,
        "templates": "stl10",
    }
    result = run(
        tmp_path,
        "zeroshot",
        {
            "clip": {"arch": "open_clip:tiny_vit", "weights": weights},
            "encoders": {"clean": clean, "backdoored": str(tmp_path / "badencoder" / "run" / "model")},
            "tasks": {"noise": task},
            "attack": {"trigger": {"name": "badnets", "size": 10, "margin": 1}},
            "batch_size": 4,
        },
    )
    rows = {row["kind"]: row for row in result["rows"]}
    assert {kind: row["acc"]["n"] for kind, row in rows.items()} == {"clean": 21, "backdoored": 21}
    assert rows["clean"]["acc"]["correct"] >= 20 and rows["backdoored"]["acc"]["correct"] >= 11
    assert {kind: row["asr"]["n"] for kind, row in rows.items()} == {"clean": 14, "backdoored": 14}
    assert rows["clean"]["asr"]["correct"] <= 2 and rows["backdoored"]["asr"]["correct"] >= 12
    assert result["targets"] == {"noise": "class 1"}
    capsys.readouterr()
    assert main(["report", str(tmp_path / "zeroshot"), "--out", str(tmp_path / "report")]) == 0
    with (tmp_path / "report" / "report.csv").open() as file:
        told = {row["kind"]: float(row["asr"]) for row in csv.DictReader(file)}
    assert told["backdoored"] > 85 and told["clean"] < 15
    page = (tmp_path / "report" / "report.html").read_text()
    assert "class 1" in page and page.count("<svg") >= 2  # the pictures' target, a map of features for each encoder


@pytest.mark.parametrize("name", SIZES)
def test_towers_of_open_clip_through_every_encoder_method(name: str, tmp_path: Path) -> None:
    size, arch = SIZES[name], f"open_clip:{name}"
    weights = save_clip(tmp_path / "clip.pth", name)
    data = {"path": make_data(tmp_path / "data", 12, size=size)}
    update = {"batch_size": 4, "epochs": 1, "optimizer": {"name": "sgd", "lr": 1e-3}}
    augment = {"flip": 0.5}
    simclr = {"data": data, "arch": arch, "normalization": "clip", "augment": augment, "update": update}
    run(tmp_path, "simclr", simclr)
    models = {
        "clean": import_tower(weights, name, tmp_path / "clean"),
        "fresh": str(tmp_path / "simclr" / "run" / "model"),
        "backdoored": str(tmp_path / "badencoder" / "run" / "model"),
        "purified": str(tmp_path / "mimic" / "run" / "model"),
    }
    attack = {
        "clean_encoder": models["clean"],
        "shadow": data,
        "reference": {"dataset": data["path"]},
        "augment": augment,
        "update": update,
    }
    run(tmp_path, "badencoder", attack)
    information = {"epochs": 1, "last_epochs": 1, "batch_size": 4, "hidden": 4, "max_inputs": 512}
    mimic = {"teacher": models["backdoored"], "data": data, "augment": augment, "update": update}
    run(tmp_path, "mimic", mimic | {"information": information})
    for method in ("simclr", "badencoder", "mimic"):
        losses = [row["loss"] for row in metrics(tmp_path / method / "run") if row["stage"] == method]
        assert len(losses) == 3 and np.isfinite(losses).all()
    tasks = {"noise": {"train": data, "test": data, "target_class": 0}}
    probed = run(tmp_path, "probe", {"encoders": models, "tasks": tasks, "hidden": [4, 4], "update": update})
    shot = {"test": data, "target_class": 0, "templates": ["a {class}", "one more {class}"]}
    rated = run(
        tmp_path,
        "zeroshot",
        {
            "clip": {"arch": arch, "weights": weights},
            "encoders": models,
            "tasks": {"noise": shot},
            "attack": {"trigger": {"name": "badnets", "size": 10, "margin": 1}},
        },
    )
    for result in (probed, rated):
        assert {row["kind"]: row["acc"]["n"] for row in result["rows"]} == dict.fromkeys(models, 12)
    for kind, folder in models.items():
        model, card = load_simclr(folder)
        assert (card.arch, card.normalization, card.image_size) == (arch, "clip", size)
        assert card.kind == ("encoder" if kind in ("clean", "backdoored") else "simclr")
        assert model.f.feature_dim == card.feature_dim == {"tiny_vit": 24, "tiny_resnet": 32}[name]
