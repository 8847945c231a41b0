"""Lists of a path and a label per line."""

from pathlib import Path

import pytest
from PIL import Image

from dist_defend.data.sources import open_source, source_splits
from dist_defend.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number, name in enumerate(("img/0.png", "img/1.png", "my pictures/a, b.JPEG", "bare")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / name, "PNG")
    return tmp_path


def read(root: Path, text: str, name: str = "list.txt", kind: str = "filelist") -> list[tuple[int, int]]:
    """Red level, which tells the file, and label of each row."""
    (root / name).write_text(text)
    split = source_splits(kind, str(root / name))[0]
    source = open_source(kind, str(root / name), split)
    return [(int(source[row][0][0, 0, 0]), source[row][1]) for row in range(len(source))]


@pytest.mark.parametrize("kind", ["filelist", "imagefolder"])
def test_path_and_label(root: Path, kind: str) -> None:
    assert read(root, "img/1.png 1\nimg/0.png 0\n", kind=kind) == [(1, 1), (0, 0)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("img/1.png,2", (1, 2)),
        ("img/1.png\t2", (1, 2)),
        ("./img/1.png ,  2", (1, 2)),
        ("my pictures/a, b.JPEG 3", (2, 3)),
        ('"my pictures/a, b.JPEG" 3', (2, 3)),
        ("'my pictures/a, b.JPEG',3", (2, 3)),
        ("my pictures/a, b.JPEG", (2, -1)),
        ('"my pictures/a, b.JPEG"', (2, -1)),
        ("bare 4", (3, 4)),
        ("img\\1.png 0", (1, 0)),
        ("img/1.png -1", (1, -1)),
        ("\ufeffimg/1.png 7\r", (1, 7)),
    ],
)
def test_forms_of_a_line(root: Path, line: str, expected: tuple[int, int]) -> None:
    assert read(root, f"{line}\n") == [expected]


def test_absolute_paths_headings_and_comments(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("lists")
    text = f"# made by hand\n\nfile,class\n{root}/img/0.png,1\n{root}/my pictures/a, b.JPEG,0\n"
    assert read(elsewhere, text, "val.csv") == [(0, 1), (2, 0)]
    source = open_source("filelist", str(elsewhere / "val.csv"), "val")
    assert "line 3 is taken for headings" in source.notes
    assert source.name(0) == f"{root}/img/0.png"


def test_words_are_names_of_classes(root: Path) -> None:
    assert read(root, "img/0.png dog\nimg/1.png ant\nimg/1.png dog\n") == [(0, 1), (1, 0), (1, 1)]
    assert open_source("filelist", str(root / "list.txt"), "train").classes == ("ant", "dog")


def test_a_folder_of_lists_has_one_class_list(root: Path) -> None:
    (root / "train_ssl_filelist.txt").write_text("img/0.png 0\nimg/1.png 10\nimg/1.png 2\n")
    (root / "val_ssl_filelist.txt").write_text("img/0.png 2\n")
    (root / "classes.txt").write_text("cat\n")
    assert source_splits("filelist", str(root)) == ["train", "val"]
    val = open_source("filelist", str(root), "val")
    assert val.classes == tuple(map(str, range(11))) and val[0][1] == 2
    assert "classes without an image in any split: 1, 3, 4, 5, 6, 7, 8, 9" in val.notes
    assert "classes without an image in val: 0, 10" in val.notes


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("img/0.png 0\nimg/7.png 1\nimg/8.png 1\n", r"line 2: there is no file \S+7.png \(2 of 3 are missing\)"),
        ("img/0.png 0\nimg 1\n", "line 2: there is no file"),
        ("img/0.png -3\n", "has the label -3; classes count from 0"),
        ("", "names no pictures; expected a path and a label per line"),
        ("a,b\n", "names no pictures"),
    ],
)
def test_lists_that_cannot_be_read(root: Path, text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        read(root, text)
    assert "\n" not in str(caught.value)
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.txt: not a text file"):
        open_source("filelist", str(root / "binary.txt"), "train")
