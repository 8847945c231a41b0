"""What a program does wrong is one line that names it, as the command line's."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import dist_defend as dd
from dist_defend.cli import main
from dist_defend.models.classifier import Classifier
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_model

IMAGES = torch.zeros(12, 3, SIZE, SIZE)
LABELS = torch.arange(12) % CLASSES
DATA = (IMAGES, LABELS)
CLEAN = (IMAGES + 0.5, LABELS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    make_classifier(folder / "model")
    make_model(folder / "encoder")
    make_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Any:
    return dd.load(place / "model")


@pytest.mark.parametrize(
    "options",
    [
        {"round": 3},
        {"rounds": 0},
        {"rounds": "many"},
        {"optimizer": {"name": "adam", "lr": 0.1, "momentun": 0.9}},
        {"attack": {"trigger": {"name": "badnet"}}},
        {"preset": "officially"},
        {"solver": "magic"},
    ],
)
def test_a_wrong_option_is_the_commands_line(
    options: dict[str, Any], place: Path, model: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"model": str(place / "model"), "data": {"path": "x"}, "test": {"path": "y"}, **options}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"method": "ibau", "output": str(tmp_path / "run"), "ibau": section}))
    assert main(["run", str(path)]) == 2
    line = capsys.readouterr().err.strip().removeprefix(f"error: {path}: ")
    with pytest.raises(dd.UserError) as error:
        dd.defend("ibau", model, CLEAN, test=DATA, **options)
    assert str(error.value) == f"defend: {line}"


CALLS: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a plain network": (
        lambda _, p: dd.evaluate(nn.Linear(1, 1), DATA),  # type: ignore[arg-type]
        "a Linear is no model of dist_defend: wrap the network first",
    ),
    "an encoder": (lambda _, p: dd.evaluate(p / "encoder", DATA), "holds an encoder .*not a classifier"),
    "no such method": (lambda m, _: dd.defend("i_bau", m, CLEAN, test=DATA), "key 'method' is 'i_bau'; it must be one"),
    "no defence": (lambda m, _: dd.defend("simclr", m, CLEAN), "'simclr' is no defence: dist_defend.train runs it"),
    "no training": (lambda m, _: dd.train("ibau", CLEAN), "'ibau' is a defence: dist_defend.defend runs it"),
    "no test set": (lambda m, _: dd.defend("ibau", m, CLEAN), "defend: key 'ibau.test' is missing"),
    "no clean data": (lambda m, _: dd.defend("ibau", m, test=DATA), "defend: key 'ibau.data' is missing"),
    "data that nothing reads": (
        lambda m, _: dd.defend("zskt", m, CLEAN, test=DATA),
        "method 'zskt' takes no clean: leave it out",
    ),
    "data twice": (lambda m, _: dd.defend("ibau", m, CLEAN, data=CLEAN, test=DATA), "'data' is given twice"),
    "other labels": (
        lambda m, _: dd.evaluate(m, (IMAGES, LABELS + 1)),
        r"evaluate\.data: label 3 is none of 3 classes, 0 to 2",
    ),
    "no labels": (lambda m, _: dd.evaluate(m, IMAGES), "has images without a label"),
    "another size": (
        lambda m, _: dd.evaluate(m, (IMAGES[..., 1:, 1:], LABELS)),
        r"images of \(15, 15, 3\)",
    ),
    "not in [0, 1]": (lambda m, _: dd.defend("ibau", m, (IMAGES - 1, LABELS), test=DATA), r"ibau\.data: .* \[0, 1\]"),
    "no such folder": (lambda m, _: dd.evaluate(m, "nowhere"), "nowhere"),
    "a wrong class": (
        lambda m, _: dd.evaluate(m, DATA, dd.attack("badnets", target_class=3)),
        "target_class' is 3; the classes are 0 to 2",
    ),
    "a wrong seed": (lambda m, _: dd.defend("ibau", m, CLEAN, test=DATA, seed=-1), "key 'seed' is -1"),
    "a wrong loader": (
        lambda m, _: dd.defend("ibau", m, CLEAN, test=DATA, loader={"backends": "torch"}),
        "unknown key 'loader.backends'; did you mean 'loader.backend'",
    ),
    "no option": (lambda m, _: dd.defend("ibau", m, CLEAN, test=DATA, rounds=print), "key 'ibau.rounds' is a builtin"),
    "a file that is none": (lambda _, p: dd.load(p / "none.pt"), "none.pt"),
    "a data set for a model": (lambda _, p: dd.load(p / "data"), "data"),
    "an option of a folder": (
        lambda _, p: dd.load(p / "model", arch="resnet18"),
        "'arch' is for checkpoints",
    ),
    "a network for a file": (lambda _, p: dd.load(p / "none.pt", net=nn.Linear(1, 1)), "'net' is for model folders"),
    "no option of import": (lambda _, p: dd.load(p / "none.pt", classes=3), "unknown option 'classes'; known: arch"),
    "no trigger": (lambda *_: dd.attack(), "attack: key 'trigger' is missing"),
    "another trigger": (
        lambda *_: dd.attack("badnet"),
        "attack: key 'trigger.name' is 'badnet'",
    ),
    "another key": (
        lambda *_: dd.attack("badnets", sise=3),
        "did you mean 'trigger.size'",
    ),
    "an array": (
        lambda *_: dd.attack("blended", image=IMAGES),
        "key 'attack.trigger.image' is data or",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_is_one_line(call: str, model: Classifier, place: Path) -> None:
    act, told = CALLS[call]
    with pytest.raises(dd.UserError, match=told) as error:
        act(model, place)
    assert "\n" not in str(error.value)


class Odd(nn.Module):
    """A network that does something."""

    def __init__(self, does: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.layer, self.does = nn.Linear(3, CLASSES), does

    def forward(self, x: Tensor) -> Any:
        return self.does(self.layer(x.mean((2, 3))))


class Raising(Odd):
    def forward(self, x: Tensor) -> Any:
        raise AttributeError("it has no heart")


class Stateful(Odd):
    def get_extra_state(self) -> Any:
        return {"a": 1}


class Uncopyable(Odd):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("net", "changes", "told"),
    [
        (
            Odd(),
            {"num_classes": 4},
            r"Odd does not give logits \(B, 4\) .*: one image gives something of shape \(1, 3\)",
        ),
        (Odd(lambda y: (y, y)), {}, "one image gives something in a tuple"),
        (Raising(), {}, "it has no heart"),
        (Stateful(), {}, "'_extra_state' in the state dict is no tensor"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES)), {}, "has lazy parameters"),
        (nn.Flatten(), {}, "Flatten has no parameters"),
        (Odd, {}, "a type is no torch.nn.Module"),
        (Odd(), {"normalization": "cifar"}, "unknown normalization 'cifar'"),
        (Odd(), {"normalization": (0.5,)}, r"normalization is \(0.5,\); give \(mean, std\)"),
        (Odd(), {"normalization": (0.5, 0.0)}, "each std positive"),
        (Odd(), {"normalization": ((0.5, 0.5), 0.5)}, r"give \(mean, std\), each one number or three"),
        (Odd(), {"classes": ("a",)}, "'classes' has 1 names, but num_classes is 3"),
        (Odd(), {"image_size": 0}, "key 'image_size' is 0"),
        (Odd(), {"arch": "resnet17"}, "unknown arch 'resnet17'"),
    ],
)
def test_a_network_that_is_no_classifier_is_one_line(net: Any, changes: dict[str, Any], told: str) -> None:
    options: dict[str, Any] = {"num_classes": CLASSES, "image_size": SIZE, "normalization": "none", **changes}
    with pytest.raises(dd.UserError, match=told) as error:
        dd.wrap(net, **options)
    assert "\n" not in str(error.value)


def test_a_network_that_cannot_be_copied_is_one_line() -> None:
    model = dd.wrap(Uncopyable(), CLASSES, SIZE, "none")
    with pytest.raises(dd.UserError, match=re.escape("Uncopyable cannot be copied (copy.deepcopy says: no copies)")):
        dd.evaluate(model, DATA)


def test_a_folder_of_a_network_that_no_name_builds_says_how_to_load_it(tmp_path: Path) -> None:
    dd.save(dd.wrap(Odd(), CLASSES, SIZE, "none"), tmp_path / "odd")
    with pytest.raises(dd.UserError, match=r"a network of another Python program, .* dist_defend.load\(FOLDER, net="):
        dd.load(tmp_path / "odd")
    with pytest.raises(dd.UserError, match="does not fit the model"):
        dd.load(tmp_path / "odd", net=nn.Linear(3, CLASSES))
    (tmp_path / "file").write_text("")
    with pytest.raises(dd.UserError, match="cannot be written"):
        dd.save(dd.wrap(Odd(), CLASSES, SIZE, "none"), tmp_path / "file" / "model")
