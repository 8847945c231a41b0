"""Model folders: what is written is what is read, and nothing else is."""

import dataclasses
import hashlib
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dist_defend.attacks.attack import attack_from
from dist_defend.errors import UserError
from dist_defend.models.artifact import ModelCard, load_artifact, load_classifier, load_simclr, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_simclr

CARD = ModelCard("simclr", "small_cifar", "cifar10", 32, 256, provenance={"method": "test"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_artifact(tmp_path / "model", build_simclr("small_cifar"), CARD)
    return tmp_path / "model"


def rewrite_card(folder: Path, **changes: object) -> None:
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, **changes}))


def test_a_model_survives_the_round_trip(tmp_path: Path) -> None:
    model = build_simclr("small_cifar")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    card = dataclasses.replace(CARD, backdoored=True, attack={"size": 10}, parent_sha256="ab")
    sha256 = save_artifact(tmp_path / "model", model, card)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    assert hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest() == sha256
    loaded, loaded_card = load_artifact(tmp_path / "model")
    assert loaded_card == card
    assert (loaded.arch, loaded.normalization, loaded.image_size) == ("small_cifar", "cifar10", 32)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(state[key].equal(expected[key]) for key in expected)


def test_an_encoder_without_projector_survives_too(tmp_path: Path) -> None:
    model = build_simclr("small_cifar", projector=False)
    save_artifact(tmp_path, model, dataclasses.replace(CARD, kind="encoder"))
    assert list(load_artifact(tmp_path)[0].state_dict()) == list(model.state_dict())


def test_a_classifier_survives_too_and_is_not_taken_for_an_encoder(tmp_path: Path, folder: Path) -> None:
    model = build_classifier("small_resnet", 7, "none", image_size=28)
    trigger = {"trigger": {"name": "badnets", "size": 3}, "target_class": 2}
    card = ModelCard("classifier", "small_resnet", "none", 28, num_classes=7, backdoored=True, attack=trigger)
    save_artifact(tmp_path / "classifier", model, card)
    loaded, loaded_card = load_classifier(tmp_path / "classifier")
    assert loaded_card == card
    assert (loaded.arch, loaded.num_classes, loaded.normalization, loaded.image_size) == ("small_resnet", 7, "none", 28)
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected) and all(state[key].equal(expected[key]) for key in expected)
    with pytest.raises(UserError, match=r"holds a classifier \(small_resnet\), not an encoder: point at"):
        load_simclr(tmp_path / "classifier")
    with pytest.raises(UserError, match=r"holds an encoder \(small_cifar\), not a classifier: point at"):
        load_classifier(folder)


def test_a_classifiers_card_needs_its_number_of_classes(folder: Path) -> None:
    for changes in ({"kind": "classifier"}, {"num_classes": 10}, {"kind": "classifier", "num_classes": "10"}):
        rewrite_card(folder, **{"kind": "simclr", "num_classes": None} | changes)
        with pytest.raises(UserError, match=r"contradicts itself \(keys BACKDOORED, backdoored, kind, num_classes\)"):
            load_artifact(folder)


def test_only_a_poisoned_model_says_so(folder: Path) -> None:
    assert "BACKDOORED" not in (folder / "model.json").read_text()
    save_artifact(folder, build_simclr("small_cifar"), dataclasses.replace(CARD, backdoored=True))
    assert '"BACKDOORED": true' in (folder / "model.json").read_text()


def test_a_poisoned_model_cannot_be_made_clean_by_one_key(folder: Path) -> None:
    save_artifact(folder, build_simclr("small_cifar"), dataclasses.replace(CARD, backdoored=True))
    rewrite_card(folder, backdoored=False)
    with pytest.raises(UserError, match="contradicts itself"):
        load_artifact(folder)


def test_altered_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"model.safetensors was altered: sha256 \w{12} is not model.json's \w{12}"):
        load_artifact(folder)


def test_weights_of_another_model_are_refused_with_keys_and_counts(folder: Path) -> None:
    rewrite_card(folder, kind="encoder")
    with pytest.raises(UserError, match=r"8 unexpected \(g.0.weight, g.1.bias, g.1.num_batches_tracked, ...\)"):
        load_artifact(folder)
    rewrite_card(folder, kind="simclr", arch="resnet18_cifar")
    told = r"48 missing \(f.f.3.1.conv1.weight, .*misshapen \(f.f.0.weight \(16, 3, 3, 3\)"
    with pytest.raises(UserError, match=told) as error:
        load_artifact(folder)
    assert "\n" not in str(error.value)


