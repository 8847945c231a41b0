"""Folders of pictures as people have them: the same labels in every split, and nothing left out in silence."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dist_defend.data.sources import open_source, source_splits
from dist_defend.errors import UserError


def fill(root: Path, *files: str) -> Path:
    """Empty files, or tiny pictures of a colour of their own."""
    for number, name in enumerate(files):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix.lower() in (".txt", ".gif", ""):
            file.touch()
        else:
            picture = Image.new("RGB", (2, 2), (number, 0, 0))
            picture.save(file, "PNG")
    return root


def labels(root: Path, split: str = "train") -> dict[str, int]:
    """File, from the root on -> label."""
    source = open_source("imagefolder", str(root), split)
    return {os.path.relpath(source.name(row), root): source[row][1] for row in range(len(source))}


def notes(root: Path, split: str = "train") -> str:
    return "\n".join(open_source("imagefolder", str(root), split).notes)


def refused(root: Path, told: str, split: str = "train") -> None:
    with pytest.raises(UserError, match=told) as caught:
        open_source("imagefolder", str(root), split)
    assert "\n" not in str(caught.value)


def test_a_class_that_a_split_lacks_keeps_its_place(tmp_path: Path) -> None:
    fill(tmp_path, "train/ant/0.png", "train/bee/0.png", "train/cat/0.png", "test/ant/0.png", "test/cat/0.png")
    fill(tmp_path, "test/dog/0.png", "val/cat/0.png")
    for split in ("train", "val", "test"):
        assert open_source("imagefolder", str(tmp_path), split).classes == ("ant", "bee", "cat", "dog")
    assert labels(tmp_path, "test") == {"test/ant/0.png": 0, "test/cat/0.png": 2, "test/dog/0.png": 3}
    assert labels(tmp_path, "val") == {"val/cat/0.png": 2}
    assert "classes without a folder in test: bee" in notes(tmp_path, "test")
    assert "classes that only test has: dog" in notes(tmp_path, "test")
    assert "classes without a folder in train: dog" in notes(tmp_path)
    assert "classes without a folder in val: ant, bee, dog" in notes(tmp_path, "val")


@pytest.mark.parametrize("form", ["{}", "{:05d}"])
def test_whole_numbers_are_ordered_as_numbers(tmp_path: Path, form: str) -> None:
    names = [form.format(number) for number in range(12)]
    fill(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "test") for name in names))
    for split in ("train", "test"):
        assert open_source("imagefolder", str(tmp_path), split).classes == tuple(names)
        assert labels(tmp_path, split) == {f"{split}/{name}/0.png": int(name) for name in names}
        assert notes(tmp_path, split) == ""


def test_a_number_is_one_class_in_both_spellings(tmp_path: Path) -> None:
    fill(tmp_path, "train/0/0.png", "train/2/0.png", "train/10/0.png", "test/00002/0.png", "test/00010/0.png")
    assert open_source("imagefolder", str(tmp_path), "test").classes == ("0", "2", "10")
    assert labels(tmp_path, "test") == {"test/00002/0.png": 1, "test/00010/0.png": 2}
    assert "taken as one with another split's: 00002 is 2, 00010 is 10" in notes(tmp_path, "test")
    assert "numbers from 0 to 10, not 0 to 2; labels are places in this order" in notes(tmp_path)
    fill(tmp_path, "train/02/0.png")
    refused(tmp_path, "train: the class folders 02, 2 are one number; rename or join them")


def test_numbers_that_start_at_one_are_told_and_mixed_names_are_strings(tmp_path: Path) -> None:
    fill(tmp_path / "one", "1/0.png", "2/0.png", "10/0.png")
    assert labels(tmp_path / "one") == {"1/0.png": 0, "2/0.png": 1, "10/0.png": 2}
    assert "class 1 is label 0, class 10 is label 2" in notes(tmp_path / "one")
    fill(tmp_path / "mixed", "1/0.png", "2/0.png", "10/0.png", "other/0.png")
    assert open_source("imagefolder", str(tmp_path / "mixed"), "train").classes == ("1", "10", "2", "other")


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Train", "Test"), ["train", "test"]),
        (("training", "validation"), ["train", "val"]),
        (("TRAIN", "Valid", "Testing"), ["train", "val", "test"]),
        (("train_set", "dev", "test-set"), ["train", "val", "test"]),
    ],
)
def test_splits_by_their_common_names(tmp_path: Path, folders: tuple[str, ...], splits: list[str]) -> None:
    fill(tmp_path, *(f"{folder}/{name}/0.png" for folder in folders for name in ("cat", "dog")))
    assert source_splits("imagefolder", str(tmp_path)) == splits
    for folder, split in zip(folders, splits, strict=True):
        assert labels(tmp_path, split) == {f"{folder}/cat/0.png": 0, f"{folder}/dog/0.png": 1}


def test_two_folders_of_one_split_and_folders_beside_them(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.png", "test/cat/0.png", "extra/cat/0.png", "masks/cat/0.png")
    assert "folders beside those of the splits, not read: extra, masks" in notes(tmp_path)
    fill(tmp_path, "Training/cat/0.png")
    refused(tmp_path, "holds both Training and train; they mean one split")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path, "bus/0.png", "car/0.png", "train/0.png")
    assert source_splits("imagefolder", str(tmp_path)) == ["train"]
    assert labels(tmp_path) == {"bus/0.png": 0, "car/0.png": 1, "train/0.png": 2}


def test_hidden_and_editors_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.png", "train/dog/0.png", "train/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png")
    fill(tmp_path, "train/@eaDir/0.png", "train/cat/._0.png", "train/cat/Thumbs.db.png", "train/dog/.DS_Store")
    (tmp_path / "train/cat/Thumbs.db.png").rename(tmp_path / "train/cat/Thumbs.db")
    assert labels(tmp_path) == {"train/cat/0.png": 0, "train/dog/0.png": 1}
    assert notes(tmp_path) == "hidden files and those of editors, passed over: 6"


def test_other_files_and_empty_classes_are_told(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.PNG", "train/cat/1.jfif", "train/cat/notes.txt", "train/dog/0.gif", "train/cat/raw")
    fill(tmp_path, "train/0.png")
    (tmp_path / "train/fox").mkdir()
    assert labels(tmp_path) == {"train/cat/0.PNG": 0, "train/cat/1.jfif": 0}
    assert open_source("imagefolder", str(tmp_path), "train").classes == ("cat", "dog", "fox")
    told = notes(tmp_path)
    assert "class folders without a picture in train: dog, fox (read: .png, .jpg, .jpeg" in told
    assert "do not end as a picture does, passed over: 3 (" in told and ".gif 1" in told and "no ending 1" in told
    assert "pictures in no class folder, left out: 1" in told
    (tmp_path / "train/cat/0.PNG").unlink()
    (tmp_path / "train/cat/1.jfif").unlink()
    refused(tmp_path, r"no pictures in the class folders cat, dog, fox; .*endings that are read: .png, .jpg")


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/deep/0.png", "train/dog/0.png", "elsewhere/1.png")
    (tmp_path / "train/cat/loop").symlink_to("..", target_is_directory=True)
    (tmp_path / "train/cat/self").symlink_to("self")
    (tmp_path / "train/cat/again").symlink_to("deep", target_is_directory=True)
    (tmp_path / "train/up").symlink_to("../..", target_is_directory=True)
    (tmp_path / "train/dog/gone.png").symlink_to("nowhere.png")
    (tmp_path / "train/fox").symlink_to("../elsewhere", target_is_directory=True)
    os.mkfifo(tmp_path / "train/dog/pipe.png")
    assert labels(tmp_path) == {"train/cat/again/0.png": 0, "train/dog/0.png": 1, "train/fox/1.png": 2}
    told = notes(tmp_path)
    assert "folders that a link leads back to, passed over: 3" in told  # loop, deep after again, and up
    assert "links that lead nowhere and files that are none, passed over: 3" in told


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (("foo/train/cat/0.png", "foo/test/a/0.png"), r"only folders \(foo/test, foo/train\); .*for example \S*foo"),
        (("a/x/0.png", "b/y/0.png"), r"its folders hold only folders \(a/x, b/y\)"),
        (("train/train/cat/0.png", "train/train/dog/0.png"), r"train: its folders hold only folders \(train/cat"),
        (("images/0.png",), "all pictures lie in 'images', and there is no folder per class"),
        (("0.png", "1.png"), "2 pictures lie right in it, not in a folder per class; make one per class"),
        (("train/0.png", "test/0.png"), "train: 1 pictures lie right in it"),
        (("unlabeled/0.png", "cat/0.png"), r"holds unlabeled and other folders \(cat\), but no train; put class"),
        (("train/cat/0.txt",), "no pictures in the class folders cat; .*cat holds 1 .txt files; endings"),
    ],
)  # fmt: skip
def test_what_has_no_class_folders_is_an_error_that_says_what_was_found(
    tmp_path: Path, files: tuple[str, ...], told: str
) -> None:
    refused(fill(tmp_path, *files), told)


@pytest.mark.parametrize(("name", "told"), [("a.tar", "kind webdataset reads"), ("a.parquet", "are not read: save the"),
                                            ("a.npz", "kind npz reads"), ("a.zip", "give one of them as")])  # fmt: skip
def test_files_of_other_kinds_are_named(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / name).touch()
    refused(tmp_path, rf"no images in folders named after their classes; it holds 1 {Path(name).suffix} files.*{told}")


@pytest.mark.parametrize("place", ["unlabeled", "Unlabelled", "unsupervised"])
def test_unlabelled_pictures_lie_anywhere_in_their_folder(tmp_path: Path, place: str) -> None:
    fill(tmp_path, f"{place}/0.png", f"{place}/any/1.png", "train/cat/0.png", "train/dog/0.png")
    assert source_splits("imagefolder", str(tmp_path)) == ["train", "unlabeled"]
    assert labels(tmp_path, "unlabeled") == {f"{place}/0.png": -1, f"{place}/any/1.png": -1}
    assert open_source("imagefolder", str(tmp_path), "unlabeled").classes == ("cat", "dog")
    fill(tmp_path / "flat" / place, "0.png")
    assert source_splits("imagefolder", str(tmp_path / "flat" / place)) == ["unlabeled"]
    assert labels(tmp_path / "flat" / place, "unlabeled") == {"0.png": -1}


def test_tiny_imagenet(tmp_path: Path) -> None:
    fill(tmp_path, "train/n02/images/n02_0.JPEG", "train/n01/images/n01_0.JPEG", "val/images/val_0.JPEG")
    fill(tmp_path, "val/images/val_1.JPEG", "val/images/val_2.JPEG", "test/images/test_0.JPEG")
    (tmp_path / "val/val_annotations.txt").write_text("val_1.JPEG\tn01\t0\t0\t7\t7\nval_0.JPEG\tn02\t0\t0\t7\t7\n")
    assert labels(tmp_path) == {"train/n01/images/n01_0.JPEG": 0, "train/n02/images/n02_0.JPEG": 1}
    assert labels(tmp_path, "val") == {"val/images/val_0.JPEG": 1, "val/images/val_1.JPEG": 0}
    assert "pictures not named in val_annotations.txt, left out: 1" in notes(tmp_path, "val")
    assert open_source("imagefolder", str(tmp_path), "val").classes == ("n01", "n02")
    assert labels(tmp_path, "test") == {"test/images/test_0.JPEG": -1}  # whose labels were never published
    assert "images without a label (-1), as test has no class folders: 1" in notes(tmp_path, "test")
    with (tmp_path / "val/val_annotations.txt").open("a") as table:
        table.write("val_2.JPEG\tn03\t0\t0\t7\t7\n")
    refused(tmp_path, "val_annotations.txt: line 3: class 'n03' is none of the other splits' classes", "val")
    (tmp_path / "val/val_annotations.txt").unlink()
    refused(tmp_path, "val: holds 'images' instead of a folder per class, and no val_annotations.txt", "val")


def test_files_come_in_torchvisions_order(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    words = ["a", "b", "a-b", "a.b", "A", "z0", "z00", "ä"]
    for number in range(60):
        inner = "/".join(random.choice(words, random.integers(0, 3)))
        fill(tmp_path, f"{random.choice(words)}/{inner}/{random.choice(words)}{number}.png".replace("//", "/"))
    expected = ImageFolder(str(tmp_path))
    source = open_source("imagefolder", str(tmp_path), "train")
    assert source.classes == tuple(expected.classes)
    assert [(source.name(row), source[row][1]) for row in range(len(source))] == expected.samples


def test_a_broken_picture_is_named_with_its_path(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.png", "train/cat/1.png")
    (tmp_path / "train/cat/1.png").write_bytes((tmp_path / "train/cat/1.png").read_bytes()[:40])
    source = open_source("imagefolder", str(tmp_path), "train")
    assert source[0][0].shape == (2, 2, 3)
    with pytest.raises(UserError, match=f"^{tmp_path}/train/cat/1.png: not a picture that can be read"):
        source[1]


def test_a_name_of_any_bytes_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ca\nt").mkdir()
    (tmp_path / "ca\nt" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    with pytest.raises(UserError, match=r"/ca\\nt/\\udcff.png: not a picture"):
        open_source("imagefolder", str(tmp_path), "train")[0]


def test_notes_count_pictures_as_they_are_read(tmp_path: Path) -> None:
    fill(tmp_path, "train/cat/0.png", "train/cat/1.png")
    Image.fromarray(np.full((2, 2), 65535, np.uint16)).save(tmp_path / "train/cat/1.png")
    source = open_source("imagefolder", str(tmp_path), "train")
    assert source.notes == []
    assert [int(source[row][0].max()) for row in (0, 1, 1)] == [0, 255, 255]
    assert source.notes == ["16-bit pictures scaled to 8 bits: 1"]
