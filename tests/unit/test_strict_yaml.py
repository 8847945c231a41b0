"""YAML: one meaning per file, bounded, or one line that names file, line and key."""

import os
from pathlib import Path
from typing import Any

import pytest

from dist_defend.config import dump, load_experiment
from dist_defend.errors import UserError
from dist_defend.strict_yaml import MOST_BYTES, dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml: line 3: key 'a' comes twice"),
        ("s:\n  k: 1\n  'k': 2\n", "x.yaml: line 3: key 'k' comes twice"),
        ("{1: a, 1.0: b}", "line 1: key '1.0' comes twice"),
        ("{1: a, true: b}", "line 1: key 'True' comes twice"),
        ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", "line 2: key '<<' comes twice"),
        ("null: 1\n", "line 1: a key is neither text nor number"),
        ("? [a]\n: 1\n", "line 1: a key is neither text nor number"),
        (".nan: 1\n", "line 1: a key is neither text nor number"),
        ("a: &a [*a]\n", "line 1: \\*a stands inside of what it names"),
        ("a: &a {b: *a}\n", "stands inside of what it names"),
        ("[" * 60, "nested deeper than 40 levels"),
        ("a:\n" + "".join(" " * n + "- \n" for n in range(1, 60)), "nested deeper than 40 levels"),
        ("a: .nan\n", "x.yaml: key 'a' is nan; it must be a finite number"),
        ("s: {a: [1, -.inf]}\n", "key 's.a.1' is -inf; it must be a finite number"),
        ("a: 1e999\n", "key 'a' is inf"),
        ("a: 0x" + "f" * 6000 + "\n", "key 'a' is larger than any number"),
        ("a: " + "9" * 5000 + "\n", "not valid YAML"),
        ('a: "x\\e[2J"\n', r"key 'a' holds a control character: take it out of 'x\\x1b\[2J'"),
        ('a: "\\0"\n', "key 'a' holds a control character"),
        ('a: "\\uD800"\n', "key 'a' holds a control character"),
        ('"a\\b": 1\n', "holds a control character"),
        ("a: !!binary aGk=\n", "key 'a' is a bytes; expected text"),
        ("a: !!set {b}\n", "key 'a' is a set|neither text"),
        ("a: !!int x\n", "not valid YAML: a value is not of the kind that its tag says"),
        ("a: !!timestamp x\n", "not valid YAML: a value is not of the kind that its tag says"),
        ("a: !!bool x\n", "not valid YAML: a value is not of the kind that its tag says"),
        ("a: !!float x\n", "not valid YAML: a value is not of the kind that its tag says"),
        ("a: !!python/name:os.system\n", "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: [1\n", "not valid YAML"),
    ],
)
def test_what_has_no_meaning_is_refused(text: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        parse_yaml(text, "x.yaml")
    assert str(error.value).startswith("x.yaml: ") and str(error.value).isprintable()


@pytest.mark.parametrize("merge", ["", "<<: "])
def test_aliases_that_grow_beyond_any_file(merge: str) -> None:
    lines = ["a0: &a0 {k: x}"]
    for n in range(1, 40):
        lines.append(f"a{n}: &a{n} {{{merge or 'b: '}[*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]}}")
    with pytest.raises(UserError, match="more than 250000 values, aliases spelled out"):
        parse_yaml("\n".join(lines), "x.yaml")
    long = "a: &a " + "x" * 500_000 + "\nb: [" + ", ".join(["*a"] * 1000) + "]\n"
    with pytest.raises(UserError, match="more than 250000 values"):
        parse_yaml(long, "x.yaml")


def test_anchors_and_merges_are_copies() -> None:
    tree = parse_yaml("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 5}\n", "x.yaml")
    assert tree == {"a": {"x": 1, "y": [2]}, "b": {"x": 1, "y": [2]}, "c": {"x": 5, "y": [2]}}
    tree["a"]["x"] = 9
    tree["a"]["y"].append(3)
    assert tree["b"] == {"x": 1, "y": [2]} and tree["c"]["y"] == [2]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "latin-1", "utf-16", "large", "no path"])
