"""Sweep files to points."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_defend.config import load_experiment
from dist_defend.errors import UserError
from dist_defend.strict_yaml import read_yaml
from dist_defend.sweep import grid, progress
from dist_defend.sweep.grid import Sweep, load_sweep

CLASSIFIER = {"data": {"path": "data/train"}, "test": {"path": "data/test"}, "update": {"batch_size": 4, "epochs": 2}}
RNP = {"model": "nothing", "data": {"path": "data/train"}, "test": {"path": "data/test"}}


def experiment(folder: Path, method: str, options: dict[str, Any]) -> str:
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump({"method": method, "output": "runs/x", method: options}))
    return str(path)


def spread(folder: Path, output: str = "runs/sweep", **content: Any) -> Sweep:
    content = (
        {"config": experiment(folder, "classifier", CLASSIFIER), **content} if "stages" not in content else content
    )
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"output": output, **content}, sort_keys=False))
    return load_sweep(path)


def values(sweep: Sweep, *keys: str) -> list[tuple[Any, ...]]:
    found = []
    for point in sweep.points:
        row = []
        for key in keys:
            value: Any = point.experiment.resolved()
            for part in key.split("."):
                value = value[part]
            row.append(value)
        found.append(tuple(row))
    return found


def test_product_zip_explicit_and_seeds_multiply(tmp_path: Path) -> None:
    sweep = spread(
        tmp_path,
        set={"classifier.update.epochs": 7},
        product={"precision": ["fp32", "fp64"]},
        zip={"classifier.update.batch_size": [8, 16], "classifier.update.optimizer.lr": [0.1, 0.2]},
        explicit=[{"classifier.arch": "vgg16"}, {"classifier.arch": "small_resnet"}],
        seeds=[1, 2],
    )
    assert len(sweep.points) == 16
    keys = ("classifier.update.batch_size", "classifier.update.optimizer.lr")
    assert set(values(sweep, *keys)) == {(8, 0.1), (16, 0.2)}
    assert set(values(sweep, "precision", "classifier.arch", "seed")) == {
        (precision, arch, seed)
        for precision in ("fp32", "fp64")
        for arch in ("vgg16", "small_resnet")
        for seed in (1, 2)
    }
    assert set(values(sweep, "classifier.update.epochs")) == {(7,)}


def test_labels_stand_for_values(tmp_path: Path) -> None:
    triggers = {"small": {"name": "badnets"}, "large": {"name": "badnets", "size": 5}}
    poison = {"classifier.attack": {"trigger": {"name": "badnets"}}}
    sweep = spread(tmp_path, set=poison, product={"classifier.attack.trigger": triggers})
    assert [point.labels for point in sweep.points] == [
        {"points.classifier.attack.trigger": "small"}, {"points.classifier.attack.trigger": "large"},
    ]  # fmt: skip
    assert values(sweep, "classifier.attack.trigger.size") == [(3,), (5,)]
    assert [point.name for point in sweep.points] == ["trigger=small", "trigger=large"]


def test_later_stages_follow_each_earlier_point(tmp_path: Path) -> None:
    unlearn = experiment(tmp_path, "rnp", RNP)
    stages = {
        "attack": {"config": experiment(tmp_path, "classifier", CLASSIFIER), "seeds": [5, 6]},
        "defend": {
            "after": "attack",
            "set": {"rnp.model": "${attack.output}/model", "seed": "${attack.seed}"},
            "explicit": {
                "weak": {"config": unlearn, "rnp.alpha": 0.1},
                "strong": {"config": unlearn, "rnp.alpha": 0.4},
            },
        },
    }
    sweep = spread(tmp_path, stages=stages)
    first, second = sweep.stage("attack")
    models = [point.experiment.resolved()["rnp"]["model"] for point in sweep.stage("defend")]
    assert models == [f"runs/sweep/points/{key}/model" for key in (first.key, first.key, second.key, second.key)]
    assert [point.experiment.seed for point in sweep.stage("defend")] == [5, 5, 6, 6]
    assert [(point.root, point.column) for point in sweep.stage("defend")] == [
        (0, (0,)),
        (0, (1,)),
        (1, (0,)),
        (1, (1,)),
    ]
    assert sweep.stage("defend")[3].labels == {"attack.seed": 6, "defend": "strong"}


def test_keys_are_what_is_computed(tmp_path: Path) -> None:
    def keys(**content: Any) -> list[str]:
        return [point.key for point in spread(tmp_path, **content).points]

    base = keys(seeds=[1, 2])
    assert keys(seeds=[2, 3])[0] == base[1]  # in whatever sweep
    assert keys(seeds=[1, 2], output="elsewhere") == base
    assert keys(seeds=[1, 2], set={"classifier.update.epochs": 2}) == base  # what the file says already
    assert set(keys(seeds=[1, 2], set={"classifier.update.epochs": 3})).isdisjoint(base)
    assert len(set(keys(product={"loader.workers": [1, 2]}))) == 2  # varied, so told apart
    experiment_file = yaml.safe_load(Path(experiment(tmp_path, "classifier", CLASSIFIER)).read_text())
    experiment_file["trainer"] = {"log_every": 3}
    (tmp_path / "logged.yaml").write_text(yaml.safe_dump(experiment_file))
    assert keys(config=str(tmp_path / "logged.yaml"), seeds=[1, 2]) == base  # a resume may change it


def test_keys_of_later_stages_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    config = experiment(tmp_path, "classifier", CLASSIFIER)
    after = {"after": "a", "config": experiment(tmp_path, "rnp", RNP), "set": {"rnp.model": "${a.output}/model"}}
    stages = {"a": {"config": config}, "b": after}
    here, there = (spread(tmp_path, stages=stages, output=output) for output in ("here", "there"))
    assert [point.key for point in here.points] == [point.key for point in there.points]
    assert here.run_folder(here.points[1]) == Path("here/points") / here.points[1].key


def test_a_file_is_read_once_and_no_point_changes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack, read = {"trigger": {"name": "badnets"}, "rate": 0.1}, []

    def noted(path: Path, as_written: bool = False) -> dict[str, Any]:
        read.append(str(path))
        return read_yaml(path, as_written)

    monkeypatch.setattr(grid, "read_yaml", noted)
    changes = {
        "rate": {"classifier.attack.rate": 0.2, "classifier.update.epochs": 5},
        "none": {},
        "size": {"classifier.attack.trigger.size": 7, "classifier.data.max_samples": 9},
    }
    sweep = spread(tmp_path, set={"classifier.attack": attack}, explicit=changes, seeds=[1, 2])
    assert read.count(str(tmp_path / "classifier.yaml")) == 1
    keys = ("attack.rate", "attack.trigger.size", "update.epochs", "data.max_samples")
    assert values(sweep, *(f"classifier.{key}" for key in keys), "seed") == [
        (*point, seed) for point in ((0.2, 3, 5, None), (0.1, 3, 2, None), (0.1, 7, 2, 9)) for seed in (1, 2)
    ]


def test_written_points_are_the_experiments(tmp_path: Path) -> None:
    sweep = spread(tmp_path, output=str(tmp_path / "out"), seeds=[1, 2])
    progress.write_points(sweep, sweep.points)
    for point in sweep.points:
        assert load_experiment(tmp_path / "out" / "points" / f"{point.key}.yaml") == point.experiment


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"product": {"classifier.attack.trigger": "badnets"}}, "key 'product.classifier.attack.trigger': expected"),
        ({"product": {"classifier.epochs": [1]}}, "unknown key 'classifier.epochs'"),
        ({"produkt": {}}, "unknown key 'stages.points.produkt'; did you mean 'stages.points.product'?"),
        ({"zip": {"seed": [1, 2], "precision": ["fp32"]}}, "seed has 2, precision has 1"),
        ({"explicit": [3]}, "key 'explicit': expected a list of sections"),
        ({"product": {"seed": [1, 1]}}, "two points are the same experiment"),
        ({"product": {"seed": [1, 1, "never looked at"]}}, "two points are the same experiment"),
        ({"seeds": [1, 1]}, "two points are the same experiment"),
        ({"zip": {"seed": [1, 2, 1]}}, "two points are the same experiment"),
        ({"product": {key: [*range(20)] for key in "abcdefghij"}}, "10240000000000 points, at most 10000"),
        ({"seeds": [*range(10_001)]}, "stage 'points': 10001 points, at most 10000"),
        ({"set": {"output": "x"}}, "a point's folder follows from its key"),
        ({"set": {"classifier.arch": "${attack.output}"}}, "this stage comes after none"),
        ({"after": "attack"}, "'attack' is no stage above this one"),
        ({"config": "absent.yaml"}, "stage 'points': absent.yaml: cannot read the configuration"),
        ({"config": None}, "key 'config': missing"),
        ({"throttle": 0}, "key 'throttle' is 0"),
        ({"stages": {}}, "key 'stages' is empty"),
        ({"stages": {"a b": {}}}, "'a b' is no name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        spread(tmp_path, **content)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_reference_to_a_key_that_is_not_there(tmp_path: Path) -> None:
    config = experiment(tmp_path, "classifier", CLASSIFIER)
    stages = {"a": {"config": config}, "b": {"after": "a", "config": config, "set": {"seed": "${a.classifier.sead}"}}}
    with pytest.raises(UserError, match=r"the experiment of stage 'a' has no key 'classifier.sead'"):
        spread(tmp_path, stages=stages)


def test_every_sweep_file_in_the_tree_spreads_out() -> None:
    sizes = {path.stem: len(load_sweep(path).points) for path in Path("configs/sweeps").glob("*.yaml")}
    assert sizes["fashion_attacks_defences"] == 75
    assert all(sizes.values())


def test_the_leaderboard_has_eight_attacks_at_two_rates_and_ten_defences() -> None:
    for scale, images in ((None, 500), ("minutes", 250)):
        sweep = load_sweep("configs/sweeps/cifar10_leaderboard.yaml", scale)
        attacks, defences = sweep.stage("attack"), sweep.stage("defence")
        assert (len(attacks), len(defences)) == (17 * 3, 17 * 3 * 14)
        own = [point.experiment.options.attack for point in attacks]
        assert len({attack.trigger.name for attack in own}) == 8
        assert [sum(attack.rate == rate for attack in own) for rate in (0.1, 0.01, 0.0)] == [24, 24, 3]
        assert len({point.experiment.method for point in defences}) == 10
        assert {point.experiment.options.data.max_samples for point in defences} == {images}
        assert len({point.labels["attack"] for point in attacks}) == 17
        assert all(point.experiment.options.attack is None for point in defences)


def test_a_key_may_name_the_points_own_method(tmp_path: Path) -> None:
    files = [experiment(tmp_path, "classifier", CLASSIFIER), experiment(tmp_path, "rnp", RNP)]
    sweep = spread(tmp_path, set={"${method}.test.max_samples": 5}, product={"config": files})
    assert [(p.experiment.method, p.experiment.options.test.max_samples) for p in sweep.points] == [
        ("classifier", 5), ("rnp", 5),
    ]  # fmt: skip


def scaled(folder: Path, scales: dict[str, Any], scale: str) -> Sweep:
    config = experiment(folder, "classifier", CLASSIFIER)
    long, wide = {"classifier.update.epochs": 9, "classifier.arch": "vgg16"}, {"classifier.arch": "wrn_16_1"}
    stage = {"config": config, "set": {"precision": "fp64"}, "explicit": {"long": long, "wide": wide}, "seeds": [1, 2]}
    spread(folder, stages={"a": stage}, scales=scales)
    return load_sweep(folder / "sweep.yaml", scale)


def test_a_scale_goes_over_the_stages(tmp_path: Path) -> None:
    own = {"set": {"classifier.data.max_samples": 7}, "explicit": {"long": {"classifier.update.epochs": 3}}}
    sweep = scaled(tmp_path, {"small": {"a": {**own, "seeds": [5]}}}, "small")
    assert sweep.config.output == "runs/sweep_small" and sweep.scale == "small"
    keys = ("classifier.update.epochs", "classifier.arch", "precision", "classifier.data.max_samples", "seed")
    assert values(sweep, *keys) == [(3, "vgg16", "fp64", 7, 5), (2, "wrn_16_1", "fp64", 7, 5)]
    assert len(load_sweep(tmp_path / "sweep.yaml").points) == 4


@pytest.mark.parametrize(
    ("scales", "told"),
    [
        ({}, "--scale small is not in the file; known: none: it has no 'scales'"),
        ({"large": {}}, "--scale small is not in the file; known: large"),
        ({"small": {"b": {}}}, "key 'scales.small.b' is no stage; those are: a"),
        ({"small": {"a": {"sed": {}}}}, "unknown key 'scales.small.a.sed'"),
        ({"small": 3}, "key 'scales"),
        ({"small": {"a": {"explicit": {"long": 3}}}}, "key 'explicit': expected"),
    ],
)
def test_a_scale_that_does_not_fit_is_named(tmp_path: Path, scales: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        scaled(tmp_path, scales, "small")
    assert told in str(error.value) and "\n" not in str(error.value)


EXPECTED: dict[str, Any] = {"metric": "asr", "published": 3.6, "tolerance": 2, "source": "readme"}


def test_expectations_belong_to_a_scale(tmp_path: Path) -> None:
    stages = {"a": {"config": experiment(tmp_path, "classifier", CLASSIFIER), "seeds": [5]}}
    expect = [{**EXPECTED, "at": {"seed": 5}}, {**EXPECTED, "at": {"a.seed": 6}, "scale": "small"}]
    whole = spread(tmp_path, stages=stages, scales={"small": {"a": {"seeds": [6]}}}, expect=expect)
    small = load_sweep(tmp_path / "sweep.yaml", "small")
    assert [own.at for own in whole.config.expect] == [{"seed": 5}]
    assert [own.at for own in small.config.expect] == [{"a.seed": 6}]


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"at": {"seed": 7}}, "key 'expect[0].at': no point has seed=7"),
        ({"at": {"eed": 5}}, "no point has eed=5"),
        ({"scale": "large"}, "key 'expect[0].scale' is 'large', which 'scales' does not have"),
        ({"tolerance": -1}, "tolerance"),
        ({"metric": "ca"}, "metric"),
        ({"publish": 1}, "unknown key 'expect[0].publish'"),
    ],
)
def test_an_expectation_that_does_not_fit_is_named(tmp_path: Path, own: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=r"sweep\.yaml") as error:
        spread(tmp_path, seeds=[5, 6], expect=[{**EXPECTED, **own}])
    assert told in str(error.value)