def test_a_pickle_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    for content in (pickle.dumps(Bomb()), b"PK\x03\x04 torch.save's zip"):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=r"is a pickle, not safetensors.*dist-defend import"):
            load_artifact(folder)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(UserError, match=r"is a file, not a model folder.*dist-defend import"):
        load_artifact(folder / "model.safetensors")


def test_missing_and_broken_files_are_user_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.json does not exist: point at a folder"):
        load_artifact(tmp_path / "nothing")
    card = (folder / "model.json").read_text()
    for text, told in (
        ("{", "cannot be read"),
        ("[]", "is not a model card of format 2"),
        (card.replace('"format": 2', '"format": 3'), "is not a model card of format 2"),
        (card.replace('"arch"', '"architecture"'), "is not what it should be .*architecture"),
        (card.replace("small_cifar", "small_cifr"), "did you mean 'small_cifar'"),
    ):
        (folder / "model.json").write_text(text)
        with pytest.raises(UserError, match=told):
            load_artifact(folder)
    (folder / "model.json").write_text(card)
    weights = (folder / "model.safetensors").read_bytes()[:100]
    (folder / "model.safetensors").write_bytes(weights)
    rewrite_card(folder, sha256=hashlib.sha256(weights).hexdigest())
    with pytest.raises(UserError, match="is not a safetensors file"):
        load_artifact(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model.safetensors does not exist"):
        load_artifact(folder)


def test_a_failed_write_leaves_the_old_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_artifact(folder)[0].state_dict()

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_artifact(folder, build_simclr("small_cifar"), CARD)
    after = load_artifact(folder)[0].state_dict()
    assert all(after[key].equal(before[key]) for key in before)


COUNT = {"correct": 1, "n": 2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": 0}, "key 'image_size' is 0; it must be in 1 to 4096"),
        ({"image_size": 10**6}, "key 'image_size' is 1000000"),
        ({"image_size": "32"}, "image_size"),
        ({"image_size": True}, "true and false are no numbers"),
        ({"image_size": 32.0}, "image_size"),
        ({"resize": -1}, "key 'resize' is -1"),
        ({"feature_dim": 0}, "key 'feature_dim' is 0"),
        ({"arch": None}, "arch"),
        ({"backdoored": 0}, "contradicts itself"),
        ({"kind": ["simclr"]}, "contradicts itself"),
        ({"kind": "encodr"}, "contradicts itself"),
        ({"provenance": []}, "provenance"),
        ({"classes": "abc"}, "a text stands where a list belongs"),
        ({"guessed": ["colour"]}, "key 'guessed' names \\['colour'\\]"),
        ({"parent_sha256": "../x"}, "key 'parent_sha256' is no sha256"),
        ({"sha256": "AB"}, "key 'sha256' is no sha256 in hex"),
        ({"sha256": None}, "key 'sha256' is no sha256 in hex"),
        ({"counts": {"before": {"acc": {"correct": 3, "n": 2}}}}, "key 'counts.before.acc' is no"),
        ({"counts": {"after": {"acc": {"correct": True, "n": 2}}}}, "key 'counts.after.acc' is no"),
        ({"counts": {"later": {"acc": COUNT}}}, "key 'counts' has 'later'"),
        ({"unheard": 1}, "unheard.*a later version may have written it"),
        (
            {"provenance": {"a": [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]}},
            "nested deeper than 30",
        ),
    ],
)
def test_a_card_that_cannot_be_true_is_one_line(folder: Path, changes: dict[str, object], told: str) -> None:
    rewrite_card(folder, **changes)
    with pytest.raises(UserError, match=told) as error:
        load_artifact(folder)
    assert "model.json" in str(error.value) and str(error.value).isprintable()


