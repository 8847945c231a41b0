"""The order of prepared rows, and images that cannot be read."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import LabelConsistent
from dist_defend.attacks.poison import poisoned
from dist_defend.attacks.reference import ReferenceConfig, references_from
from dist_defend.cli import main
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, WriteOptions, open_dataset, write_dataset, write_splits
from dist_defend.errors import UserError
from dist_defend.methods.defend.defender import read_index
from tests.forging import seal

SIDE = 6


def numbered(count: int, classes: int = 2) -> ArraySource:
    """Image n is of grey level n; sorted by class."""
    images = np.repeat(np.arange(count, dtype=np.uint8), SIDE * SIDE * 3).reshape(count, SIDE, SIDE, 3)
    return ArraySource(images, np.arange(count) * classes // count, [f"c{n}" for n in range(classes)])


def levels(dataset: PreparedDataset) -> list[int]:
    """Which image of the source each row is, going by the pixels."""
    found: list[int] = dataset.images(np.arange(len(dataset)))[:, 0, 0, 0].tolist()
    return found


@pytest.mark.parametrize("storage", ["npy", "auto"])
def test_rows_are_shuffled_and_say_where_they_were(tmp_path: Path, storage: str) -> None:
    made = write_dataset(numbered(40), tmp_path / "d", name="x", split="s", storage=storage, order_seed=3)
    opened = open_dataset(tmp_path / "d")
    assert sorted(levels(opened)) == list(range(40)) and levels(opened) != list(range(40))
    assert opened.source_rows.tolist() == levels(opened) and opened.source_rows.dtype == np.int64
    assert opened.labels.tolist() == [row // 20 for row in levels(opened)]
    assert opened.manifest.order_seed == 3 and "order.npy" in opened.manifest.files
    again = write_dataset(numbered(40), tmp_path / "e", name="x", split="s", storage=storage, order_seed=3)
    other = write_dataset(numbered(40), tmp_path / "f", name="x", split="s", storage=storage, order_seed=4)
    assert again.digest == made.digest and levels(other) != levels(made)
    np.save(tmp_path / "d" / "order.npy", made.source_rows[::-1])
    with pytest.raises(UserError, match=r"order\.npy: content differs"):
        open_dataset(tmp_path / "d")
    np.save(tmp_path / "d" / "order.npy", np.arange(40) * 0)
    seal(tmp_path / "d")
    with pytest.raises(UserError, match=r"order\.npy: does not name a row for each image"):
        open_dataset(tmp_path / "d")
    (tmp_path / "d" / "order.npy").unlink()
    with pytest.raises(UserError, match=r"order\.npy: is missing"):
        open_dataset(tmp_path / "d")


def test_the_source_order_needs_no_file_and_old_folders_open(tmp_path: Path) -> None:
    made = write_dataset(numbered(9), tmp_path / "d", name="x", split="s", storage="npy")
    assert levels(made) == list(range(9)) == made.source_rows.tolist()
    assert set(made.manifest.files) == {"images.npy", "labels.npy"} and made.manifest.order_seed is None
    place = tmp_path / "d" / "manifest.json"
    old = json.loads(place.read_text())
    for key in ("order_seed", "source_samples", "skipped", "notes"):  # as the first version wrote it
        del old[key]
    place.write_text(json.dumps(old))
    opened = open_dataset(tmp_path / "d")
    assert opened.digest == made.digest and opened.source_rows.tolist() == list(range(9))
    assert (opened.num_source_rows, opened.manifest.skipped, opened.manifest.notes) == (9, (), ())


def test_the_first_n_are_those_of_the_shuffled_order(tmp_path: Path) -> None:
    whole = write_dataset(numbered(200, 10), tmp_path / "d", name="x", split="s", storage="npy", order_seed=0)
    part = write_dataset(
        numbered(200, 10), tmp_path / "e", name="x", split="s", storage="npy", order_seed=0, max_samples=60
    )
    assert levels(part) == levels(whole)[:60] and part.num_source_rows == 200
    assert min(np.bincount(part.labels, minlength=10)) > 0  # of sorted rows six classes would be there, three of ten


def test_row_numbers_of_the_source_find_their_images(tmp_path: Path) -> None:
    made = write_dataset(numbered(30), tmp_path / "d", name="x", split="s", storage="npy", order_seed=0)
    rows = made.rows_of(np.array([4, 17, 29]))
    assert sorted(made.images(rows)[:, 0, 0, 0].tolist()) == [4, 17, 29] and (np.diff(rows) > 0).all()
    assert made.images(made.rows_of_class(1))[:, 0, 0, 0].tolist() == list(range(15, 30))
    (tmp_path / "index.txt").write_text("17\n4\n29\n")  # BackdoorBench's log/index.txt
    named = made.rows_of(read_index(str(tmp_path / "index.txt"), made.num_source_rows, "rnp.index"))
    assert named.tolist() == rows.tolist()
    part = write_dataset(numbered(30), tmp_path / "e", name="x", split="s", storage="npy", order_seed=0, max_samples=10)
    absent = int(np.setdiff1d(np.arange(30), part.source_rows)[0])
    with pytest.raises(UserError, match=f"has no row {absent} of its source: it has 10 of 30 rows"):
        part.rows_of(np.array([absent]))


def test_reference_and_adversarial_images_are_the_sources(tmp_path: Path) -> None:
    """The same pictures as of a data set that keeps the source's order."""
    made = write_dataset(numbered(30), tmp_path / "d", name="x", split="s", storage="npy", order_seed=0)
    images, classes = references_from(ReferenceConfig(dataset=str(tmp_path / "d"), target_class=1, number=2), SIDE)
    assert images[0, 0, 0, 0] == 17 and classes.tolist() == [1]  # class 1 begins at 15
    adversarial = 100 + numbered(30)._images
    np.save(tmp_path / "adv.npy", adversarial)
    attack = AttackConfig(
        LabelConsistent(amplitude=1.0, adversarial=str(tmp_path / "adv.npy")), "clean_label", target_class=1, count=5
    )
    poisons = poisoned(made, np.arange(30), attack, seed=0)
    flagged = np.flatnonzero(poisons.flags)
    assert len(flagged) == 5
    assert poisons.images(flagged)[:, 3, 3, 0].tolist() == [100 + level for level in made.source_rows[flagged]]


