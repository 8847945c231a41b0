"""Zero-shot evaluation: what a configuration may say, and what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from dist_defend.cli import main
from dist_defend.config import load_experiment
from tests.clips import save_clip
from tests.runs import make_data, make_experiment, make_model


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The section of a run that works."""
    folder = tmp_path_factory.mktemp("zeroshot")
    weights = save_clip(folder / "clip.pth")
    assert main(["import", weights, "--arch", "open_clip:tiny_vit", "--out", str(folder / "tower")]) == 0
    test = {"path": make_data(folder / "test", 9, size=32)}
    return {
        "clip": {"arch": "open_clip:tiny_vit", "weights": weights},
        "encoders": {"clean": str(folder / "tower")},
        "tasks": {"noise": {"test": test, "target_class": 1, "templates": "svhn"}},
        "attack": {"trigger": {"name": "badnets", "size": 10, "margin": 1}},
    }


def changed(options: dict[str, Any], folder: Path, **changes: Any) -> Path:
    """An experiment file with keys of the section, or of its task, replaced."""
    own = {key: value for key, value in changes.items() if key in ("clip", "encoders", "attack", "batch_size")}
    task = options["tasks"]["noise"] | {key: value for key, value in changes.items() if key not in own}
    return make_experiment(folder, "zeroshot", options | own | {"tasks": {"noise": task}})


def counts(config: Path) -> tuple[list[Any], str]:
    assert main(["run", str(config)]) == 0
    result = json.loads((config.parent / "run" / "result.json").read_text())
    return [{k: v for k, v in row.items() if k != "run"} for row in result["rows"]], result["targets"]["noise"]


def test_names_come_from_the_data_a_list_or_a_file(options: dict[str, Any], tmp_path: Path) -> None:
    names = ["stop sign", "yield sign", "no entry"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    rows, target = counts(changed(options, tmp_path / "data"))
    assert target == "class 1"
    listed, target = counts(changed(options, tmp_path / "list", class_names=names))
    assert target == "yield sign" and listed != rows
    from_file = changed(options, tmp_path / "file", class_names=str(tmp_path / "names.txt"))
    assert counts(from_file) == (listed, target)
    prompt = changed(options, tmp_path / "prompt", templates=["A photo of a {class}"])
    assert counts(prompt)[0] == rows


def test_prompts_of_numbers_are_told(options: dict[str, Any], tmp_path: Path) -> None:
    test = make_data(tmp_path / "numbers", 9, size=32)
    place = Path(test) / "manifest.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "classes": ["0", "1", "2"]}))
    for name, names in (("stored", None), ("given", ["one", "two", "three"])):
        counts(changed(options, tmp_path / name, test={"path": test}, class_names=names))
        told = json.loads((tmp_path / name / "run" / "result.json").read_text()).get("notes", [])
        assert len(told) == (names is None) and all(f"{test} has numbers for class names" in note for note in told)


def test_images_are_the_same_in_batches_of_any_size(options: dict[str, Any], tmp_path: Path) -> None:
    found = [counts(changed(options, tmp_path / str(size), batch_size=size)) for size in (1, 4, 512)]
    assert found[0] == found[1] == found[2]


def test_published_prompts_and_targets() -> None:
    configs = Path(__file__).parents[2] / "configs" / "measure"
    told = {}
    for name in ("gtsrb", "stl10", "svhn"):
        zeroshot = load_experiment(configs / f"zeroshot_{name}.yaml").options
        (task,) = zeroshot.tasks.values()
        told[name] = task.target_class, task.prompts
        assert (zeroshot.attack.trigger.size, zeroshot.attack.trigger.margin) == (50, 1)
    photo = ("A photo of a {class}",)
    assert told == {"gtsrb": (14, ("A traffic sign photo of a {class}",)), "stl10": (9, photo), "svhn": (0, photo)}
    signs = (configs / "gtsrb_signs.txt").read_text().splitlines()
    assert len(set(signs)) == 43 and signs[14] == "stop sign"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"templates": "gtsbr"},
            "key 'zeroshot.tasks.noise.templates' is 'gtsbr'; it must be one of gtsrb, svhn, stl10",
        ),
        ({"templates": []}, "key 'zeroshot.tasks.noise.templates' is empty"),
        ({"templates": ["a photo"]}, "has 'a photo'; write {class} once"),
        ({"templates": 3}, "key 'zeroshot.tasks.noise.templates' is 3; expected"),
        ({"class_names": ["one", "two"]}, "key 'zeroshot.tasks.noise.class_names' has 2 names; the data set has 3"),
        ({"class_names": ["one", "two", "one"]}, "has 'one' twice"),
        ({"class_names": ["class 0", "class 2", "class 1"]}, "the same names in another order"),
        ({"class_names": "nowhere.txt"}, "cannot read nowhere.txt: No such file or directory"),
        ({"class_names": ["one", "two", "cat " * 15]}, "has 21 tokens; open_clip:tiny_vit reads 16: shorten"),
        ({"target_class": 3}, "key 'zeroshot.tasks.noise.target_class' is 3"),
        ({"encoders": {}}, "key 'zeroshot.encoders' is empty"),
        ({"batch_size": 0}, "key 'zeroshot.batch_size' is 0"),
        (
            {"attack": {"trigger": {"name": "badnets", "size": 50, "margin": 1}}},
            "a 50 px square with a margin of 1 px does not fit",
        ),
        ({"clip": {"arch": "open_clip:tiny_vti", "weights": "x"}}, "open_clip has no model 'tiny_vti'"),
        ({"clip": {"arch": "open_clip:tiny_vit", "weights": "nowhere.pt"}}, "nowhere.pt does not exist"),
        ({"clip": {"arch": "open_clip:tiny_vit"}}, "key 'zeroshot.clip.weights' is missing"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(map(str, value)),
)
def test_bad_input_is_one_line_and_status_2(
    changes: dict[str, Any], told: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(changed(options, tmp_path, **changes))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and told in error
    assert not (tmp_path / "run").exists()


def test_encoders_must_fit_the_text_tower_and_the_images(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = changed(options, tmp_path / "small", encoders={"clean": make_model(tmp_path / "model", size=32)})
    assert main(["run", str(small)]) == 2
    assert "features of 256 numbers, the text tower of open_clip:tiny_vit has 24" in capsys.readouterr().err
    other = changed(options, tmp_path / "other", test={"path": make_data(tmp_path / "data", 9, size=16)})
    assert main(["run", str(other)]) == 2
    assert "does not hold images of 32 px, as key 'encoders.clean' needs" in capsys.readouterr().err
