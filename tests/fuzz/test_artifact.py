"""Model folders with things wrong, their digest put right: the model is loaded, or refused by one line."""

import hashlib
import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dist_defend.models.artifact import ModelCard, load_artifact, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_simclr
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree

SURFACES = ("card_tree", "card_bytes", "card_without_weights", "weights_header", "weights_bytes")


@cache
def whole() -> tuple[tuple[dict[str, Any], bytes], ...]:
    """Card and weights of an encoder and of a classifier that a defence has made."""
    counts = {name: {"correct": 1, "n": 2} for name in ("acc", "asr", "asr_all", "ra")}
    trigger = {"trigger": {"name": "badnets", "size": 3}, "target_class": 2}
    classifier = ModelCard(
        "classifier", "small_resnet", "none", 28, num_classes=3, backdoored=True, attack=trigger,
        parent_sha256="ab" * 32, provenance={"method": "ibau", "data": {"test": "cd" * 32}}, classes=("a", "b", "c"),
        guessed=("normalization",), defended_by="ibau", counts={"before": counts, "after": counts}, chosen_by="oracle",
    )  # fmt: skip
    encoder = ModelCard("simclr", "small_cifar", "cifar10", 32, 256, resize=None, provenance={"method": "test"})
    found = []
    for model, card in (
        (build_classifier("small_resnet", 3, "none", 28), classifier),
        (build_simclr("small_cifar"), encoder),
    ):
        with TemporaryDirectory() as folder:
            save_artifact(folder, model, card)
            place = Path(folder)
            found.append((json.loads((place / "model.json").read_text()), (place / "model.safetensors").read_bytes()))
    return tuple(found)


def write(folder: Path, card: bytes, weights: bytes) -> None:
    (folder / "model.json").write_bytes(card)
    (folder / "model.safetensors").write_bytes(weights)


def loading(folder: Path, has_weights: bool = True) -> Callable[[], object]:
    def read() -> object:
        model, card = load_artifact(folder, has_weights)
        assert (model.arch, model.image_size) == (card.arch, card.image_size)
        assert json.dumps(card.provenance) and card.image_size >= 1
        return model

    return read


def card_tree(rng: random.Random, folder: Path) -> Callable[[], object]:
    card, weights = rng.choice(whole())
    write(folder, json.dumps(mutate_tree(rng, card)).encode(), weights)
    return loading(folder)


def card_bytes(rng: random.Random, folder: Path) -> Callable[[], object]:
    card, weights = rng.choice(whole())
    write(folder, mutate_bytes(rng, json.dumps(card, indent=2).encode()), weights)
    return loading(folder, rng.random() < 0.5)


def card_without_weights(rng: random.Random, folder: Path) -> Callable[[], object]:
    card, _ = rng.choice(whole())
    write(folder, json.dumps(mutate_tree(rng, card)).encode(), b"")
    return loading(folder, has_weights=False)


def signed(folder: Path, card: dict[str, Any], weights: bytes) -> Callable[[], object]:
    write(folder, json.dumps(card | {"sha256": hashlib.sha256(weights).hexdigest()}).encode(), weights)
    return loading(folder)


def weights_header(rng: random.Random, folder: Path) -> Callable[[], object]:
    """The JSON in front of the tensors: names, types, shapes and places."""
    card, weights = rng.choice(whole())
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    for name in rng.sample(sorted(header), 2):
        match rng.randrange(4):
            case 0:
                header[name] = mutate_tree(rng, header[name])
            case 1 if "dtype" in header[name]:
                header[name]["dtype"] = rng.choice(("F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4"))
            case 2:
                header = mutate_tree(rng, header)
                break
            case 3:
                header[name + rng.choice(("x", "\x1b[2J", "\n", "x" * 3000))] = header.pop(name)
    told = json.dumps(header).encode()
    return signed(folder, card, len(told).to_bytes(8, "little") + told + weights[8 + size :])


def weights_bytes(rng: random.Random, folder: Path) -> Callable[[], object]:
    card, weights = rng.choice(whole())
    head, tail = weights[:6000], weights[6000:]
    return signed(folder, card, mutate_bytes(rng, head) + (mutate_bytes(rng, tail) if rng.random() < 0.2 else tail))


def test_what_is_broken_here_was_whole(tmp_path: Path) -> None:
    for card, weights in whole():
        write(tmp_path, json.dumps(card).encode(), weights)
        for has_weights in (True, False):
            assert loading(tmp_path, has_weights)()


def test_read_or_refused(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_artifact:{','.join(SURFACES)}", count) == []
