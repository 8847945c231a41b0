"""dist-defend data, as a user meets it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.attacks.trigger import white_square
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from tests.triggers import save_trigger_npz


def test_prepare_and_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "digits"
    assert main(["data", "prepare", "digits", "--out", str(out), "--image-size", "16", "--max-samples", "50"]) == 0
    told = capsys.readouterr().out
    assert "train: 50 images 16x16x3, 10 classes" in told and "test: 50 images" in told
    assert open_dataset(out / "test").manifest.split == "test"

    save_trigger_npz(tmp_path / "trigger.npz", [white_square(16, 5)])
    sheets = {}
    for name, arguments in {"plain": [], "stamped": ["--trigger", str(tmp_path / "trigger.npz")]}.items():
        sheet = tmp_path / f"{name}.png"
        assert main(["data", "info", str(out / "train"), "--verify", "--sheet", str(sheet), *arguments]) == 0
        sheets[name] = np.asarray(Image.open(sheet))
    told = capsys.readouterr().out
    assert "verified" in told and "contact sheet with and without trigger" in told and "seven" in told
    assert sheets["stamped"].shape[0] == sheets["plain"].shape[0]
    shown = open_dataset(out / "train")
    zeros = np.flatnonzero(shown.labels == 0)
    first = shown.image(int(zeros[shown.source_rows[zeros].argmin()]))  # the source's first zero among the fifty
    enlarged = np.repeat(np.repeat(first, 4, axis=0), 4, axis=1)  # 16 to 64 pixels
    clean, triggered = sheets["stamped"][4:68, 120:184], sheets["stamped"][4:68, 184:248]
    assert np.array_equal(clean, enlarged) and np.array_equal(sheets["plain"][4:68, 120:184], enlarged)
    stamped = enlarged.copy()
    stamped[40:60, 40:60] = 255  # 5 pixels, one free at the border
    assert np.array_equal(triggered, stamped)


def test_a_sheet_lies_beside_the_data_unless_told_otherwise(tmp_path: Path) -> None:
    assert main(["data", "prepare", "digits", "--out", str(tmp_path), "--split", "test", "--max-samples", "3"]) == 0
    assert main(["data", "info", str(tmp_path / "test")]) == 0
    assert (tmp_path / "test" / "contact_sheet.png").is_file()
    assert not (tmp_path / "train").exists()


def test_unlabelled_images_have_a_sheet_too(tmp_path: Path) -> None:
    images = np.zeros((10, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "train_unlabeled.npz", x=images, y=np.zeros(10, int))
    assert main(["data", "prepare", "npz", "--path", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert main(["data", "info", str(tmp_path / "out" / "unlabeled")]) == 0


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "prepare", "digits", "--out", out, "--split", "test", "--max-samples", "5"]) == 0
    save_trigger_npz(tmp_path / "trigger.npz", [white_square(32, 5)])
    np.savez(tmp_path / "objects.npz", x=np.array([None, {}], dtype=object), y=np.arange(2))
    data = next((tmp_path / "out" / "test").glob("data.beton"), tmp_path / "out" / "test" / "images.npy")
    capsys.readouterr()
    for arguments, told in (
        (["info", str(tmp_path)], "not a prepared data set"),
        (["info", f"{out}/test", "--trigger", str(tmp_path / "trigger.npz")], "32x32 px but the images are 8x8"),
        (["info", f"{out}/test", "--trigger", str(tmp_path / "none.npz")], "none.npz"),
        (["info", f"{out}/test", "--sheet", str(tmp_path / "no" / "sheet.png")], "cannot write the contact sheet"),
        (["prepare", "npz", "--path", str(tmp_path / "objects.npz"), "--out", out], "it holds Python objects"),
        (["prepare", "npz", "--out", out], "npz needs --path"),
        (["prepare", "digits", "--out", out, "--split", "val"], "digits has no split 'val'"),
    ):
        assert main(["data", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and told in error and error.count("\n") == 1
    data.write_bytes(data.read_bytes()[:100])
    assert main(["data", "info", f"{out}/test"]) == 2
    assert "has 100 bytes instead of" in capsys.readouterr().err
