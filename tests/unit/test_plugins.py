"""What other packages add, and what is never imported because a file says so."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_defend import api, evaluate_command, plugins
from dist_defend.attacks.attack import attack_from
from dist_defend.config import load_experiment
from dist_defend.errors import UserError
from dist_defend.methods import find_method, method_names
from dist_defend.models.artifact import ModelCard, load_artifact, load_classifier, save_artifact
from dist_defend.models.classifier import build_classifier
from dist_defend.models.encoder import build_encoder
from dist_defend.models.pixel_space import normalization_constants
from tests.plugs import write_distribution
from tests.runs import make_classifier, make_experiment, options_of

NETS = """
    from torch import nn

    MADE = []

    def make(num_classes, image_size):
        MADE.append((num_classes, image_size))
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))

    def no_network(num_classes, image_size):
        return "a network"

    SIX = ((0.1, 0.2, 0.3), [0.4, 0.5, 0.6])
    FLAT = ((0.1, 0.2, 0.3), (0.4, 0.0, 0.6))
    SHORT = ((0.1,), (0.4,))
"""
METHOD = """
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        rounds: int = 3

    def build(config, context):
        raise NotImplementedError
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(name, kind={entry: target}, modules={...}): as though a distribution were installed, for this test."""
    before = set(sys.modules)

    def put(name: str, modules: dict[str, str] | None = None, **entries: dict[str, str]) -> None:
        monkeypatch.syspath_prepend(str(write_distribution(tmp_path / name, name, entries, modules or {})))
        plugins._claims.cache_clear()

    monkeypatch.setattr(plugins, "_named_by_user", set())
    yield put
    plugins._claims.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


def test_a_method_of_another_package(install: Install, tmp_path: Path) -> None:
    install("good-one", {"plug_method": METHOD}, methods={"renewal": "plug_method"})
    assert "renewal" in method_names() and "ibau" in method_names()
    assert "plug_method" not in sys.modules, "a list imports nothing"
    experiment = load_experiment(make_experiment(tmp_path, "renewal", {"rounds": 7}))
    assert experiment.options == find_method("renewal").Config(7)
    assert load_experiment(make_experiment(tmp_path, "renewal", {})).options.rounds == 3
    with pytest.raises(UserError, match=r"unknown key 'renewal\.round'; did you mean 'renewal\.rounds'"):
        load_experiment(make_experiment(tmp_path, "renewal", {"round": 7}))
    with pytest.raises(UserError, match=r"key 'renewal\.rounds' is 'x'; expected int"):
        load_experiment(make_experiment(tmp_path, "renewal", {"rounds": "x"}))


def test_two_packages_with_one_name(install: Install, tmp_path: Path) -> None:
    install("first-pack", {"plug_a": METHOD}, methods={"renewal": "plug_a", "alone": "plug_a"})
    install("second-pack", {"plug_b": METHOD}, methods={"renewal": "plug_b"})
    for use in (lambda: find_method("renewal"), lambda: load_experiment(make_experiment(tmp_path, "renewal", {}))):
        with pytest.raises(UserError) as caught:
            use()
        assert "first-pack 1.5" in str(caught.value) and "second-pack 1.5" in str(caught.value)
        assert "uninstall one" in str(caught.value)
    assert find_method("alone").__name__ == "plug_a"


@pytest.mark.parametrize(
    ("kind", "name", "use"),
    [
        ("methods", "ibau", lambda: find_method("ibau")),
        ("architectures", "small_resnet", lambda: build_classifier("small_resnet", 3)),
        ("architectures", "small_cifar", lambda: build_encoder("small_cifar")),
        ("normalizations", "gtsrb", lambda: normalization_constants("gtsrb")),
        ("triggers", "badnets", lambda: attack_from({"trigger": {"name": "badnets"}})),
    ],
)
def test_a_name_of_ours(kind: str, name: str, use: Callable[[], Any], install: Install) -> None:
    use()
    install("thief", {"plug_thief": METHOD}, **{kind: {name: "plug_thief"}})
    with pytest.raises(UserError, match=rf"'{name}' is in {kind} of dist-defend [\d.]+ and thief 1\.5"):
        use()
    assert "plug_thief" not in sys.modules
    assert find_method("rnp") and build_classifier("wrn_10_1", 3, "cifar10")  # what the thief has not taken


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import no_such_package_at_all", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("raise ValueError('one\\ntwo')", "ValueError"),
    ],
)
def test_a_package_that_cannot_be_imported(code: str, told: str, install: Install, tmp_path: Path) -> None:
    install(
        "broken-one", {"plug_broken": code}, methods={"renewal": "plug_broken"}, architectures={"net": "plug_broken:x"}
    )
    for use in (lambda: find_method("renewal"), lambda: build_classifier("net", 3)):
        with pytest.raises(UserError, match=f"broken-one 1.5 cannot be imported .{told}") as caught:
            use()
        assert "\n" not in str(caught.value) and "uninstall" in str(caught.value)
    load_experiment(make_experiment(tmp_path, "classifier", options_of("classifier", tmp_path)))
    assert "plug_broken" not in sys.modules


@pytest.mark.parametrize("code", ["Config = 3\ndef build(config, context): ...", METHOD.partition("    def build")[0]])
def test_a_module_that_is_no_method(code: str, install: Install) -> None:
    install("odd-one", {"plug_odd": code}, methods={"renewal": "plug_odd"})
    with pytest.raises(UserError, match=r"odd-one 1\.5 is no method: it needs a dataclass Config and a function build"):
        find_method("renewal")


def test_an_architecture_and_a_normalization_of_a_package(install: Install, tmp_path: Path) -> None:
    install(
        "nets", {"plug_nets": NETS}, architectures={"flat": "plug_nets:make"}, normalizations={"six": "plug_nets:SIX"}
    )
    model = build_classifier("flat", 3, "six", image_size=16)
    assert sys.modules["plug_nets"].MADE == [(3, 16)]
    expected = (torch.full((1, 3, 2, 2), 0.5) - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(1, 3, 1, 1)
    torch.testing.assert_close(model.normalize(torch.full((1, 3, 2, 2), 0.5)), expected)
    save_artifact(tmp_path / "m", model, ModelCard("classifier", "flat", "six", 16, num_classes=3))
    again = load_classifier(tmp_path / "m")[0]
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(again(images), model(images))
    with pytest.raises(UserError, match="arch 'flat' is none of the encoders"):
        build_encoder("flat")
    with pytest.raises(UserError, match=r"unknown arch 'flit': did you mean 'flat'\?"):
        build_classifier("flit", 3)
    with pytest.raises(UserError, match=r"unknown normalization 'sux': did you mean 'six'\?"):
        normalization_constants("sux")


TRIGGER = """
    from dataclasses import dataclass
    from typing import Literal

    import numpy as np

    from dist_defend.attacks.trigger import TriggerOptions, as_images, Additive

    @dataclass(frozen=True)
    class Shade(TriggerOptions):
        name: Literal["shade"] = "shade"
        amount: float = 51.0
        cells: tuple[int, ...] = (1, 2)

        def build(self, image_size):
            return Additive(as_images(np.full((image_size, image_size), self.amount)))

    @dataclass(frozen=True)
    class Own(Shade):
        name: Literal["plug_shade:Own"] = "plug_shade:Own"

    class Loose:
        name = "loose"
