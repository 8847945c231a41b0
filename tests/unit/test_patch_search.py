"""A run of PatchSearch: its ranking, files and precision, and what it says of rows that are not the encoder's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_defend.attacks.poison import PoisonedDataset
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from tests.runs import SIZE, make_data, make_experiment, make_model, options_of

ATTACK = {
    "trigger": {"name": "random_patch", "size": 4},
    "labels": "clean_label",
    "target_class": 1,
    "count": 3,
}


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    own = {"encoder": make_model(folder / "model"), "data": {"path": make_data(folder / "data")}}
    return {**own, "clusters": 4, "num_test": 8, "window": 4, "num_patches": 5, "batch_size": 3, **changes}


def run(folder: Path, section: dict[str, Any], **changes: Any) -> dict[str, Any]:
    assert main(["run", str(make_experiment(folder, "patch_search", section, **changes))]) == 0
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    return result


def poisoned_encoder(folder: Path) -> dict[str, Any]:
    """A section that searches the data of an encoder that a run trained on three stamped images."""
    section = options_of("simclr", folder / "pretrain")
    section = {**section, "attack": ATTACK, "data": {"path": section["data"]["path"]}}
    assert main(["run", str(make_experiment(folder / "pretrain", "simclr", section))]) == 0
    encoder = str(folder / "pretrain" / "run" / "model")
    return options(folder, encoder=encoder, data=section["data"])


def test_the_ranking_and_its_patches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path, options(tmp_path))
    found = dict(np.load(tmp_path / "run" / "suspects.npz"))
    count = result["metrics"]["num_scored"]
    assert result["metrics"]["num_test"] == 8 and "precision" not in result["metrics"]
    assert 8 <= count == len(found["rows"]) == len(set(found["rows"])) <= 24
    assert (np.diff(found["scores"]) <= 0).all() and found["scores"][0] == result["metrics"]["best_score"]
    assert found["corners"].shape == (count, 2) and found["patches"].shape == (5, 4, 4, 3)
    images = open_dataset(str(tmp_path / "data")).images(found["rows"][:5])
    for image, (row, column), patch in zip(images, found["corners"], found["patches"], strict=False):
        np.testing.assert_array_equal(image[row : row + 4, column : column + 4], patch)
    with Image.open(tmp_path / "run" / "found.png") as picture:
        assert picture.size == (2 * (5 * 4 + 4), 2 * 4)
    again = run(tmp_path / "again", options(tmp_path))
    assert again["metrics"] == result["metrics"]
    assert main(["report", str(tmp_path / "run")]) == 0
    capsys.readouterr()


def test_precision_is_counted_by_the_rows_that_the_encoders_run_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = poisoned_encoder(tmp_path)
    rows = np.load(tmp_path / "pretrain" / "run" / "poisoned_rows.npy")
    seen = []
    kept = PoisonedDataset.images

    def images(self: Any, wanted: np.ndarray) -> np.ndarray:
        seen.append(self.flags)
        return kept(self, wanted)

    monkeypatch.setattr(PoisonedDataset, "images", images)
    result = run(tmp_path, section)
    assert len(rows) == 3 and seen and np.flatnonzero(seen[0]).tolist() == rows.tolist()
    found = np.load(tmp_path / "run" / "suspects.npz")["rows"]
    wanted = {str(top): np.isin(found[:top], rows).mean() for top in (5, 10, 20) if top <= len(found)}
    assert result["metrics"]["precision"] == wanted and "5" in wanted
    assert result["metrics"]["poisoned_share"] == 3 / 24


def test_rows_of_another_run_or_of_other_data_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = poisoned_encoder(tmp_path)
    np.save(tmp_path / "rows.npy", np.arange(3))
    other = {**section, "data": {"path": make_data(tmp_path / "other", seed=9)}}
    for number, (wrong, told) in enumerate(
        [({**section, "poisoned_rows": str(tmp_path / "rows.npy")}, "is not what the card"), (other, "on other data")]
    ):
        assert main(["run", str(make_experiment(tmp_path / str(number), "patch_search", wrong))]) != 0
        assert told in capsys.readouterr().err
    (tmp_path / "pretrain" / "run" / "poisoned_rows.npy").unlink()
    result = run(tmp_path / "without", section)
    assert "precision" not in result["metrics"] and "poisoned_rows.npy is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window": SIZE}, "must be smaller"),
        ({"clusters": 25}, "24 images"),
        ({"clusters": 1}, "at least 2"),
        ({"drop": 0.0}, "key 'patch_search.drop'"),
        ({"drop": 1.0}, "key 'patch_search.drop'"),
    ],
)
def test_impossible_settings_end_in_a_line(
    changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_experiment(tmp_path, "patch_search", options(tmp_path, **changes))
    assert main(["run", str(config)]) != 0
    assert told in capsys.readouterr().err