def folder_of_pictures(root: Path, broken: dict[str, bytes]) -> None:
    """Two splits, two classes, three pictures each; ``broken``: relative paths and what these files hold instead."""
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(3):
                level = np.full((8, 8, 3), 100 * label + 10 * number, np.uint8)
                Image.fromarray(level).save(root / split / name / f"{number}.png")
    for name, content in broken.items():
        (root / name).write_bytes(content)


def whole_picture() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(content, format="PNG")
    return content.getvalue()


BROKEN = {
    "train/cat/1.png": whole_picture()[:-40],  # cut short
    "test/dog/0.png": b"",
    "test/dog/2.png": b"<html>404</html>",
}


def prepare(tmp_path: Path, *arguments: str) -> int:
    out = str(tmp_path / "out")
    return main(["data", "prepare", "imagefolder", "--path", str(tmp_path / "in"), "--out", out, *arguments])


def test_every_broken_image_of_every_split_is_named_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_pictures(tmp_path / "in", {})
    assert prepare(tmp_path, "--storage", "npy", "--image-size", "4") == 0
    before = {split: open_dataset(tmp_path / "out" / split).digest for split in ("train", "test")}
    for name, content in BROKEN.items():
        (tmp_path / "in" / name).write_bytes(content)
    capsys.readouterr()
    for arguments in ((), ("--skip-broken", "2")):
        assert prepare(tmp_path, *arguments) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "3 broken images" in told and "--skip-broken 3" in told
        assert all(name in told for name in BROKEN)
    after = {split: open_dataset(tmp_path / "out" / split).digest for split in ("train", "test")}
    assert after == before  # nothing lost, and no split without the other
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test", "train"]


@pytest.mark.parametrize("storage", ["npy", "auto"])
def test_broken_images_are_left_out_if_so_many_may_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], storage: str
) -> None:
    folder_of_pictures(tmp_path / "in", BROKEN)
    assert prepare(tmp_path, "--skip-broken", "3", "--storage", storage, "--keep-order") == 0
    told = capsys.readouterr().out
    assert all(name in told for name in BROKEN)
    train, test = (open_dataset(tmp_path / "out" / split) for split in ("train", "test"))
    assert levels(train) == [0, 20, 100, 110, 120] and train.labels.tolist() == [0, 0, 1, 1, 1]
    assert levels(test) == [0, 10, 20, 110] and test.manifest.class_counts == (3, 1)
    assert train.source_rows.tolist() == [0, 2, 3, 4, 5] and test.source_rows.tolist() == [0, 1, 2, 4]
    for dataset, names in ((train, ["cat/1.png"]), (test, ["dog/0.png", "dog/2.png"])):
        skipped = [
            str(Path(name).relative_to(tmp_path / "in" / dataset.path.name)) for name in dataset.manifest.skipped
        ]
        assert skipped == names and dataset.num_source_rows == 6
    assert main(["data", "info", str(tmp_path / "out" / "test")]) == 0
    assert "dog/2.png" in capsys.readouterr().out


