"""Class names are compared by name, and subsets and batches that lack classes are told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_defend.cli import main
from dist_defend.data.classes import check_same_classes, named_classes, tell_missing_classes, tell_uniform_batches
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import write_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from tests.forging import seal
from tests.runs import make_data, make_experiment, options_of


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("cat", "dog"), ("cat", "dog")),
        (["cat", "dog"], ("cat", "dog")),
        (("0", "1", "2"), ("00000", "00001", "00002")),  # npz beside GTSRB's folders
        (("T-shirt", "ankle boot"), ("t shirt", "Ankle_Boot")),
        (None, ("cat", "dog")),  # a model card without names
        (("cat", "dog"), None),
        ((), ()),
    ],
)
def test_the_same_classes_pass_in_silence(first: tuple[str, ...] | None, second: tuple[str, ...] | None) -> None:
    assert check_same_classes(first, "a", second, "b") is None


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (("cat", "dog", "fox"), ("cat", "cow", "fox"), "label 1 is class 'dog' in a, but 'cow' in b; .*manifest.json"),
        (("cat", "dog"), ("dog", "cat"), "label 0 is class 'cat' in a, but 'dog' in b: .* another order"),
        (("0", "1", "10", "2"), ("0", "1", "2", "10"), "label 2 is class '10' in a, but '2' in b: .* another order"),
        (("0", "1"), ("1", "2"), "label 0 is class '0' in a, but '1' in b"),  # labels that start at 1
        (("cat", "dog", "fox"), ("cat", "fox"), r"a has 3 classes \(it alone has dog\), but b has 2 classes$"),
        (("0", "1", "2"), ("cat", "dog"), "a has 3 classes, but b has 2 classes$"),
        (("cat",), (), "a has 1 classes"),
        (("1", "cat"), ("cat", "1"), "label 0 is class '1' in a, but 'cat' in b"),
    ],
)
def test_other_classes_are_an_error_that_names_the_first(
    first: tuple[str, ...], second: tuple[str, ...], told: str
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        check_same_classes(first, "a", second, "b")
    assert "\n" not in str(caught.value)


def test_numbers_beside_names_are_allowed_and_told() -> None:
    wanted = "the classes of a are numbers: they are taken to be in the order of b's"
    assert check_same_classes(("0", "1"), "a", ("cat", "dog"), "b") == wanted
    assert check_same_classes(("cat", "dog"), "b", ("00", "01"), "a") == wanted


def test_names_go_before_numbers() -> None:
    assert named_classes(("0", "1"), ("cat", "dog")) == ("cat", "dog") == named_classes(("cat", "dog"), ("0", "1"))
    assert named_classes(("0", "1"), ("00", "01")) == ("00", "01") and named_classes(("a",), ("A",)) == ("a",)


def test_missing_classes_are_those_that_the_set_has() -> None:
    labels = np.array([0, 0, 2, 2, 3, 3, -1])  # class 1 has no image in the whole set
    names = ("ant", "bee", "cat", "dog")
    assert tell_missing_classes(labels, np.array([0, 2, 4]), names) is None
    assert tell_missing_classes(labels, np.arange(7), names) is None
    assert tell_missing_classes(labels, np.array([0, 1]), names) == "2 images lack 2 of the 3 classes: cat, dog"
    many = [f"c{n}" for n in range(9)]
    assert tell_missing_classes(np.arange(9), np.array([8]), many) == (
        "1 images lack 8 of the 9 classes: c0, c1, c2, c3, c4 and 3 more"
    )


@pytest.mark.parametrize(("classes", "per_class", "batch"), [(10, 50, 25), (10, 500, 100), (43, 20, 20), (2, 64, 8)])
def test_sorted_batches_are_told_with_the_closed_form(classes: int, per_class: int, batch: int) -> None:
    labels = np.repeat(np.arange(classes), per_class)
    expected = classes * (1 - (1 - 1 / classes) ** batch)
    if per_class % batch == 0:
        wanted = f"batches of {batch} in order hold 1.0 classes on average, in a random order {expected:.1f}"
        assert tell_uniform_batches(labels, batch) == (wanted if expected > 2 else None)
    assert tell_uniform_batches(np.random.default_rng(0).permutation(labels), batch) is None
    assert tell_uniform_batches(np.tile(np.arange(classes), per_class), batch) is None  # in turn


def test_the_threshold_is_half_and_rare_classes_do_not_count_as_many() -> None:
    # Four classes of equal share, batches of 4: a random order holds 4 (1 - 0.75^4) = 2.734, half of it 1.367.
    one, two = [0, 0, 0, 0], [1, 1, 2, 2]
    base = [[3, 3, 3, 3], one, [1, 1, 1, 1], [2, 2, 2, 2]]
    assert tell_uniform_batches(np.concatenate(base), 4) is not None  # 1.0
    assert tell_uniform_batches(np.concatenate([[3, 3, 3, 3], one, two, two]), 4) is None  # 1.5
    # 99 % are of one class: a batch of 10 of a random order holds 1.1 classes.
    assert tell_uniform_batches(np.array([0] * 990 + [1] * 10), 10) is None
    assert tell_uniform_batches(np.array([5, 5, 5]), 1) is None and tell_uniform_batches(np.arange(3), 4) is None


def test_a_context_tells_once_of_subset_and_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.repeat(np.arange(4), 25)
    source = ArraySource(np.zeros((100, 4, 4, 3), np.uint8), labels, ("ant", "bee", "cat", "dog"))
    kept = write_dataset(source, tmp_path / "kept", name="x", split="train", storage="npy")
    write_dataset(source, tmp_path / "mixed", name="x", split="train", storage="npy", order_seed=0)
    context = Context(dist.start("fp64", None), 0, LoaderConfig("resident"), tmp_path)
    with caplog.at_level("WARNING", "dist_defend"):
        for _ in range(2):
            context.dataset("defence", DatasetConfig(str(tmp_path / "kept"), fraction=0.5))
            context.check_order(kept, np.arange(100), 25)
        context.dataset("defence", DatasetConfig(str(tmp_path / "mixed"), fraction=0.5))
        context.dataset("defence", DatasetConfig(str(tmp_path / "kept"), fraction=0.5, subset="random"))
        context.dataset("defence", DatasetConfig(str(tmp_path / "mixed"), max_samples=1))
    assert [record.getMessage() for record in caplog.records] == context.notes and len(context.notes) == 3
    assert context.notes[0] == (
        f"defence data {tmp_path / 'kept'}: 50 images lack 2 of the 4 classes: cat, dog; "
        "say subset: random, or prepare it again without --keep-order"
    )
    assert context.notes[1] == (
        f"{tmp_path / 'kept'}: batches of 25 in order hold 1.0 classes on average, in a random order 4.0; "
        "prepare it again without --keep-order"
    )
    assert context.notes[2].endswith("; take more") and "lack 3 of the 4" in context.notes[2]


def rename(folder: str, names: list[str]) -> None:
    """Give a prepared data set other class names, and of fewer the labels that go with them."""
    labels = np.load(Path(folder) / "labels.npy") % len(names)
    np.save(Path(folder) / "labels.npy", labels)
    seal(Path(folder), classes=names, class_counts=np.bincount(labels).tolist())


def options_and_test(method: str, folder: Path) -> tuple[dict[str, Any], str]:
    """A method's section, and the second of its data sets that are used together."""
    if method == "input_aware":
        data, test = make_data(folder / "data", 40), make_data(folder / "test", 13, seed=1)
        return {"data": {"path": data}, "test": {"path": test}, "batch_size": 20, "arch": "small_resnet"}, test
    options = options_of(method, folder)
    if method == "simclr":
        test = make_data(folder / "test", 13, seed=1)
        options["monitor"] = {"memory": options["data"], "test": {"path": test}}
    return options, str(folder / "test")


@pytest.mark.parametrize("method", ["classifier", "input_aware", "probe", "simclr"])
def test_a_method_compares_the_names_of_its_data_sets(
    tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options, test = options_and_test(method, tmp_path)
    path = make_experiment(tmp_path, method, options)
    for names, told in (
        (["class 0", "class 2", "class 1"], "label 1 is class 'class 1' in "),  # counts agree
        (["class 0", "class 2"], "has 3 classes (it alone has class 1), but "),
    ):
        rename(test, names)
        capfd.readouterr()
        assert main(["run", str(path), "--dry-run"]) == 2
        error = capfd.readouterr().err
        assert told in error and test in error and str(tmp_path / "data") in error


def test_a_run_keeps_what_it_was_told_and_the_names(tmp_path: Path) -> None:
    options, test = options_and_test("classifier", tmp_path)
    rename(options["data"]["path"], ["00", "01", "02"])
    assert main(["run", str(make_experiment(tmp_path, "classifier", options))]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["notes"] == [
        f"the classes of {options['data']['path']} are numbers: they are taken to be in the order of {test}'s"
    ]
    card = json.loads((tmp_path / "run" / "model" / "model.json").read_text())
    assert card["classes"] == ["class 0", "class 1", "class 2"]
