"""CTRL's trigger against what the published loops gave, and against what its closed form must do."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_defend.attacks.patterns import Ctrl
from dist_defend.attacks.poison import STAMPED, PoisonedDataset
from dist_defend.attacks.stamping import stamp_pixels
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_simclr
from tests.numerics.det import assert_fingerprint, golden
from tests.runs import make_data, make_experiment, options_of

CASES: dict[str, dict[str, Any]] = golden("encoder_attacks")["ctrl"]


def options_of_case(case: dict[str, Any]) -> Ctrl:
    channels: Any = tuple("yuv"[c] for c in case["channels"])
    return Ctrl(
        magnitude=case["magnitude"], positions=tuple(case["positions"]), channels=channels, window=case["window"]
    )


def images_of(case: dict[str, Any]) -> Tensor:
    shape, generator = (case["batch"], 3, case["size"], case["size"]), torch.Generator().manual_seed(case["seed"])
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_the_published_transformation(name: str) -> None:
    case = CASES[name]
    trigger = options_of_case(case).build(case["size"]).to("cpu", torch.float64)
    images = images_of(case)
    stamped = trigger(images)
    assert_fingerprint(stamped, case["stamped"])
    assert_fingerprint(stamped - images, case["change"])
    assert ((stamped == 0).sum().item(), (stamped == 1).sum().item()) == (case["at_0"], case["at_1"])
    assert stamped[0, :, 0, :4].flatten().tolist() == pytest.approx(case["row0"], rel=1e-9)
    grey = torch.full((1, 3, case["size"], case["size"]), 0.5, dtype=torch.float64)
    change = trigger(grey) - grey
    assert_fingerprint(change, case["grey"])
    assert change[0, :, 0, 0].tolist() == pytest.approx(case["grey_corner"], rel=1e-9, abs=1e-15)


def test_only_the_wanted_coefficients_change() -> None:
    """An orthonormal DCT of what is added to U and V has the magnitude at (p, p) and 0 elsewhere."""
    trigger = Ctrl(magnitude=30.0, positions=(3, 7), window=8).build(8)
    to_yuv = torch.tensor([[0.299, 0.587, 0.114], [-0.147, -0.289, 0.436], [0.615, -0.515, -0.100]]).double()
    added = torch.einsum("rc,chw->rhw", to_yuv, 255 * trigger.pattern[0])
    place = torch.arange(8).double()
    waves = torch.cos(torch.pi * (2 * place[None] + 1) * place[:, None] / 16) * 0.5
    waves[0] /= 2**0.5
    coefficients = waves @ added @ waves.T
    wanted = torch.zeros(3, 8, 8).double()
    wanted[1:, [3, 7], [3, 7]] = 30.0
    torch.testing.assert_close(coefficients, wanted, atol=0.06, rtol=0)  # the matrices are no exact inverses


def test_the_lowest_frequency() -> None:
    """p = 0 adds the same to all pixels of a window: magnitude / window, in U here."""
    added = 255 * Ctrl(magnitude=40.0, positions=(0,), channels=("u",), window=8).build(16).pattern
    wanted = torch.tensor([0, -0.396, 2.029]).double().view(1, 3, 1, 1).expand(1, 3, 16, 16) * 40 / 8
    torch.testing.assert_close(added, wanted)


def test_stored_pixels_are_rounded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    trigger = Ctrl().build(32)
    exact = 255 * trigger.to("cpu", torch.float64)(torch.from_numpy(pixels).double().permute(0, 3, 1, 2) / 255)
    off = stamp_pixels(pixels, trigger) - exact.permute(0, 2, 3, 1).numpy()
    assert np.abs(off).max() <= 0.51 and abs(off.mean()) < 0.02


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"positions": [32]}, "key 'positions' is"),
        ({"positions": []}, "key 'positions' is"),
        ({"channels": []}, "key 'channels' is"),
        ({"window": 0}, "key 'window' is 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Ctrl(**options)


def test_images_must_be_whole_windows() -> None:
    with pytest.raises(UserError, match="whole windows of 32 px; these have 24"):
        Ctrl().build(24)


def test_simclr_on_poisoned_images(tmp_path: Path) -> None:
    """The first images of the target class are stamped in what is trained on; the run and its card say so."""
    options = options_of("simclr", tmp_path)
    data = make_data(tmp_path / "poisonable", 24, size=16)
    options |= {"data": {"path": data}, "attack": {
        "trigger": {"name": "ctrl", "window": 16, "positions": [7, 15]}, "labels": "clean_label", "target_class": 1,
        "count": 3, "choose": "first",
    }}  # fmt: skip
    assert main(["run", str(make_experiment(tmp_path, "simclr", options))]) == 0
    labels = open_dataset(data).labels
    rows = np.load(tmp_path / "run" / "poisoned_rows.npy")
    assert rows.tolist() == np.flatnonzero(labels == 1)[:3].tolist()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["num_poisoned"] == 3
    card = load_simclr(tmp_path / "run" / "model")[1]
    assert card.backdoored and card.attack is not None
    assert card.attack["trigger"] == asdict(Ctrl(window=16, positions=(7, 15))) | {
        "positions": [7, 15],
        "channels": ["u", "v"],
    }
    flags = np.zeros(24, np.uint8)
    flags[rows] = STAMPED
    seen = PoisonedDataset(open_dataset(data), Ctrl(window=16, positions=(7, 15)).build(16), flags).images(
        np.arange(24)
    )
    assert ((seen != open_dataset(data).images(np.arange(24))).any((1, 2, 3)) == (flags == STAMPED)).all()
    plain = options | {"attack": None}
    assert main(["run", str(make_experiment(tmp_path, "simclr", plain)), f"output={tmp_path / 'plain'}"]) == 0
    digests = [json.loads((tmp_path / run / "result.json").read_text())["model_sha256"] for run in ("run", "plain")]
    assert digests[0] != digests[1]


def test_labels_are_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("simclr", tmp_path) | {"attack": {"trigger": {"name": "ctrl"}, "labels": "all_to_all"}}
    assert main(["run", str(make_experiment(tmp_path, "simclr", options))]) == 2
    assert "'simclr.attack.labels' is all_to_all" in capsys.readouterr().err