def test_a_key_that_comes_twice_is_refused(folder: Path) -> None:
    card = (folder / "model.json").read_text()
    (folder / "model.json").write_text(card.replace('"arch"', '"backdoored": false, "arch"', 1))
    with pytest.raises(UserError, match="key 'backdoored' comes twice"):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_classes": 131_072}, r"does not fit the model: 2 misshapen"),
        ({"arch": "timm:vit_giant_patch14_224", "image_size": 224}, "does not fit the model"),
        ({"arch": "timm:vit_tiny_patch16_224", "image_size": 3}, "does not fit the model|can be built"),
        ({"classes": ["a"]}, "key 'classes' has 1 names, but num_classes is 7"),
    ],
)
def test_a_network_larger_than_its_weights_is_refused_before_it_is_allocated(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    card = ModelCard("classifier", "small_resnet", "none", 32, num_classes=7)
    save_artifact(tmp_path, build_classifier("small_resnet", 7), card)
    rewrite_card(tmp_path, **changes)
    with pytest.raises(UserError, match=told):
        load_artifact(tmp_path)


def test_numbers_of_another_kind_and_pipes_are_refused(folder: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(key for key, value in state.items() if value.is_floating_point())
    state[name] = state[name].to(torch.int64)
    weights = safetensors.torch.save(state)
    (folder / "model.safetensors").write_bytes(weights)
    rewrite_card(folder, sha256=hashlib.sha256(weights).hexdigest())
    with pytest.raises(UserError, match=r"1 of another type \(.* torch.int64 instead of torch.float32\)"):
        load_artifact(folder)
    for file in ("model.safetensors", "model.json"):
        (folder / file).unlink()
        os.mkfifo(folder / file)
        with pytest.raises(UserError, match=rf"{file} is not a regular file"):
            load_artifact(folder)


OLD = {
    "simclr": (
        {"file": None, "size": 8, "margin": 1, "target_class": [9, 12]},
        {"trigger": {"name": "badnets", "size": 8, "margin": 1}, "target_class": 9, "rate": 1.0},
    ),
    "encoder": (
        {"file": "t.npz", "size": 10, "margin": 1, "target_class": [4]},
        {"trigger": {"name": "file", "file": "t.npz"}, "target_class": 4, "rate": 1.0},
    ),
    "classifier": (
        {"trigger": {"name": "sig", "delta": 20.0}, "labels": "all_to_all", "shift": 2},
        {"trigger": {"name": "sig", "delta": 20.0}, "labels": "all_to_all", "shift": 2},
    ),
}


@pytest.mark.parametrize("kind", OLD)
def test_a_card_of_format_1_says_the_same_attack(kind: str, tmp_path: Path) -> None:
    before, after = OLD[kind]
    if kind == "classifier":
        model: Any = build_classifier("small_resnet", 7, "none", image_size=28)
        card = ModelCard("classifier", "small_resnet", "none", 28, num_classes=7, backdoored=True)
    else:
        model = build_simclr("small_cifar", projector=kind == "simclr")
        card = dataclasses.replace(CARD, kind=kind, backdoored=True)
    save_artifact(tmp_path, model, card)
    text = json.loads((tmp_path / "model.json").read_text())
    assert text["format"] == 2 and text.pop("attack") is None
    (tmp_path / "model.json").write_text(json.dumps({**text, "format": 1, "trigger": before}))
    assert load_artifact(tmp_path)[1] == dataclasses.replace(card, attack=after)
    attack = attack_from(after)
    assert attack_from(asdict(attack)) == attack


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trigger": {"size": 8, "target_class": 9}}, "key 'trigger' is no encoder's of format 1"),
        ({"trigger": {"name": "sig", "target_class": [9]}}, "key 'trigger' is no encoder's of format 1"),
        ({"format": True}, "is not a model card of format 2"),
        ({"format": 3}, "is not a model card of format 2"),
        ({"format": 1, "attack": None}, "says format 1 and has the key 'attack'"),
        ({"format": 2}, "is not what it should be .*trigger"),
    ],
)
def test_a_card_of_format_1_that_never_was_is_refused(folder: Path, changes: dict[str, Any], told: str) -> None:
    card = json.loads((folder / "model.json").read_text())
    del card["attack"]
    text = {**card, "format": 1, "trigger": {"size": 8, "margin": 1, "target_class": [9]}, **changes}
    (folder / "model.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=told):
        load_artifact(folder)