def test_what_is_no_text_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "folder":
            path.mkdir()
        case "latin-1":
            path.write_bytes("a: é".encode("latin-1"))
        case "utf-16":
            path.write_bytes("a: 1".encode("utf-16"))
        case "large":
            path.write_bytes(b"#" * (MOST_BYTES + 1))
        case "no path":
            path = tmp_path / "a\0b"
    with pytest.raises(UserError) as error:
        read_yaml(path)
    told = str(error.value)
    wanted = {"pipe": "not a regular file", "device": "not a regular file", "large": "larger than 1 MiB"}
    assert wanted.get(kind, "cannot read the configuration: ") in told and told.isprintable()


@pytest.mark.parametrize(
    "text", ["1e3", "0x1F", "24:00:00", "0100", "yes", "1.", "null", "2026-01-01", "+7", ".5e1", "~", "="]
)
def test_text_is_written_so_that_it_is_text_again(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": text}), "x.yaml") == {"a": text}


BASE: dict[str, Any] = {"method": "simclr", "output": "runs/x", "simclr": {"data": {"path": "data/x"}}}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("simclr.temperature=.nan", "override 'simclr.temperature=.nan': the value is nan; it must be a finite number"),
        ("simclr.update.optimizer.lr=1e999", "the value is inf; it must be a finite number"),
        ("simclr={a: 1, a: 2}", "line 1: key 'a' comes twice"),
        ("simclr.update=[[", "the value is not valid YAML"),
        ('output="a\\e"', "the value holds a control character"),
        ("simclr.temperature=true", "key 'simclr.temperature' is 'True'; expected float"),
        ("simclr.grad_cache=1", "key 'simclr.grad_cache' is 1; expected bool"),
        ("simclr.update.epochs=true", "key 'simclr.update.epochs' is 'True'; expected int"),
        ("simclr.update.max_grad_norm=true", "key 'simclr.update.max_grad_norm' is 'True'; expected float | null"),
        ("simclr.update.max_grad_norm=0", "key 'simclr.update.max_grad_norm' is 0.0; it must be positive"),
        ("world_size=true", "key 'world_size' is 'True'"),
        ("world_size=0", "key 'world_size' is 0; it must be at least 1"),
        ("output=7", "key 'output' is 7; expected str"),
        ("output=''", "key 'output' is ''; it must name a folder of its own"),
        ("output=runs/../..", "key 'output' is 'runs/../..'; it must name a folder of its own"),
        ("method=[simclr]", "key 'method' is ['simclr']"),
        ("simclr.augment.ratio=2", "expected a list of 2 values"),
    ],
)
def test_overrides_are_read_as_strictly(override: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml(BASE))
    with pytest.raises(UserError) as error:
        load_experiment(path, [override])
    assert told in str(error.value)


def test_a_section_shared_by_an_alias_is_changed_in_one_place(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    tasks = "{a: &t {train: {path: p}, test: {path: q}, target_class: 0}, b: *t}"
    path.write_text(f"method: probe\noutput: runs/x\nprobe: {{encoders: {{e: m}}, tasks: {tasks}}}\n")
    changed = load_experiment(path, ["probe.tasks.a.target_class=1"]).options.tasks
    assert (changed["a"].target_class, changed["b"].target_class) == (1, 0)


def test_the_name_of_a_trigger_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    poison = "{trigger: {name: [badnets]}}"
    path.write_text(
        f"method: classifier\noutput: x\nclassifier: {{data: {{path: a}}, test: {{path: b}}, attack: {poison}}}\n"
    )
    with pytest.raises(UserError, match=r"key 'classifier.attack.trigger.name' is \['badnets'\]; .*it must be one of"):
        load_experiment(path)


def test_a_path_like_a_number_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(dump_yaml(BASE))
    first = load_experiment(path, ['simclr.data.path="1e3"'])
    path.write_text(dump(first))
    assert load_experiment(path) == first
