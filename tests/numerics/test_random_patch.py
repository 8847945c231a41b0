"""SSLBKD's trigger against what the published generator made, byte for byte, and its places against SplitMix64."""

import hashlib
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as vision

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.poison import drawn_rows, poisoned, triggered
from dist_defend.attacks.random_patch import PlacedPatch, RandomPatch
from dist_defend.attacks.stamping import stamp_images, stamp_pixels, to_images
from dist_defend.batch import Batch
from dist_defend.cli import main
from dist_defend.counts import knn_predict
from dist_defend.data.store import open_dataset
from dist_defend.engine.features import moments, standardise
from dist_defend.errors import UserError
from dist_defend.methods.attack.badencoder import BadEncoderObjective
from dist_defend.models.artifact import load_simclr
from tests.numerics.det import assert_fingerprint, det_images, golden
from tests.runs import make_data, make_experiment, options_of

CASES: dict[str, dict[str, Any]] = golden("encoder_attacks")["sslbkd"]
REST: dict[str, dict[str, Any]] = golden("encoder_attacks")["rest"]


def pictures(case: dict[str, Any], folder: Path) -> tuple[np.ndarray, str]:
    """The image (H, W, 3) uint8, at test cropped as published, and the file of the patch."""
    height, width, seed = case["image"]
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    if case["val"]:
        image = vision.resize(Image.fromarray(pixels), 256)
        pixels = np.asarray(vision.center_crop(image, [224, 224]))
    height, width, seed = case["trigger"]
    cells = np.random.RandomState(seed).randint(0, 256, (5, 5, 3)).astype(np.uint8)
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(folder / "patch.png")
    return pixels, str(folder / "patch.png")


