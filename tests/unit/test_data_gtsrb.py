"""GTSRB as its archives, Kaggle and BackdoorBench's script lay it out."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dist_defend.data.sources import open_source
from dist_defend.errors import UserError

TEST_LABELS = [16, 1, 38]


def sign(file: Path, level: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (level, 0, 0)).save(file)


def official(root: Path, table: str = "GT-final_test.csv") -> None:
    training, test = root / "GTSRB/Final_Training/Images", root / "GTSRB/Final_Test/Images"
    for label in range(43):
        sign(training / f"{label:05d}/00000_00000.ppm", label)
        (training / f"{label:05d}/GT-{label:05d}.csv").write_text("Filename;ClassId\n")
    for number, label in enumerate(TEST_LABELS):
        sign(test / f"{number:05d}.ppm", label)
    (test / "GT-final_test.test.csv").write_text("Filename;Width\n")
    rows = "".join(f"{number:05d}.ppm;53;54;6;5;48;49;{label}\n" for number, label in enumerate(TEST_LABELS))
    (root / table).write_text("Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)


def official_with_table_inside(root: Path) -> None:
    official(root, "GTSRB/Final_Test/Images/GT-final_test.csv")


def inside_torchvisions_folder(root: Path) -> None:
    (root / "gtsrb").mkdir()
    official(root / "gtsrb")


def kaggle(root: Path) -> None:
    for label in range(43):
        sign(root / f"Train/{label}/{label:05d}_00000_00000.png", label)
        sign(root / f"Meta/{label}.png", label)
    for number, label in enumerate(TEST_LABELS):
        sign(root / f"Test/{number:05d}.png", label)
    rows = "".join(f"53,54,6,5,48,49,{label},Test/{number:05d}.png\n" for number, label in enumerate(TEST_LABELS))
    (root / "Test.csv").write_text("Width,Height,Roi.X1,Roi.Y1,Roi.X2,Roi.Y2,ClassId,Path\n" + rows)
    (root / "Train.csv").write_text("Width,Height,ClassId,Path\n")


def backdoorbench(root: Path) -> None:
    for label in range(43):
        sign(root / f"Train/{label:05d}/0.ppm", label)
    for number, label in enumerate(TEST_LABELS):
        sign(root / f"Test/{number:05d}.ppm", label)
    rows = "".join(f"{number:05d}.ppm;{label}\n" for number, label in enumerate(TEST_LABELS))
    (root / "Test/GT-final_test.csv").write_text("Filename;ClassId\n" + rows)


def test_test_images_in_class_folders(tmp_path: Path) -> None:
    for label in (3, 10, 2):
        sign(tmp_path / f"test/{label}/0.png", label)
    source = open_source("gtsrb", str(tmp_path), "test")
    assert [(source[row][1], int(source[row][0][0, 0, 0])) for row in range(3)] == [(2, 2), (3, 3), (10, 10)]


@pytest.mark.parametrize(
    "make", [official, official_with_table_inside, inside_torchvisions_folder, kaggle, backdoorbench]
)
def test_layouts(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path)
    for split, expected in (("train", list(range(43))), ("test", TEST_LABELS)):
        source = open_source("gtsrb", str(tmp_path), split)
        assert [source[row][1] for row in range(len(source))] == expected
        assert [int(source[row][0][0, 0, 0]) for row in range(len(source))] == expected
        assert source.classes == tuple(map(str, range(43)))
    told = open_source("gtsrb", str(tmp_path), "train").notes
    assert told == ["43 images in train, not the 39209 of the papers"]
    told = open_source("gtsrb", str(tmp_path), "test").notes
    assert "3 images in test, not the 12630 of the papers" in told


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    kaggle(tmp_path)
    (tmp_path / "Test/00001.png").unlink()
    with pytest.raises(UserError, match=r"Test.csv: 1 of 3 images are missing, first \S+00001.png"):
        open_source("gtsrb", str(tmp_path), "test")
    (tmp_path / "Test.csv").write_text("Path,Class\nTest/00000.png,3\n")
    with pytest.raises(UserError, match=r"Test.csv: line 2: expected the columns Path or Filename, and ClassId"):
        open_source("gtsrb", str(tmp_path), "test")
    (tmp_path / "Train/43").mkdir()
    with pytest.raises(UserError, match="expected a folder per class, 0 to 42; found 43"):
        open_source("gtsrb", str(tmp_path), "train")


def test_torchvisions_smaller_set_is_another_kind(tmp_path: Path) -> None:
    sign(tmp_path / "gtsrb/GTSRB/Training/00000/0.ppm", 0)
    with pytest.raises(UserError, match=r"torchvision's smaller training set .*; take the kind gtsrb_torchvision"):
        open_source("gtsrb", str(tmp_path), "train")