"""


def classifier_with(trigger: dict[str, Any], folder: Path) -> Path:
    options = options_of("classifier", folder)
    return make_experiment(folder, "classifier", options | {"attack": {"trigger": trigger, "target_class": 1}})


def test_a_trigger_of_a_package(install: Install, tmp_path: Path) -> None:
    install("shades", {"plug_shade": TRIGGER}, triggers={"shade": "plug_shade:Shade"})
    file = classifier_with({"name": "shade", "amount": 102, "cells": [3]}, tmp_path)
    attack = load_experiment(file).options.attack
    assert asdict(attack.trigger) == {"name": "shade", "amount": 102.0, "cells": (3,)}
    stamped = attack.trigger.build(4)(torch.full((1, 3, 4, 4), 0.25))
    torch.testing.assert_close(stamped, torch.full((1, 3, 4, 4), 0.65))  # 102 / 255 more
    again = attack_from(json.loads(json.dumps(asdict(attack))))
    assert again.trigger == attack.trigger and again == attack
    for change, told in (
        ("amont=3", r"unknown key 'classifier\.attack\.trigger\.amont'; did you mean"),
        ("amount=x", r"key 'classifier\.attack\.trigger\.amount' is 'x'; expected float"),
        ("name=shad", r"did you mean 'shade'\? it must be one of badnets, .*, shade"),
    ):
        with pytest.raises(UserError, match=told):
            load_experiment(file, [f"classifier.attack.trigger.{change}"])


def test_a_trigger_of_the_users_module(install: Install, tmp_path: Path) -> None:
    install("shades", {"plug_shade": TRIGGER})
    attack: dict[str, Any] = {"trigger": {"name": "plug_shade:Own", "amount": 1.0, "cells": [1]}, "target_class": 0}
    with pytest.raises(UserError, match="DIST_DEFEND_IMPORT=plug_shade"):  # a model's card alone has no say
        attack_from(attack)
    assert "plug_shade" not in sys.modules
    loaded = load_experiment(classifier_with(attack["trigger"], tmp_path)).options.attack
    assert type(loaded.trigger).__name__ == "Own" and attack_from(attack).trigger == loaded.trigger


def test_a_trigger_of_the_users_module_in_python_and_in_an_attack_file(install: Install, tmp_path: Path) -> None:
    install("shades", {"plug_shade": TRIGGER})
    section = {"attack": {"trigger": {"name": "plug_shade:Own", "amount": 3}}}
    (tmp_path / "model.json").write_text(json.dumps({"format": 2, **section}))
    (tmp_path / "attack.yaml").write_text(json.dumps(section))
    with pytest.raises(UserError, match="DIST_DEFEND_IMPORT=plug_shade"):
        evaluate_command.read_attack(tmp_path / "model.json")
    assert evaluate_command.read_attack(tmp_path / "attack.yaml").trigger.amount == 3  # type: ignore[union-attr]
    plugins._named_by_user.clear()
    assert api.attack("plug_shade:Own", amount=4, target_class=2).trigger.amount == 4  # type: ignore[union-attr]


@pytest.mark.parametrize("target", ["plug_shade:Loose", "plug_shade:Own", "plug_shade:np"])
def test_what_is_no_trigger(target: str, install: Install, tmp_path: Path) -> None:
    install("shades", {"plug_shade": TRIGGER}, triggers={"loose": target})
    with pytest.raises(UserError, match=r"'loose' of package shades 1\.5 is no trigger: it needs a frozen dataclass"):
        load_experiment(classifier_with({"name": "loose"}, tmp_path))
    with pytest.raises(UserError, match=r"shades 1\.5 is no trigger"):
        attack_from({"trigger": {"name": "loose"}})


def test_an_encoder_of_a_package(install: Install) -> None:
    code = """
        from dist_defend.models.architectures import EncoderArchitecture
        from dist_defend.models.simclr_resnet import small_encoder

        OWN = EncoderArchitecture(small_encoder, 256, "as small_cifar", "nobody")
    """
    install("encoders", {"plug_encoders": code}, architectures={"own": "plug_encoders:OWN"})
    assert build_encoder("own")(torch.rand(2, 3, 16, 16)).shape == (2, 256)
    with pytest.raises(UserError, match="arch 'own' is none of the classifiers"):
        build_classifier("own", 3)


@pytest.mark.parametrize(
    ("use", "told"),
    [
        (lambda: build_classifier("plug_nets:no_network", 3), "made a str: its function must return a torch.nn.Module"),
        (lambda: build_classifier("plug_nets:SIX", 3), "is a tuple: name a function"),
        (lambda: build_classifier("plug_nets:absent", 3), "cannot be imported .AttributeError"),
        (lambda: normalization_constants("plug_nets:make"), "is no pair of three means and three stds"),
        (lambda: normalization_constants("plug_nets:SHORT"), "is no pair of three means and three stds"),
        (lambda: normalization_constants("plug_nets:FLAT"), "each std positive"),
    ],
)
def test_objects_that_do_not_fit(use: Callable[[], Any], told: str, install: Install) -> None:
    install("nets", {"plug_nets": NETS})
    plugins.allow([f"plug_nets:{name}" for name in ("no_network", "SIX", "absent", "make", "SHORT", "FLAT")])
    with pytest.raises(UserError, match=told):
        use()


@pytest.fixture
def hostile(install: Install, tmp_path: Path) -> Path:
    """A model folder of others, whose card names a module that is there to be imported."""
    install("nets", {"plug_nets": NETS})
    folder = tmp_path / "model"
    plugins.allow("plug_nets:make")
    model = build_classifier("plug_nets:make", 3, "none", 16)
    save_artifact(folder, model, ModelCard("classifier", "plug_nets:make", "none", 16, num_classes=3))
    del sys.modules["plug_nets"]
    plugins._named_by_user.clear()
    return folder


def test_a_model_folder_cannot_have_a_module_imported(hostile: Path) -> None:
    with pytest.raises(UserError, match="set DIST_DEFEND_IMPORT=plug_nets") as caught:
        load_artifact(hostile)
    assert "plug_nets:make" in str(caught.value) and str(hostile) in str(caught.value)
    with pytest.raises(UserError, match="DIST_DEFEND_IMPORT"):
        build_encoder("plug_nets:make")
    with pytest.raises(UserError, match="DIST_DEFEND_IMPORT"):
        normalization_constants("plug_nets:SIX")
    assert "plug_nets" not in sys.modules


@pytest.mark.parametrize("value", ["plug_nets", "other, plug_nets:make", "plug_nets,other"])
def test_a_user_may_allow_a_module(value: str, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIST_DEFEND_IMPORT", value)
    assert load_classifier(hostile)[0](torch.rand(1, 3, 16, 16)).shape == (1, 3)


@pytest.mark.parametrize("value", ["", "plug", "plug_nets.make", "plug_nets:mak"])
def test_another_module_that_is_allowed_opens_nothing(
    value: str, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_DEFEND_IMPORT", value)
    with pytest.raises(UserError, match="names code"):
        load_artifact(hostile)
    assert "plug_nets" not in sys.modules


def test_what_an_installed_plug_in_names_is_allowed(hostile: Path, install: Install) -> None:
    install("names-it", architectures={"flat": "plug_nets:make"})
    load_artifact(hostile)
    assert "plug_nets" in sys.modules


def test_what_the_configuration_names_is_allowed_and_nothing_else(install: Install, tmp_path: Path) -> None:
    install("nets", {"plug_nets": NETS})
    options = options_of("classifier", tmp_path) | {"arch": "plug_nets:make"}
    load_experiment(make_experiment(tmp_path, "classifier", options), ["classifier.normalization='plug_nets:SIX'"])
    assert "plug_nets" not in sys.modules
    assert build_classifier("plug_nets:make", 3, "plug_nets:SIX", 16).num_classes == 3
    with pytest.raises(UserError, match="names code"):
        build_classifier("plug_nets:no_network", 3)


def test_names_of_libraries_are_no_modules(install: Install, tmp_path: Path) -> None:
    """timm:NAME means timm's, also where a module of that name could be imported."""
    plugins.allow("torchvision:resnet18")
    assert build_classifier("torchvision:resnet18", 3, "none", 32).net.get_parameter("fc.bias").shape == (3,)
    with pytest.raises(UserError, match="timm has no model 'create_model'"):
        build_classifier("timm:create_model", 3)


def test_a_card_with_an_unknown_plug_in_says_what_is_missing(tmp_path: Path) -> None:
    folder = Path(make_classifier(tmp_path / "m"))
    model, card = load_classifier(folder)
    save_artifact(folder, model, replace(card, arch="a_net_of_a_package"))
    with pytest.raises(UserError, match="unknown arch 'a_net_of_a_package'"):
        load_artifact(folder)


def test_lists_need_no_torch_and_import_no_plug_in(tmp_path: Path) -> None:
    code = "import sys; sys.argv[1:] = ['methods']; from dist_defend.cli import main; main(); print(*sys.modules)"
    write_distribution(tmp_path, "good-one", {"methods": {"renewal": "plug_method"}}, {"plug_method": METHOD})
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    *lines, modules = done.stdout.splitlines()
    assert not {"torch", "numpy", "plug_method", "dist_defend.methods.defend.ibau"} & set(modules.split())
    assert any(line.split()[:3] == ["renewal", "good-one", "1.5"] for line in lines)
    assert any(line.startswith("ibau") and "dist-defend" in line and "Zeng" in line for line in lines)
