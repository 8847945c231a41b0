"""examples/zoo counted again and made again; what is missing or altered is named."""

import json
import shutil
from pathlib import Path

import pytest

from dist_defend.cli import main
from dist_defend.files import sha256_file
from dist_defend.zoo.entry import names, read_entry
from dist_defend.zoo.rebuild import machine

ZOO = Path(__file__).parents[2] / "examples" / "zoo"
SMALLEST = "digits_clean"
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data that the YAML files name, as docs/zoo.md prepares it, and a copy of the zoo."""
    folder = tmp_path_factory.mktemp("zoo")
    out = str(folder / "data" / "digits")
    assert main(["data", "prepare", "digits", "--out", out, "--image-size", "16", "--storage", "npy"]) == 0
    shutil.copytree(ZOO, folder / "zoo")
    return folder


@pytest.fixture()
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be altered."""
    (tmp_path / "data").symlink_to(place / "data")
    shutil.copytree(place / "zoo", tmp_path / "zoo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(zoo: Path, name: str, *keys: str, value: object) -> None:
    path = zoo / name / "zoo.json"
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


def test_small_models_ship_with_their_cards() -> None:
    entries = {name: read_entry(ZOO, name) for name in names(ZOO)}
    cards = {name: json.loads((ZOO / name / "model.json").read_text()) for name in entries}
    assert {card["backdoored"] for card in cards.values()} == {False, True}
    assert all((ZOO / name / "model.safetensors").stat().st_size < MOST_BYTES for name in entries)


def test_they_are_counted_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "verify"]) == 0
    told = capsys.readouterr().out
    assert all(f"{name}: digits: acc " in told for name in names(ZOO)) and "OTHER" not in told
    assert main(["zoo", "list"]) == 0
    assert "BACKDOORED" in capsys.readouterr().out


def test_another_count_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "digits_badnets"
    true = read_entry(Path("zoo"), name).counts["digits"]["asr"]
    change(Path("zoo"), name, "counts", "digits", "asr", value={**true, "correct": true["correct"] - 1})
    assert main(["zoo", "verify", name]) == 1
    told = capsys.readouterr().out
    wanted = (
        f"asr on digits: {true['correct']} of {true['n']} now, {true['correct'] - 1} of {true['n']} when it was added"
    )
    assert f"{name}: OTHER COUNTS" in told and wanted in told


def test_the_smallest_is_made_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On another type of machine the weights may be others, and then it is said by how much."""
    assert main(["zoo", "rebuild", SMALLEST, "--out", "again"]) == 0
    told = capsys.readouterr().out
    assert f"{SMALLEST}: the same weights" in told or "made on another type of machine: " in told
    assert sorted(path.name for path in Path("again", SMALLEST, "model").iterdir()) == [
        "model.json",
        "model.safetensors",
    ]


def test_other_weights_are_told_by_how_much(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YAML that says otherwise makes them; on the same type of machine that is status 1."""
    yaml = Path("zoo", SMALLEST, "experiment.yaml")
    yaml.write_text(yaml.read_text().replace("seed: 100", "seed: 101").replace("epochs: 6", "epochs: 1"))
    change(Path("zoo"), SMALLEST, "files", "experiment.yaml", value=sha256_file(yaml))
    change(Path("zoo"), SMALLEST, "made_on", value=machine(1))
    assert main(["zoo", "rebuild", SMALLEST]) == 1
    told = capsys.readouterr().out
    assert f"{SMALLEST}: OTHER WEIGHTS: " in told and "tensors differ, most of all " in told and "now, " in told
    assert "another type of machine: no" in told
    name = f"{machine(1)['device']}".partition(",")[0]  # a cloud's name for processors of several kinds
    change(Path("zoo"), SMALLEST, "made_on", "device", value=name)
    assert main(["zoo", "rebuild", SMALLEST]) == 0
    assert f", not {name}" in capsys.readouterr().out


def test_altered_files_are_named_with_their_digests(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path("zoo", SMALLEST, "model.safetensors")
    whole, wanted = weights.read_bytes(), sha256_file(weights)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["zoo", "verify", SMALLEST]) == 2
    error = capsys.readouterr().err
    assert f"{weights} was altered" in error and wanted in error and sha256_file(weights) in error
    weights.unlink()
    assert main(["zoo", "verify", SMALLEST]) == 2
    assert f"{weights} is missing: restore it, sha256 {wanted}" in capsys.readouterr().err
    assert main(["zoo", "verify", "digit_clean"]) == 2
    assert "did you mean 'digits_clean'?" in capsys.readouterr().err
    assert main(["zoo", "list", "--zoo", "data"]) == 2
    assert "data is no zoo" in capsys.readouterr().err


def test_data_that_is_missing_or_other_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(Path("zoo"), SMALLEST, "data", "test", value="0" * 64)
    assert main(["zoo", "verify", SMALLEST]) == 2
    assert "data 'test' has sha256" in capsys.readouterr().err
    (here / "data").unlink()
    assert main(["zoo", "verify", SMALLEST]) == 2
    assert "data/digits/test: not a prepared data set" in capsys.readouterr().err
    assert main(["zoo", "rebuild", SMALLEST]) == 2
    assert "data/digits/train: not a prepared data set" in capsys.readouterr().err


def test_a_run_is_added_with_its_parents(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "rebuild", SMALLEST, "--out", "runs"]) == 0
    run = f"runs/{SMALLEST}"
    assert main(["zoo", "add", run, "--zoo", "own", "--name", "../out"]) == 2
    assert "give another --name" in capsys.readouterr().err
    assert main(["zoo", "add", run, "--zoo", "own"]) == 0
    old, new = read_entry(Path("zoo"), SMALLEST), read_entry(Path("own"), SMALLEST)
    if old.files["model.safetensors"] == new.files["model.safetensors"]:
        assert new.counts == old.counts and new.data == old.data and new.measure == old.measure
    assert main(["zoo", "verify", "--zoo", "own"]) == 0
    assert main(["zoo", "add", run, "--zoo", "own"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["zoo", "add", "data", "--zoo", "own"]) == 2
    assert "no finished run with a model" in capsys.readouterr().err