def test_one_broken_image_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of_pictures(tmp_path / "in", {"train/dog/2.png": b"no picture"})
    assert prepare(tmp_path) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and f"{tmp_path / 'in' / 'train' / 'dog' / '2.png'}" in told
    assert told.endswith("; mend or remove it, or leave it out with --skip-broken 1\n") and told.count("\n") == 1


class Flawed:
    """So many images, all but the first of them broken; with notes that are complete when all were read."""

    classes = ("any",)

    def __init__(self, count: int) -> None:
        self.count, self.notes = count, ["two files were passed over"]

    def __len__(self) -> int:
        return self.count

    def name(self, row: int) -> str:
        return f"shelf/{row:05d}.png"

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        if row:
            raise OSError("cut\nshort")
        self.notes.append("one image was turned")
        return np.zeros((4, 4, 3), np.uint8), 0


def test_many_are_counted_and_ten_listed(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^24 broken images: shelf/00001\.png cannot be read: OSError: cut short; "
    ) as few:
        write_dataset(Flawed(25), tmp_path / "d", name="x", split="s", storage="npy", order_seed=0)
    told = str(few.value)
    assert "shelf/00010.png" in told and "shelf/00011.png" not in told and told.endswith("--skip-broken 24")
    with pytest.raises(UserError, match=r"^at least 1001 broken images: "):
        write_dataset(Flawed(5000), tmp_path / "d", name="x", split="s", storage="npy")
    assert list(tmp_path.iterdir()) == []
    kept = write_dataset(Flawed(25), tmp_path / "d", name="x", split="s", storage="npy", skip_broken=24)
    assert len(kept) == 1 and kept.manifest.skipped[23] == "shelf/00024.png"
    assert kept.manifest.notes[0] == "two files were passed over" and "one image was turned" in kept.manifest.notes


def test_a_split_that_is_wrong_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    wrong = ArraySource(np.zeros((4, SIDE, SIDE, 3), np.uint8), np.array([0, 0, 0, 7]), ("a",))
    empty = ArraySource(np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros(0, int), ("a",))
    places = {"train": tmp_path / "train", "test": tmp_path / "test"}
    for bad, told in ((wrong, "image 3.* has label 7, but there are 1 classes"), (empty, "no images")):
        with pytest.raises(UserError, match=told):
            write_splits({"train": numbered(8), "test": bad}, places, name="x", options=WriteOptions(storage="npy"))
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "test").write_text("a thesis")
    with pytest.raises(UserError, match="test: exists and is not a prepared data set"):
        write_splits({"train": numbered(8), "test": numbered(8)}, places, name="x", options=WriteOptions(storage="npy"))
    assert not (tmp_path / "train").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["prepare", "digits", "--split", "test", "--max-samples", "3", "--out", str(tmp_path / "file" / "out")]
    assert main(["data", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'file' / 'out' / 'test'}: cannot be written (Not a directory)")
    assert told.count("\n") == 1


def test_info_tells_of_order_and_empty_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.zeros((400, 4, 4, 3), np.uint8)
    source = ArraySource(images, np.repeat([0, 1, 3, 4], 100), ("ant", "bee", "cat", "dog", "elk"))
    for name, seed in (("mixed", 5), ("kept", None)):
        write_dataset(source, tmp_path / name, name="x", split="s", storage="npy", order_seed=seed)
        assert main(["data", "info", str(tmp_path / name)]) == 0
    mixed, kept = capsys.readouterr().out.split("contact sheet")[:2]
    assert "order of the rows: shuffled, seed 5" in mixed and "no random one" not in mixed
    assert "order of the rows: the source's" in kept
    assert "the order is no random one: batches of 64 in order hold 1.5 classes" in kept
    for told in (mixed, kept):
        assert "classes without an image here: 1 of 5: cat" in told and "\n         0  cat\n" in told
