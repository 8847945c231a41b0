"""Any trigger works for any method, and later runs measure what the model card names, recounted by numpy and torch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_defend.attacks.attack import AttackConfig, attack_from
from dist_defend.attacks.input_aware import Generators, save_generators
from dist_defend.attacks.own_trigger import FromFile
from dist_defend.attacks.patterns import (
    BadNets,
    Blended,
    Bpp,
    Ctrl,
    InputAware,
    L0Inv,
    L2Inv,
    LabelConsistent,
    LowFrequency,
    Sig,
    SigWrapped,
    TriggerConfig,
    Trojan,
    WaNet,
)
from dist_defend.attacks.poison import triggered
from dist_defend.attacks.random_patch import RandomPatch
from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from dist_defend.methods.attack.badencoder import BadEncoderObjective
from dist_defend.models.artifact import load_artifact, load_classifier, load_simclr, save_artifact
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment, make_model, options_of

KEY = np.random.default_rng(8).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
TRIGGERS: list[TriggerConfig] = [
    BadNets(pattern="grid"), Blended(), Sig(), SigWrapped(), Trojan(pattern="patch", wrap=True), L0Inv(), L2Inv(),
    LabelConsistent(), LowFrequency(), WaNet(), Bpp(),
    Ctrl(window=SIZE, positions=(7, 15)), RandomPatch(size=4),
    InputAware("generators.safetensors", normalization="none"),
]  # fmt: skip


def blended(folder: Path) -> dict[str, Any]:
    """A fifth of KEY."""
    np.save(folder / "key.npy", KEY)
    return {"name": "blended", "alpha": 0.2, "image": str(folder / "key.npy")}


def published_npz(folder: Path) -> dict[str, Any]:
    """BadEncoder's file of two triggers: white squares of 4 px and, for the second reference, of 6 px."""
    t, tm = np.zeros((2, SIZE, SIZE, 3)), np.ones((2, SIZE, SIZE, 3), np.int64)
    for number, side in enumerate((4, 6)):
        t[number, -side:, -side:], tm[number, -side:, -side:] = 255, 0
    np.savez(folder / "t.npz", t=t, tm=tm)
    return {"name": "file", "file": str(folder / "t.npz")}


