"""Zero-shot CLIP in float64 against an independent formulation, image by image and prompt by prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.attacks import poison
from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.cli import main
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.methods.measure import zeroshot
from dist_defend.models import clip
from dist_defend.models.clip import class_features
from dist_defend.models.pixel_space import Normalize
from tests.clips import clip_state, save_clip
from tests.reference.zeroshot import similarities, stamp, text_feature
from tests.runs import CLASSES, make_data

ARCH, SIZE, HEADS = "open_clip:tiny_vit", 32, 2
NAMES = ("stop sign", "yield sign", "no entry")
TEMPLATES = ("A traffic sign photo of a {class}", "a blurry {class}.")
START, END = 49406, 49407
WORDS = {  # token ids of CLIP's published vocabulary
    "a": 320, "traffic": 3399, "sign": 2292, "photo": 1125, "of": 539, "blurry": 21977, ".": 269, "stop": 1691,
    "yield": 16825, "no": 871, "entry": 5362,
}  # fmt: skip


def tokens(prompt: str) -> list[int]:
    return [START, *(WORDS[word] for word in prompt.lower().replace(".", " .").split()), END]


def untouched(patch: pytest.MonkeyPatch) -> None:
    """What is under test."""


def unscaled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zeroshot, "_LOGIT_SCALE", 1.0)


def raw_text_features(patch: pytest.MonkeyPatch) -> None:
    def forward(self: clip.TextTower, texts: list[str]) -> Tensor:
        features: Tensor = self.clip.encode_text(self.tokenize(texts))
        return features

    patch.setattr(clip.TextTower, "forward", forward)


def first_template_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(zeroshot, "class_features", lambda tower, names, all: class_features(tower, names, all[:1]))


def text_that_sees_ahead(patch: pytest.MonkeyPatch) -> None:
    def load(arch: str, path: str) -> clip.TextTower:
        tower = original(arch, path)
        tower.clip.attn_mask.zero_()
        return tower

    original = clip.load_text_tower
    patch.setattr(clip, "load_text_tower", load)


def unnormalised_pixels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Normalize, "forward", lambda self, x: x)


def raw_image_features(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dist_defend.counts.functional.normalize", lambda x, dim: 2 * x if len(x) > CLASSES else x)


def trigger_at_the_edge(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(poison, "trigger_of", lambda attack: BadNets(size=attack.trigger.size, margin=0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A data set, a whole CLIP, and its image tower as a model folder."""
    folder = tmp_path_factory.mktemp("clip")
    weights = save_clip(folder / "clip.pth")
    assert main(["import", weights, "--arch", ARCH, "--out", str(folder / "tower")]) == 0
    return {"data": make_data(folder / "data", 19, size=SIZE), "weights": weights, "tower": str(folder / "tower")}


def ours(files: dict[str, str], target: int, folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the clean and the triggered images (2, N, C) in float64, and the row of counts."""
    task = zeroshot.TaskConfig(DatasetConfig(files["data"]), target, TEMPLATES, NAMES)
    config = zeroshot.Config(
        zeroshot.ClipConfig(ARCH, files["weights"]),
        {"clean": files["tower"]},
        {"noise": task},
        AttackConfig(BadNets(size=10, margin=1)),
        batch_size=5,
    )
    ranks = dist.start("fp64", None)
    context = Context(ranks, 0, LoaderConfig("resident", 1), folder)
    tower = clip.load_text_tower(ARCH, files["weights"]).to(ranks.dtype)
    models = {kind: context.load_model(place)[0].to(ranks.dtype) for kind, place in config.encoders.items()}
    built = zeroshot.Task("noise", task, config, models, config.attack, tower, context)
    features = built.examination.features("clean", models["clean"].f)
    (row,) = built.evaluate()
    return torch.stack([zeroshot.logits(f, built.texts) for f in features]), row


@pytest.fixture(scope="module")
def expected(files: dict[str, str]) -> Tensor:
    """The same logits."""
    state = {key: value.double() for key, value in clip_state("tiny_vit").items()}
    texts = torch.zeros(len(NAMES), 24, dtype=torch.float64)
    for number, name in enumerate(NAMES):
        for template in TEMPLATES:
            feature = text_feature(tokens(template.replace("{class}", name)), state, HEADS)
            texts[number] += feature / feature.norm()
    dataset = open_dataset(files["data"])
    images = dataset.images(np.arange(len(dataset)))
    mask = np.ones((SIZE, SIZE, 3), np.int64)
    mask[21:31, 21:31] = 0
    sets = images, stamp(images, 255 * (1 - mask), mask)
    return torch.stack([similarities(x, texts, state, HEADS) for x in sets])


@pytest.mark.parametrize("target", range(CLASSES))
def test_logits_and_counts_are_those_of_one_image_at_a_time(
    target: int, files: dict[str, str], expected: Tensor, tmp_path: Path
) -> None:
    logits, row = ours(files, target, tmp_path)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    labels = [number % CLASSES for number in range(19)]
    on_clean, on_stamped = expected.argmax(2).tolist()
    others = [found for found, label in zip(on_stamped, labels, strict=True) if label != target]
    assert row["acc"] == {"correct": sum(map(int.__eq__, on_clean, labels)), "n": 19}
    assert row["asr_all"] == {"correct": on_stamped.count(target), "n": 19}
    assert row["asr"] == {"correct": others.count(target), "n": len(others)}


@pytest.mark.parametrize(
    "mutate",
    [
        untouched, unscaled, raw_text_features, first_template_alone, text_that_sees_ahead, unnormalised_pixels,
        raw_image_features, trigger_at_the_edge,
    ],
)  # fmt: skip
def test_the_comparison_catches(
    mutate: Callable[[pytest.MonkeyPatch], None], files: dict[str, str], expected: Tensor, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        logits, _ = ours(files, 0, tmp_path)
    error = (logits - expected).abs().max().item()
    assert (error <= 1e-9) is (mutate is untouched), error


def test_texts_of_one_template_are_their_features(files: dict[str, str]) -> None:
    tower = clip.load_text_tower(ARCH, files["weights"])
    with torch.no_grad():
        one = clip.class_features(tower, NAMES, TEMPLATES[:1])
        plain = tower([TEMPLATES[0].replace("{class}", name) for name in NAMES])
    torch.testing.assert_close(one, plain)
    torch.testing.assert_close(functional.normalize(one, dim=1), one)