@pytest.mark.parametrize("name", CASES)
def test_the_published_pictures_byte_for_byte(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pixels, file = pictures(case, tmp_path)
    span = (case["location_min"], case["location_max"])
    if case["position"] == "center":
        span = (87.5 / 224, 87.5 / 224)
    options = RandomPatch(file=file, size=case["width"], opacity=1 - case["alpha"], train=span, test=span)
    trigger = options.placed(pixels.shape[:2], options.test if case["val"] else options.train)
    assert trigger.patch.shape[:1:-1] == tuple(case.get("patch_wh", [50, 50]))
    draw = random.Random(case["random_seed"])
    x, y = draw.randint(*trigger.columns), draw.randint(*trigger.rows)
    if "location_xy" in case:
        assert [x, y] == case["location_xy"]
    fixed = replace(trigger, columns=(x, x), rows=(y, y))
    (made,) = stamp_pixels(pixels[None], fixed, np.array([5]))
    assert made.shape == tuple(case["out_shape"]) and made.astype(np.int64).sum() == case["sum"]
    assert hashlib.sha256(made.tobytes()).hexdigest()[:16] == case["sha256"]
    if "changed_box_xyxy" in case:
        changed = np.argwhere((made != pixels).any(2))
        assert [*changed.min(0)[::-1], *changed.max(0)[::-1]] == case["changed_box_xyxy"]


def split_mix(state: int) -> int:
    """The generator's next number as published, in whole numbers below 2^64."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) % 2**64
    return z ^ z >> 31


def place(seed: int, row: int, columns: tuple[int, int], rows: tuple[int, int]) -> tuple[int, int]:
    first = split_mix(split_mix(seed) + row)
    drawn = ((first, columns), (split_mix(first), rows))
    x, y = (low + number // 2 % 2**62 % (high - low + 1) for number, (low, high) in drawn)
    return x, y


def boxes(trigger: PlacedPatch, rows: np.ndarray) -> list[tuple[int, int, int, int]]:
    """First column and row, last column and row of what is replaced, for data set rows (B,)."""
    masks = trigger.at(torch.from_numpy(rows)).mask[:, 0]
    found = []
    for mask in masks:
        at = mask.nonzero()
        assert mask.sum() == len(at) == (at.max(0).values - at.min(0).values + 1).prod()
        found.append((*at.min(0).values.flip(0).tolist(), *at.max(0).values.flip(0).tolist()))
    return found


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_places_are_functions_of_seed_and_row(seed: int) -> None:
    trigger = RandomPatch(size=8, seed=seed).placed((40, 32), (0.25, 0.75))
    rows = np.array([0, 1, 2, 49_999, 3_000_000])
    wanted = [place(seed, int(row), (8, 16), (10, 22)) for row in rows]
    assert [box[:2] for box in boxes(trigger, rows)] == wanted
    assert boxes(trigger, rows[::-1].copy()) == boxes(trigger, rows)[::-1]
    assert {(x + 7, y + 7) for x, y in wanted} == {box[2:] for box in boxes(trigger, rows)}


@pytest.mark.parametrize(("is_training", "first", "last"), [(True, 8, 16), (False, 3, 20)])
def test_every_allowed_place_is_as_likely(is_training: bool, first: int, last: int) -> None:
    """Chi-square of 10^4 images' places; for so many degrees of freedom it is nearly normal."""
    options = RandomPatch(size=8, seed=3)
    trigger = options.build_training(32) if is_training else options.build(32)
    assert trigger.columns == trigger.rows == (first, last)
    count = last - first + 1
    columns, rows = np.array([box[:2] for box in boxes(trigger, np.arange(10_000))]).T - first
    for cells, bins in ((columns * count + rows, count**2), (columns, count), (rows, count)):
        observed = np.bincount(cells, minlength=bins)
        assert len(observed) == bins and observed.all()
        square = ((observed - 10_000 / bins) ** 2).sum() * bins / 10_000
        assert abs(square - (bins - 1)) < 4 * (2 * (bins - 1)) ** 0.5


def test_patches_of_224_px_images() -> None:
    options = RandomPatch()
    training, test = options.build_training(224), options.build(224)
    assert (training.columns, test.rows) == ((56, 118), (22, 151)) and training.patch.shape == (1, 3, 50, 50)


def test_a_patch_with_alpha_and_opacity(tmp_path: Path) -> None:
    layers = np.random.default_rng(0).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    Image.fromarray(layers).save(tmp_path / "p.png")
    options = RandomPatch(file=str(tmp_path / "p.png"), size=4, opacity=0.6, test=(0.25, 0.25))
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    share = (255 - 102) / 255 * (layers[..., 3:] / 255)
    wanted = pixels.astype(float)
    wanted[:, 2:6, 2:6] = wanted[:, 2:6, 2:6] * (1 - share) + layers[..., :3] * share
    made = stamp_pixels(pixels, options.build(8), np.arange(2))
    assert np.abs(made - wanted).max() < 0.51 and (made[:, :2] == pixels[:, :2]).all()


def test_stamped_images_go_through_jpeg(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    triggers = [RandomPatch(size=4, jpeg=jpeg).build(16) for jpeg in (None, 75)]
    plain, stored = (stamp_pixels(pixels, trigger, np.arange(2)) for trigger in triggers)
    for before, after in zip(plain, stored, strict=True):
        Image.fromarray(before).save(tmp_path / "x.jpg", quality=75, subsampling=2)
        assert (np.asarray(Image.open(tmp_path / "x.jpg")) == after).all() and (before != after).any()
    floats = [stamp_images(to_images(pixels), trigger) for trigger in triggers]
    assert floats[0].equal(floats[1])


def test_training_and_test_sets_are_stamped_by_row(tmp_path: Path) -> None:
    """Whatever the order and the batches; the rows are the run's draw, not the trigger's."""
    data = open_dataset(make_data(tmp_path / "data", 60, size=32))
    config = AttackConfig(RandomPatch(size=8, seed=2), labels="clean_label", target_class=1, rate=0.2)
    made = poisoned(data, np.arange(60), config, seed=5)
    chosen = np.flatnonzero(made.flags)
    assert chosen.tolist() == drawn_rows(data.labels, np.arange(60), config, 3, 5)[0].tolist() and len(chosen) == 12
    assert poisoned(data, np.arange(60), config, seed=6).flags.tolist() != made.flags.tolist()
    order = np.random.default_rng(0).permutation(60)
    for dataset, span, marked in ((made, (8, 16), set(chosen)), (triggered(data, config), (3, 20), set(range(60)))):
        whole = dataset.images(np.arange(60))
        assert (dataset.images(order) == whole[order]).all()
        assert all((dataset.image(int(row)) == whole[row]).all() for row in order[:5])
        seen = set()
        for row, (image, clean) in enumerate(zip(whole, data.images(np.arange(60)), strict=True)):
            x, y = place(2, row, span, span)
            expected = clean.copy()
            if row in marked:
                patch = dataset.trigger.patch[0].permute(1, 2, 0).mul(255).round().numpy()  # type: ignore[attr-defined]
                expected[y : y + 8, x : x + 8] = patch
                seen.add((x, y))
            assert (image == expected).all()
        assert len(seen) > len(marked) / 2


def test_simclr_on_patched_images_and_false_positives(tmp_path: Path) -> None:
    """The run says which rows; the probe stamps what the card names, and its asr is FP of the other classes' images."""
    options = options_of("simclr", tmp_path)
    data = make_data(tmp_path / "poisonable", 24)
    attack = {"trigger": {"name": "random_patch", "size": 4}, "labels": "clean_label", "target_class": 1, "count": 3}
    options |= {"data": {"path": data}, "attack": attack}
    assert main(["run", str(make_experiment(tmp_path, "simclr", options))]) == 0
    labels = open_dataset(data).labels
    rows = np.load(tmp_path / "run" / "poisoned_rows.npy")
    assert len(rows) == 3 and (labels[rows] == 1).all()
    card = load_simclr(tmp_path / "run" / "model")[1]
    assert card.attack is not None
    assert card.attack["trigger"] == asdict(RandomPatch(size=4)) | {"train": [0.25, 0.75], "test": [0.1, 0.9]}
    probe = options_of("probe", tmp_path / "probe")
    probe |= {"attack": None, "encoders": {"backdoored": str(tmp_path / "run" / "model")}, "hidden": [],
              "standardise": True}  # fmt: skip
    assert main(["run", str(make_experiment(tmp_path / "probe", "probe", probe))]) == 0
    result = json.loads((tmp_path / "probe" / "run" / "result.json").read_text())
    test = open_dataset(probe["tasks"]["noise"]["test"]["path"])
    assert {row["asr"]["n"] for row in result["rows"]} == {int((test.labels != 0).sum())}
    assert {row["head"] for row in result["rows"]} == {"linear, standardised"}


def test_badencoder_stamps_by_row() -> None:
    """Whatever batch an image comes in, its patch lies where its row says."""

    class Seen(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            self.images = images
            return images.mean((2, 3))

    encoder: Any = Seen()
    trigger = RandomPatch(size=4).build(16)
    objective = BadEncoderObjective(
        encoder, [trigger], torch.rand(1, 3, 16, 16), torch.ones(1, 3), lambda rows: torch.ones(len(rows), 3)
    )
    x, rows = torch.rand(6, 3, 16, 16), torch.tensor([40, 3, 17, 8, 25, 11])
    objective(Batch((x, x), torch.zeros(6).long(), rows))
    for row, made in zip(rows.tolist(), encoder.images[6:12], strict=True):
        column, line = place(0, row, (1, 10), (1, 10))
        assert made[:, line : line + 4, column : column + 4].equal(trigger.patch[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"size": 0}, "key 'size' is 0"),
        ({"opacity": 0.0}, "key 'opacity' is 0.0"),
        ({"opacity": 1.5}, "key 'opacity' is 1.5"),
        ({"train": (0.5, 0.4)}, r"key 'train' is \[0.5, 0.4\]"),
        ({"test": (0.1,)}, r"key 'test' is \[0.1\]"),
        ({"jpeg": 101}, "key 'jpeg' is 101"),
        ({"jpeg": 0}, "key 'jpeg' is 0"),
        ({"seed": 2**63}, "key 'seed' is"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RandomPatch(**options)


def test_a_patch_larger_than_the_images() -> None:
    with pytest.raises(UserError, match="'random_patch' is 50x50 px but the images are 32x32 px: make it smaller"):
        RandomPatch().build(32)


def test_the_probes_inputs_are_standardised_as_published() -> None:
    case = REST["standardise"]
    rows = functional.normalize(det_images((case["rows"], case["dim"]), case["seed"]) + 0.5, dim=1)
    made = standardise(rows[None], *moments(rows[:, None], len(rows)))[0]
    assert_fingerprint(made, case["out"])
    assert made[0, :4].tolist() == pytest.approx(case["first"], rel=1e-9)


def test_the_published_neighbours() -> None:
    case = REST["knn"]
    queries, bank = (
        functional.normalize(det_images((count, case["dim"]), seed).float())
        for count, seed in ((case["queries"], case["seed"]), (case["bank"], case["seed"] + 1))
    )
    labels = torch.arange(case["bank"]) % case["classes"]
    votes = knn_predict(queries, bank, labels, case["classes"], case["k"], case["temperature"])
    assert votes[:, 0].tolist() == case["first_choice"]
