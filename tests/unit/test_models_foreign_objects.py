"""Objects beside the weights: named, never made, never called; among the weights they cost the file."""

import argparse
import datetime
import functools
import pathlib
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_classifier
from dist_defend.models.classifier import build_classifier
from dist_defend.models.foreign_classifier import import_classifier
from dist_defend.models.foreign_file import read_checkpoint
from dist_defend.models.mappings import list_objects

CALLS: list[str] = []


class Settings:
    """An object whose making would be noticed."""

    def __init__(self, *values: Any) -> None:
        CALLS.append("init")
        self.values = values

    def __setstate__(self, state: Any) -> None:
        CALLS.append("setstate")


class Reduced(Settings):
    def __reduce__(self) -> tuple[Any, ...]:
        return noticed, ("x",), {"a": 1}, iter([1, 2]), iter([("k", 1)])


class WithKeywords(Settings):
    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (1,), {"b": 2}

    def __new__(cls, *_: Any, **__: Any) -> "WithKeywords":
        CALLS.append("new")
        return super().__new__(cls)


class Table(dict[str, Any]):
    """A dict of somebody's own class, as configuration libraries have them."""


class Rows(list[Any]):
    """A list of somebody's own class."""


def noticed(*_: Any) -> Settings:
    CALLS.append("function")
    return Settings()


BESIDE: dict[str, tuple[Any, str]] = {
    "a namespace": (argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a")), "argparse.Namespace"),
    "a path": (pathlib.PurePosixPath("/data"), "pathlib.PurePosixPath"),
    "a date": (datetime.datetime(2024, 1, 2), "datetime.datetime"),
    "a function bound": (functools.partial(noticed, 1), "functools.partial"),
    "a class": (Settings, f"{__name__}.Settings"),
    "an object": (Settings(), f"{__name__}.Settings"),
    "an object with a state": (Reduced(), f"{__name__}.noticed"),
    "an object made with keywords": (WithKeywords(), f"{__name__}.WithKeywords"),
    "a dict's subclass": (Table(a=1), f"{__name__}.Table"),
    "a list's subclass": (Rows([1]), f"{__name__}.Rows"),
    "a network": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "an optimizer": (torch.optim.SGD([torch.ones(1)], 0.1), "torch.optim.sgd.SGD"),
    "numpy's text": (np.str_("text"), "numpy values of type U4"),
    "an array of objects": (np.array([Settings()], dtype=object), "numpy values of type O8"),
    "a complex number": (1 + 2j, "builtins.complex"),
    "as a key": ({Settings: 1}, ""),
    "in a set": ({Settings}, ""),
}


def saved(tmp_path: Path, content: Any, form: str) -> Path:
    path = tmp_path / "model.pth"
    protocol = 4 if form == "protocol 4" else 2
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy", pickle_protocol=protocol)
    return path


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("form", ["zip", "protocol 4", "legacy"])
def test_objects_beside_the_weights_are_named_and_never_made(tmp_path: Path, name: str, form: str) -> None:
    state = build_classifier("wrn_10_1", 10).net.state_dict()
    value, told = BESIDE[name]
    if name == "an object made with keywords" and form != "protocol 4":
        told = "functools.partial"  # as Python writes it below protocol 4
    source = saved(tmp_path, {"model": state, "args": value, "epoch": 3}, form)
    CALLS.clear()
    model, report = import_classifier(source)
    assert CALLS == [] and report.facts == {"epoch": 3}
    assert all(model.net.state_dict()[key].equal(tensor) for key, tensor in state.items())
    assert not told or told in report.objects


def test_the_command_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build_classifier("wrn_10_1", 10).net.state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1), "best_acc": 91.5}, tmp_path / "x.pth")
    assert main(["import", str(tmp_path / "x.pth"), "--out", str(tmp_path / "model")]) == 0
    told = capsys.readouterr().out
    assert "objects beside the weights, not made and not called: argparse.Namespace" in told
    assert "it says: best_acc 91.5" in told
    assert load_classifier(tmp_path / "model")[1].provenance["best_acc"] == 91.5


@pytest.mark.parametrize("wrap", [lambda s: {"net": s}, lambda s: {"a": {"state_dict": s}}, lambda s: s])
def test_an_object_among_the_weights_costs_the_file(tmp_path: Path, wrap: Any) -> None:
    state: dict[str, Any] = dict(build_classifier("wrn_10_1", 10).net.state_dict())
    key = next(iter(state))
    torch.save(wrap({**state, key: Settings()}), tmp_path / "x.pth")
    CALLS.clear()
    with pytest.raises(UserError, match=r"pickles more than tensors \('.*Settings'\), which could run code"):
        import_classifier(tmp_path / "x.pth")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"pickles more than tensors \('torch.nn.modules.linear.Linear'\)"):
        import_classifier(tmp_path / "x.pth")
    assert CALLS == []


@pytest.mark.parametrize(
    "name", ["os.system", "posix.fork", "subprocess.Popen", "builtins.eval", "builtins.exec", "importlib.import_module"]
)
def test_programs_are_refused_also_beside_the_weights(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    pickled = f"(dS'model'\n(dS'a.weight'\nI1\nssS'args'\nc{module}\n{function}\n(S'true'\ntRs.".encode()
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("a/data.pkl", pickled)
    with pytest.raises(UserError, match=rf"pickles more than tensors \('{name}'\)"):
        read_checkpoint(tmp_path / "x.pth")


def test_old_instances_and_keys_of_numbers(tmp_path: Path) -> None:
    """INST and OBJ of protocol 0; whole numbers whose hashes a file could choose to be one."""
    for pickled, told in (
        (b"(dS'a'\n(S'x'\niany\nThing\ns.", ["any.Thing"]),
        (b"(dS'a'\n(cany\nThing\nS'x'\nos.", ["any.Thing"]),
        (b"(dS'a'\ncany\nThing\n)\x81}S'b'\nI1\nsbs.", ["any.Thing"]),
    ):
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr("a/data.pkl", pickled)
        assert list_objects(read_checkpoint(tmp_path / "x.pth")) == told
    torch.save({2**61 - 1: 1}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="a number of more than 61 bits as a key"):
        read_checkpoint(tmp_path / "x.pth")
    torch.save({(1, "a"): 1, 2**60: 2}, tmp_path / "x.pth")
    assert read_checkpoint(tmp_path / "x.pth") == {"(1, 'a')": 1, 2**60: 2}


def test_defaultdicts_and_parameters_with_attributes_are_data(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "x"  # type: ignore[attr-defined]
    torch.save({"state": defaultdict(dict, {"a": {"b": 1}}), "w": parameter}, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth")
    assert read["state"] == {"a": {"b": 1}} and read["w"].tolist() == [1, 1]


def test_a_namespace_within_itself_and_within_lists_does_not_hang(tmp_path: Path) -> None:
    space = argparse.Namespace(a=1)
    space.self, space.rows = space, [[space] * 3] * 3
    state = build_classifier("wrn_10_1", 10).net.state_dict()
    torch.save({"args": space, "state_dict": state}, tmp_path / "x.pth")
    assert import_classifier(tmp_path / "x.pth")[1].objects == ("argparse.Namespace",)
