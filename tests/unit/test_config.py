"""Experiment files: what they give, what overrides change, and what is refused."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from dist_defend.config import Experiment, build_section, dump, load_experiment
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.errors import UserError
from dist_defend.methods.measure import probe
from dist_defend.methods.pretrain import simclr

MINIMAL: dict[str, Any] = {"method": "simclr", "output": "runs/x", "simclr": {"data": {"path": "data/x"}}}
PROBE: dict[str, Any] = {
    "method": "probe",
    "output": "runs/x",
    "probe": {
        "encoders": {"clean": "runs/clean/model"},
        "tasks": {"digits": {"train": {"path": "a"}, "test": {"path": "b"}, "target_class": 0}},
    },
}


def write(folder: Path, content: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, MINIMAL))
    assert experiment.seed == 100
    assert isinstance(experiment.options, simclr.Config)
    assert experiment.options.update.optimizer == OptimizerConfig("adam", lr=1e-3, weight_decay=1e-6)
    assert experiment.options.update.batch_size == 256


def test_overrides_and_numbers_without_a_point(tmp_path: Path) -> None:
    changes = ["simclr.update.optimizer.lr=3e-2", "simclr.update.epochs=7", "trainer.trackers=[]", "world_size=2"]
    experiment = load_experiment(write(tmp_path, MINIMAL), changes)
    assert experiment.options.update.optimizer.lr == 0.03
    assert (experiment.options.update.epochs, experiment.world_size, experiment.trainer.trackers) == (7, 2, ())


@pytest.mark.parametrize("content", [MINIMAL, PROBE])
def test_the_resolved_file_gives_the_same_experiment(content: dict[str, Any], tmp_path: Path) -> None:
    first = load_experiment(write(tmp_path, content))
    second = load_experiment(write(tmp_path, dump(first)))
    assert second == first
    assert second.digest() == first.digest()
    assert load_experiment(write(tmp_path, content), ["seed=101"]).digest() != first.digest()


def test_sections_in_dictionaries_become_dataclasses(tmp_path: Path) -> None:
    options = load_experiment(write(tmp_path, PROBE)).options
    assert isinstance(options.tasks["digits"], probe.TaskConfig)
    assert options.seeds == (100,)


def test_every_experiment_file_in_the_tree_is_valid() -> None:
    paths = sorted(path for path in Path("configs").rglob("*.yaml") if path.parent.name not in ("sweeps", "reproduce"))
    assert len(paths) > 10
    for path in paths:
        assert isinstance(load_experiment(path), Experiment)


def changed(base: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of nested dictionaries with one key set."""
    head, _, rest = place.partition(".")
    return base | {head: changed(base.get(head, {}), rest, value) if rest else value}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (changed(MINIMAL, "sed", 1), "unknown key 'sed'; did you mean 'seed'?"),
        (changed(MINIMAL, "options", {}), "unknown key 'options'"),
        (changed(MINIMAL, "simclr.update.batchsize", 8), "unknown key 'simclr.update.batchsize'; did you mean "
         "'simclr.update.batch_size'?"),
        (changed(MINIMAL, "simclr.zzz", 8), "unknown key 'simclr.zzz'; known: data, arch"),
        (changed(PROBE, "probe.tasks.digits.target", 0), "unknown key 'probe.tasks.digits.target'; did you mean "
         "'probe.tasks.digits.target_class'?"),
        (changed(MINIMAL, "seed", "many"), "key 'seed' is 'many'; expected int"),
        (changed(MINIMAL, "seed", True), "key 'seed' is 'True'; expected int"),
        (changed(MINIMAL, "seed", 1.5), "key 'seed' is 1.5; expected int"),
        (changed(MINIMAL, "seed", -1), "key 'seed' is -1"),
        (changed(MINIMAL, "simclr.update.epochs", [1]), r"key 'simclr.update.epochs' is \[1\]; expected int"),
        (changed(MINIMAL, "simclr.update.optimizer.lr", "fast"), "key 'simclr.update.optimizer.lr' is 'fast'"),
        (changed(MINIMAL, "simclr.update.optimizer.betas", [0.9]), "key 'simclr.update.optimizer.betas"),
        (changed(MINIMAL, "simclr.update.optimizer.name", "adma"), "key 'simclr.update.optimizer.name' is 'adma'"),
        (changed(MINIMAL, "simclr.update", 3), "key 'simclr.update' is 3; expected a section"),
        (changed(MINIMAL, "loader", None), "key 'loader' is None; expected a section"),
        (changed(MINIMAL, "simclr.update.batch_size", 0), "key 'simclr.update.batch_size' is 0; it must be at least 1"),
        (changed(MINIMAL, "simclr.update.optimizer.lr", -1), "key 'simclr.update.optimizer.lr' is -1"),
        (changed(MINIMAL, "simclr.temperature", 0), "key 'simclr.temperature' is 0"),
        (changed(MINIMAL, "trainer.log_every", 0), "key 'trainer.log_every' is 0"),
        (changed(MINIMAL, "loader.workers", 0), "key 'loader.workers' is 0"),
        (changed(MINIMAL, "simclr.data.fraction", 2), "key 'simclr.data.fraction' is 2"),
        (changed(PROBE, "probe.seeds", []), "key 'probe.seeds' is empty"),
        (changed(PROBE, "probe.seeds", [1, "x"]), "key 'probe.seeds"),
        (changed(PROBE, "probe.hidden", [8, 0]), r"key 'probe.hidden' is \[8, 0\]; a layer needs at least one unit"),
        (changed(PROBE, "probe.hidden", {"a": 8}), r"key 'probe.hidden' is {'a': 8}; expected a list"),
        (changed(PROBE, "probe.kind", "linear"), "key 'probe.kind' is 'linear'; expected"),
        (changed(PROBE, "probe.knn", {"k": 5}), "key 'probe.knn' is of kind knn alone"),
        (changed(PROBE, "probe", PROBE["probe"] | {"kind": "knn", "standardise": True}), "standardise' is of kind"),
        (changed(PROBE, "probe.knn", {"k": 0}), "key 'probe.knn.k' is 0; it must be positive"),
        (changed(PROBE, "probe.tasks.digits", {"train": {"path": "a"}}), "key 'probe.tasks.digits.test' is missing"),
        (changed(MINIMAL, "simclr", {}), "key 'simclr.data' is missing"),
        (changed(MINIMAL, "simclr", None), "the section 'simclr:' is missing"),
        (changed(MINIMAL, "method", "simlcr"), "key 'method' is 'simlcr'; it must be one of anp, badencoder, "),
        (changed(MINIMAL, "method", ["simclr"]), "key 'method' is"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_by_file_and_key(content: Any, told: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=told) as caught:
        load_experiment(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "write it as key.sub=value"),
        ("=1", "write it as key.sub=value"),
        ("seed.x=1", "'seed' is not a section"),
        ("seed=[1", "the value is not valid YAML"),
        ("simclr.upd.epochs=1", "unknown key 'simclr.upd'; did you mean 'simclr.update'?"),
    ],
)
def test_a_bad_override_is_refused(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        load_experiment(write(tmp_path, MINIMAL | {"seed": 1}), [override])


def test_a_section_keeps_the_methods_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    content = {"method": "simclr", "output": "x", "simclr": {"data": {"path": "d"}, "update": {"epochs": 5}}}
    update = load_experiment(write(tmp_path, content)).options.update
    assert (update.epochs, update.optimizer) == (5, OptimizerConfig("adam", lr=1e-3, weight_decay=1e-6))
    changes = ["simclr.update.optimizer.lr=0.5"]
    update = load_experiment(write(tmp_path, content), changes).options.update
    assert update.optimizer == OptimizerConfig("adam", lr=0.5, weight_decay=1e-6)
    changes = ["simclr.update.optimizer={name: sgd, lr: 0.5}"]  # another kind of section starts afresh
    update = load_experiment(write(tmp_path, content), changes).options.update
    assert update.optimizer == OptimizerConfig("sgd", lr=0.5)


@dataclass(frozen=True)
class Square:
    name: Literal["square"] = "square"
    size: int = 3


@dataclass(frozen=True)
class Blend:
    name: Literal["blend"] = "blend"
    alpha: float = 0.2


@dataclass(frozen=True)
class Attack:
    trigger: Square | Blend


@dataclass(frozen=True)
class Attacked:
    attack: Attack | None = None


def attacked(trigger: Any) -> Any:
    return build_section(Attacked, {"attack": {"trigger": trigger}}, Path("experiment.yaml"), "classifier.")


def test_the_name_of_a_section_chooses_its_kind() -> None:
    assert attacked({"name": "blend", "alpha": 1}) == Attacked(Attack(Blend(alpha=1.0)))
    assert attacked({"name": "square"}) == Attacked(Attack(Square()))


@pytest.mark.parametrize(
    ("trigger", "told"),
    [
        ({"name": "blnd"}, "key 'classifier.attack.trigger.name' is 'blnd'; did you mean 'blend'?"),
        ({"size": 3}, "key 'classifier.attack.trigger.name' is None; it must be one of square, blend"),
        ({"name": "square", "alpha": 1}, "unknown key 'classifier.attack.trigger.alpha'"),
        ({"name": "blend", "alpha": "x"}, "key 'classifier.attack.trigger.alpha' is 'x'; expected float"),
        (3, "key 'classifier.attack.trigger' is 3; expected a section with keys"),
    ],
)
def test_a_section_of_several_kinds_is_refused_by_its_own_rules(trigger: Any, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        attacked(trigger)


def test_a_scalar_where_a_list_is_wanted(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_experiment(path, ["trainer.trackers=tensorboard"]).trainer.trackers == ("tensorboard",)
    with pytest.raises(UserError, match=r"key 'simclr.augment.scale' is 0.5; expected a list of 2 values"):
        load_experiment(path, ["simclr.augment.scale=0.5"])
    seeds = load_experiment(write(tmp_path, PROBE), ["probe.seeds=7"]).options.seeds
    assert seeds == (7,)


@pytest.mark.parametrize("text", ["24:00:00", "1:30", "0100", "2026-01-31", "1_000", "1:30.5"])
def test_what_yaml_1_1_would_make_another_number_of_stays_text(text: str, tmp_path: Path) -> None:
    first = load_experiment(write(tmp_path, MINIMAL), [f"simclr.data.path={text}"])
    assert first.options.data.path == text
    assert load_experiment(write(tmp_path, dump(first))).options.data.path == text
    with pytest.raises(UserError, match="key 'seed' is"):
        load_experiment(write(tmp_path, MINIMAL), [f"seed={text}"])


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("+7", 7), ("0", 0), ("0x1F", 31), ("1e2", "refused"), ("-0", 0)]
)
def test_whole_numbers(text: str, value: int | str, tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    if value == "refused":
        with pytest.raises(UserError, match=r"key 'seed' is 100\.0; expected int"):
            load_experiment(path, [f"seed={text}"])
    else:
        assert load_experiment(path, [f"seed={text}"]).seed == value