class Seen(nn.Module):
    """An encoder that remembers its images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images.detach()
        features: Tensor = self.layer(images.mean((2, 3)))
        return features


@pytest.mark.parametrize("options", TRIGGERS, ids=lambda options: options.name)
def test_badencoders_objective_stamps_what_a_poisoned_classifier_sees(
    options: TriggerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the truncation to uint8, which the objective's float images do not have."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_generators("generators.safetensors", Generators(SIZE, "none"))
    dataset = open_dataset(make_data(tmp_path / "data", 5))
    rows = np.arange(5)
    x, stamped = (
        torch.from_numpy(each.images(rows)).permute(0, 3, 1, 2).double() / 255
        for each in (dataset, triggered(dataset, AttackConfig(options)))
    )
    encoder: Any = Seen().double()
    objective = BadEncoderObjective(
        encoder, options.build_each(SIZE), x[:1], torch.ones(1, 4), lambda rows: torch.ones(len(rows), 4).double()
    )
    loss = objective(Batch((x, x), torch.zeros(5).long(), torch.from_numpy(rows)))["loss"]
    assert torch.isfinite(loss)
    levels = (encoder.images[5:10] - stamped) * 255
    assert levels.abs().max() < 1 and (encoder.images[5:10] - x).abs().max() > 0.01


def test_badencoders_references_may_share_a_trigger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("badencoder", tmp_path)
    options["reference"] |= {"count": 2}
    assert main(["run", str(make_experiment(tmp_path, "badencoder", options))]) == 2
    told = "2 references need as many triggers; key 'badencoder.attack.trigger' holds 1: add some, or say one_trigger"
    assert told in capsys.readouterr().err.splitlines()[-1]
    options["one_trigger"] = True
    assert main(["run", str(make_experiment(tmp_path, "badencoder", options))]) == 0
    assert load_simclr(tmp_path / "run/model")[1].provenance["target_classes"] == [1, 1]


def test_badencoder_takes_any_trigger(tmp_path: Path) -> None:
    options = options_of("badencoder", tmp_path) | {"attack": {"trigger": blended(tmp_path)}}
    assert main(["run", str(make_experiment(tmp_path, "badencoder", options))]) == 0
    card = load_artifact(tmp_path / "run/model")[1]
    assert card.attack is not None and card.backdoored
    trigger = Blended(alpha=0.2, image=str(tmp_path / "key.npy"))
    assert attack_from(card.attack) == AttackConfig(trigger, target_class=1, rate=1.0)


def test_two_references_take_two_triggers_of_one_file(tmp_path: Path) -> None:
    options = options_of("badencoder", tmp_path)
    images = open_dataset(options["shadow"]["path"]).images(np.arange(2))
    np.savez(tmp_path / "r.npz", x=images, y=np.array([2, 0]))
    options |= {"reference": {"file": str(tmp_path / "r.npz")}, "attack": {"trigger": published_npz(tmp_path)}}
    assert main(["run", str(make_experiment(tmp_path, "badencoder", options))]) == 0
    card = load_artifact(tmp_path / "run/model")[1]
    assert card.attack is not None and card.provenance["target_classes"] == [2, 0]
    assert attack_from(card.attack) == AttackConfig(FromFile(str(tmp_path / "t.npz")), target_class=2, rate=1.0)


def attacked_encoder(folder: Path, attack: dict[str, Any] | None) -> str:
    path = make_model(folder)
    model, card = load_simclr(path)
    save_artifact(path, model, replace(card, backdoored=attack is not None, attack=attack))
    return path


def test_a_probe_measures_the_attack_that_the_card_names(tmp_path: Path) -> None:
    options = options_of("probe", tmp_path)
    options["attack"] = None
    named = {"trigger": blended(tmp_path), "target_class": 1, "rate": 1.0}
    encoder = attacked_encoder(tmp_path / "clean", named)
    options |= {"encoders": {"backdoored": encoder}, "kind": "knn", "knn": {"k": 1, "temperature": 0.5}}
    assert main(["run", str(make_experiment(tmp_path, "probe", options, precision="fp64"))]) == 0
    test = open_dataset(options["tasks"]["noise"]["test"]["path"])
    clean = test.images(np.arange(len(test)))
    stamped = ((4 * clean.astype(int) + KEY) // 5).astype(np.uint8)
    pictures = load_file(tmp_path / "run/examples.safetensors")
    np.testing.assert_array_equal(pictures["noise/triggered"].numpy(), stamped[:8])
    model = load_simclr(encoder)[0].f.double().eval()

    def unit(images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return nn.functional.normalize(model(pixels.double()))

    train = open_dataset(options["tasks"]["noise"]["train"]["path"])
    bank = unit(train.images(np.arange(13)))
    on_clean, on_stamped = (train.labels[(unit(x) @ bank.T).argmax(1).numpy()] for x in (clean, stamped))
    others = test.labels != 0  # the task's target class, not the card's
    (row,) = json.loads((tmp_path / "run/result.json").read_text())["rows"]
    assert row["acc"] == {"correct": int((on_clean == test.labels).sum()), "n": len(test)}
    assert row["asr"] == {"correct": int((on_stamped[others] == 0).sum()), "n": int(others.sum())}
    assert row["asr_all"] == {"correct": int((on_stamped == 0).sum()), "n": len(test)}


def test_a_probe_of_clean_encoders_counts_accuracy_alone(tmp_path: Path) -> None:
    options = options_of("probe", tmp_path) | {"kind": "knn"}
    options["attack"] = None
    assert main(["run", str(make_experiment(tmp_path, "probe", options))]) == 0
    rows = json.loads((tmp_path / "run/result.json").read_text())["rows"]
    assert [row["acc"]["n"] for row in rows] == [21, 21] and {row["asr"]["n"] for row in rows} == {0}
    assert set(load_file(tmp_path / "run/features.safetensors")) == {
        f"{kind}/noise/{what}" for kind in ("clean", "other") for what in ("clean", "labels")
    }


def test_a_probe_takes_triggered_images_of_others(tmp_path: Path) -> None:
    options = options_of("probe", tmp_path)
    x = np.random.default_rng(4).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "bd.npz", x=x, y=np.arange(9) % CLASSES)
    options |= {"attack": {"trigger": None, "images": str(tmp_path / "bd.npz")}, "kind": "knn"}
    assert main(["run", str(make_experiment(tmp_path, "probe", options))]) == 0
    rows = json.loads((tmp_path / "run/result.json").read_text())["rows"]
    assert {(row["acc"]["n"], row["asr_all"]["n"], row["asr"]["n"]) for row in rows} == {(21, 9, 6)}


def test_cards_of_several_attacks_need_one_to_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("probe", tmp_path)
    options["attack"] = None
    square = {"trigger": {"name": "badnets", "size": 4}, "target_class": 1}
    attacked_encoder(tmp_path / "clean", {"trigger": blended(tmp_path)})
    attacked_encoder(tmp_path / "other", square)
    config = str(make_experiment(tmp_path, "probe", options))
    assert main(["run", config]) == 2
    told = capsys.readouterr().err
    assert "other names another attack in its card than is to be measured, which is another encoder's" in told
    attacked_encoder(tmp_path / "clean", square | {"target_class": 2, "rate": 1.0})  # classes are the tasks' own
    assert main(["run", config, "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["run", config, "--dry-run", "probe.attack={trigger: {name: sig}}"]) == 0
    told = capsys.readouterr().err
    assert told.count("another attack in its card than is to be measured: say 'attack: null'") == 2


@pytest.mark.parametrize("method", ["ibau", "rnp"])
def test_defences_of_a_network_that_badencoders_square_opens(method: str, tmp_path: Path) -> None:
    """The card names the published npz; the first of its triggers is stamped."""
    attack = {"trigger": published_npz(tmp_path), "target_class": 1}
    options: dict[str, Any] = {
        "model": make_classifier(tmp_path / "model", attack=attack),
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 12},
        "test": {"path": make_data(tmp_path / "test", 30, seed=1)},
    }
    options |= {"rounds": 1} if method == "ibau" else {"unlearning_epochs": 2, "schedule": [1], "recovering_epochs": 1}
    assert main(["run", str(make_experiment(tmp_path, method, options))]) == 0
    test = open_dataset(options["test"]["path"])
    images = test.images(np.arange(30))
    images[:, -4:, -4:] = 255
    counts = load_classifier(tmp_path / "run/model")[1].counts
    assert counts is not None
    others = test.labels != 1
    for folder, when in (("model", "before"), ("run/model", "after")):
        model = load_classifier(tmp_path / folder)[0].eval()
        with torch.no_grad():
            found = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy()
        assert counts[when]["asr"] == {"correct": int((found[others] == 1).sum()), "n": int(others.sum())}
