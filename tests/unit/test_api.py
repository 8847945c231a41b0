"""The package from Python: networks that it has never seen, and the same numbers as the command line's."""

import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

import dist_defend as dd
from dist_defend.cli import main
from dist_defend.models.artifact import load_artifact, read_card
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.encoder import SimCLR
from tests.runs import CLASSES, SIZE, make_classifier, make_model

CORNER = (slice(None), slice(None), slice(-3, None), slice(-3, None))


class Bright(nn.Module):
    """A CNN of this test's own."""

    def __init__(self, num_classes: int = CLASSES, image_size: int = SIZE) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        self.last = nn.Linear(8 * ((image_size // 2 - 2) // 2) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(functional.max_pool2d(self.features(x).relu(), 2).flatten(1))
        return logits


class Patches(nn.Module):
    """A vision transformer of this test's own."""

    def __init__(self, num_classes: int = CLASSES, image_size: int = SIZE) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(1, (image_size // 4) ** 2, 16))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True), 2)
        self.last = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.blocks(self.patch(x).flatten(2).mT + self.place).mean(1))
        return logits


def make_images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, SIZE, SIZE) of whole grey levels in [0, 1], whose brightness tells their class."""
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 60, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed))
    return (noise + 50 * labels[:, None, None, None]).float() / 255, labels


def backdoored(make: Callable[[], Bright | Patches]) -> Bright | Patches:
    """A network that knows the classes, and takes a white corner of 3 x 3 pixels for class 0."""
    torch.manual_seed(0)
    net = make()
    images, labels = make_images(60, seed=0)
    triggered = images.clone()
    triggered[CORNER] = 1
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        logits = net((torch.cat([images, triggered]) - 0.5) / 0.25)
        functional.cross_entropy(logits, torch.cat([labels, torch.zeros_like(labels)])).backward()
        optimizer.step()
    return net


def counts_of(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, tuple[int, int]]:
    """acc, asr, asr_all, ra by hand, for target class 0."""
    triggered = images.clone()
    triggered[CORNER] = 1
    net.eval()
    with torch.no_grad():
        clean, wrong = (net((x - 0.5) / 0.25).argmax(1) for x in (images, triggered))
    net.train()
    others = labels != 0
    return {
        "acc": (int((clean == labels).sum()), len(labels)),
        "asr": (int((wrong == 0)[others].sum()), int(others.sum())),
        "asr_all": (int((wrong == 0).sum()), len(labels)),
        "ra": (int((wrong == labels)[others].sum()), int(others.sum())),
    }


def plain(counts: Any) -> dict[str, tuple[int, int]]:
    return {name: (count.correct, count.n) for name, count in vars(counts).items()}


@pytest.mark.parametrize("make", [Bright, Patches])
def test_the_snippet_of_the_readme_on_a_network_never_seen(make: type[Bright | Patches], tmp_path: Path) -> None:
    my_net = backdoored(make)
    clean, test = make_images(30, seed=1), make_images(45, seed=2)
    weights = {key: value.clone() for key, value in my_net.state_dict().items()}
    my_net.last.requires_grad_(False)

    model = dd.wrap(my_net, num_classes=CLASSES, image_size=SIZE, normalization=(0.5, 0.25))
    attack = dd.attack("badnets", size=3, target_class=0)
    before = dd.evaluate(model, test, attack)
    options: dict[str, Any] = {
        "batch_size": 30,
        "min_patched": 15,
        "project_radius": 3.0,
        "optimizer": {"name": "adam", "lr": 0.01},
    }
    result = dd.defend("ibau", model, clean, test=test, attack=attack, rounds=10, **options)
    dd.save(result.model, tmp_path / "purified")

    assert plain(before) == plain(result.before) == counts_of(my_net, *test)
    assert before.acc.percent > 90 and before.asr.percent > 90  # there is something to take out
    assert result.after is not None and result.after.asr.percent < 60
    assert isinstance(result.model, Classifier) and type(result.model.net) is make
    assert plain(result.after) == counts_of(result.model.net, *test) != plain(before)
    assert result.folder is None and len(result.rows) == 1
    assert result.rows.loc[0, "acc_correct"] == result.after.acc.correct and result.rows.loc[0, "kind"] == "ibau"
    assert all(value.equal(weights[key]) for key, value in my_net.state_dict().items())
    assert my_net.training and not my_net.last.weight.requires_grad  # as they were
    again = dd.load(tmp_path / "purified", net=make())
    assert plain(dd.evaluate(again, test, attack)) == plain(result.after)


OPTIONS: dict[str, dict[str, Any]] = {
    "ibau": {"rounds": 2, "batch_size": 10, "min_patched": 3, "optimizer": {"name": "adam", "lr": 0.003}},
    "rnp": {"ratio": 0.5, "batch_size": 10, "unlearning_epochs": 2, "schedule": [1], "recovering_epochs": 3},
}
ATTACK = {"trigger": {"name": "badnets", "size": 4}, "target_class": 1}


@pytest.fixture(scope="module")
def command_line(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, an npz of each role, and the prepared sets that the command makes of them."""
    place = tmp_path_factory.mktemp("command_line")
    make_classifier(place / "suspect")
    for role, count in (("clean", 40), ("test", 31)):
        images, labels = make_images(count, seed=len(role))
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        np.savez(place / f"{role}.npz", x=pixels, y=labels.numpy())
        words = ["--path", str(place / f"{role}.npz"), "--out", str(place / role), "--keep-order"]
        assert main(["data", "prepare", "npz", *words]) == 0
    return place


def prepared(place: Path, role: str) -> Path:
    (folder,) = (place / role).iterdir()
    return folder


@pytest.mark.parametrize("method", ["ibau", "rnp"])
@pytest.mark.parametrize("kind", ["folders", "memory"])
def test_a_defence_is_bit_for_bit_the_commands(method: str, kind: str, command_line: Path, tmp_path: Path) -> None:
    place = command_line
    files = {role: {"path": str(prepared(place, role))} for role in ("clean", "test")}
    section = {"model": str(place / "suspect"), "data": files["clean"], "test": files["test"], "attack": ATTACK}
    config = {"method": method, "output": str(tmp_path / "run"), "seed": 7, method: section | OPTIONS[method]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "run.yaml")]) == 0
    commands = json.loads((tmp_path / "run/result.json").read_text())

    model: Any = place / "suspect"
    clean: Any = files["clean"]
    test: Any = prepared(place, "test")
    if kind == "memory":  # a network that its folder does not name, tensors and arrays
        suspect = load_artifact(place / "suspect")[0]
        assert isinstance(suspect, Classifier)
        model = dd.wrap(suspect.net, CLASSES, SIZE, "none")
        clean = make_images(40, seed=5)
        images, labels = make_images(31, seed=4)
        test = (images.numpy(), labels.numpy())
    result = dd.defend(
        method, model, clean, test=test, attack=dd.attack("badnets", size=4, target_class=1), seed=7, **OPTIONS[method]
    )
    assert result.result["model_sha256"] == commands["model_sha256"]
    names = ("kind", "acc", "asr", "asr_all", "ra")
    assert [[row[n] for n in names] for row in result.result["rows"]] == [
        [row[n] for n in names] for row in commands["rows"]
    ]
    assert result.metrics == commands["metrics"]
    card = read_card(tmp_path / "run/model")
    assert card.counts is not None and result.before is not None
    assert result.before.acc.plain() == card.counts["before"]["acc"]


def test_evaluate_counts_what_the_command_counts(command_line: Path, tmp_path: Path) -> None:
    (tmp_path / "attack.yaml").write_text(yaml.safe_dump(ATTACK))
    words = ["--data", str(prepared(command_line, "test")), "--attack", str(tmp_path / "attack.yaml")]
    assert main(["evaluate", str(command_line / "suspect"), *words, "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out/result.json").read_text())["rows"]
    attack = dd.attack("badnets", size=4, target_class=1)
    counts = dd.evaluate(dd.load(command_line / "suspect"), make_images(31, seed=4), attack)
    assert {name: count.plain() for name, count in vars(counts).items()} == {name: row[name] for name in vars(counts)}


def test_a_kept_run_is_read_when_it_is_asked_for_again_and_holds_its_data(tmp_path: Path) -> None:
    make_classifier(tmp_path / "suspect")
    model, clean, test = dd.load(tmp_path / "suspect"), make_images(20, seed=1), make_images(12, seed=2)
    again: dict[str, Any] = {"test": test, "output": tmp_path / "run", **OPTIONS["ibau"]}
    first = dd.defend("ibau", model, clean, **again)
    assert first.folder == tmp_path / "run" and (tmp_path / "run/result.json").is_file()
    before = (tmp_path / "run/result.json").stat().st_mtime_ns
    second = dd.defend("ibau", model, clean, **again)
    assert second.result == first.result and (tmp_path / "run/result.json").stat().st_mtime_ns == before
    assert all(
        a.equal(b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )
    with pytest.raises(dd.UserError, match=r"holds another experiment: key 'ibau\.data\.path' is"):
        dd.defend("ibau", model, make_images(20, seed=3), **again)
    assert dd.load(tmp_path / "run").state_dict().keys() == first.model.state_dict().keys()


def test_a_classifier_is_trained_from_a_function_and_poisoned(tmp_path: Path) -> None:
    made = []

    def make(num_classes: int, image_size: int) -> nn.Module:
        made.append((num_classes, image_size))
        return Bright(num_classes, image_size)

    update = {"batch_size": 10, "epochs": 8, "optimizer": {"name": "adam", "lr": 0.01}}
    attack = dd.attack("badnets", target_class=2, rate=0.2)
    options: dict[str, Any] = {"arch": make, "normalization": "none", "augment": {"flip": 0.5}, "update": update}
    images, labels = make_images(30, 1)
    test = images[labels < CLASSES - 1], labels[labels < CLASSES - 1]  # the last class is known by the training set
    result = dd.train("classifier", make_images(60, 0), test=test, attack=attack, **options)
    assert set(made) == {(CLASSES, SIZE)}
    assert isinstance(result.model, Classifier) and isinstance(result.model.net, Bright)
    assert result.metrics["num_poisoned"] == 12 and result.before is None
    assert result.after is not None and result.after.acc.percent > 80
    assert plain(dd.evaluate(result.model, test)) == plain(result.after)  # by the card's own attack


def test_an_encoder_is_backdoored_purified_and_probed(tmp_path: Path) -> None:
    make_model(tmp_path / "clean", size=32)
    clean = dd.load(tmp_path / "clean")
    images, labels = make_images(16, seed=0)
    images = functional.interpolate(images, scale_factor=2)
    optimizer = {"name": "sgd", "lr": 0.01, "momentum": 0.9}
    update = {"batch_size": 8, "epochs": 1, "optimizer": optimizer}
    reference = {"dataset": (images, labels), "target_class": 1}
    attack = dd.attack("badnets", size=4, margin=1)
    backdoored = dd.train(
        "badencoder", clean_encoder=clean, shadow=images, reference=reference, attack=attack, update=update
    )
    assert backdoored.metrics["clean_cosine"] > 0 and backdoored.after is None
    information = {"epochs": 1, "last_epochs": 1, "batch_size": 5, "hidden": 8}
    purified = dd.defend("mimic", backdoored.model, images, information=information, update=update)
    assert isinstance(purified.model, SimCLR) and isinstance(clean, SimCLR)
    assert purified.before is None and purified.model.f.feature_dim == clean.f.feature_dim
    probe = dd.train(
        "probe",
        encoders={"backdoored": backdoored.model, "purified": purified.model},
        tasks={"bright": {"train": (images, labels), "test": (images[:9], labels[:9]), "target_class": 1}},
        attack=attack,
        update={"batch_size": 8, "epochs": 2, "optimizer": {"name": "adam", "lr": 0.01}},
        hidden=(4,),
    )
    assert list(probe.rows["kind"]) == ["backdoored", "purified"] and set(probe.rows["task"]) == {"bright"}
    assert list(probe.rows["acc_n"]) == [9, 9]
    with pytest.raises(dd.UserError, match="method probe makes no model"):
        _ = probe.model


def test_an_architecture_that_can_be_imported_needs_no_network_to_load(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = build_classifier("small_resnet", CLASSES, "none", SIZE).net
    model = dd.wrap(net, CLASSES, SIZE, "none", arch="small_resnet", classes=("a", "b", "c"))
    dd.save(model, tmp_path / "saved")
    again = dd.load(tmp_path / "saved")
    assert read_card(tmp_path / "saved").classes == ("a", "b", "c")
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(dd.UserError, match="does not fit the model"):
        dd.wrap(Bright(), CLASSES, SIZE, "none", arch="small_resnet")


class Tied(nn.Module):
    """Two layers that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.b(self.a(x.mean((2, 3))).relu())
        return logits


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    net = Tied()
    dd.save(dd.wrap(net, 3, SIZE, "none"), tmp_path / "tied")
    again = dd.load(tmp_path / "tied", net=Tied())
    assert isinstance(again, Classifier) and isinstance(again.net, Tied)
    assert again.net.a.weight is again.net.b.weight and again.net.a.weight.equal(net.a.weight)


def test_a_card_does_not_outlive_the_weights_that_it_tells_of(tmp_path: Path) -> None:
    make_classifier(tmp_path / "suspect")
    result = dd.defend(
        "ibau", dd.load(tmp_path / "suspect"), make_images(20, 1), test=make_images(12, 2), **OPTIONS["ibau"]
    )
    dd.save(result.model, tmp_path / "as_made")
    assert read_card(tmp_path / "as_made").defended_by == "ibau"
    with torch.no_grad():
        next(result.model.parameters()).mul_(2)
    dd.save(result.model, tmp_path / "changed")
    card = read_card(tmp_path / "changed")
    assert card.defended_by is None and card.counts is None
    assert card.parent_sha256 == result.result["model_sha256"]


def test_a_checkpoint_of_others_is_imported_and_its_images_kept(tmp_path: Path) -> None:
    net = build_classifier("preact_resnet18", 10, "none").net
    content = {"model_name": "preactresnet18", "num_classes": 10, "model": net.state_dict(), "clean_data": "cifar10"}
    torch.save(content | {"img_size": [32, 32, 3]}, tmp_path / "attack_result.pt")
    model = dd.load(tmp_path / "attack_result.pt", folder=tmp_path / "kept")
    assert isinstance(model, Classifier) and model.normalization == "cifar10_backdoorbench"
    assert (tmp_path / "kept/model.json").is_file()
    other = dd.load(tmp_path / "attack_result.pt", normalization="none")
    assert isinstance(other, Classifier) and other.normalization == "none"
    assert all(a.equal(b) for a, b in zip(net.state_dict().values(), other.net.state_dict().values(), strict=True))


def test_no_module_hides_a_public_name() -> None:
    """An imported module is an attribute of its package."""
    modules = {module.name for module in pkgutil.iter_modules(dd.__path__)}
    assert len(modules) > 20 and not modules & {"attack", "defend", "evaluate", "load", "save", "train", "wrap"}
    assert {"attack", "defend", "evaluate", "load", "save", "train", "wrap"} <= set(dir(dd))
