"""What a defence is given, how it is tested, and what its card says: the parts that all defences share."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_defend.attacks.attack import AttackConfig, attack_from
from dist_defend.attacks.given import triggered_images
from dist_defend.attacks.patterns import BadNets, Sig
from dist_defend.cli import main
from dist_defend.counts import Count, only_accuracy
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.methods.defend.pruning.masks import Neuron, write_mask_values
from dist_defend.models.artifact import ModelCard, load_artifact, load_classifier, load_simclr, save_artifact
from dist_defend.models.masked_norm import norm_names
from dist_defend.trial import Trial, defended_card
from tests.runs import CLASSES, SIZE, make_classifier, make_data, make_experiment, make_model, options_of

ATTACK = {"trigger": {"name": "badnets"}, "target_class": 1}
NAMES = [f"class {c}" for c in range(CLASSES)]


def counts(asr: int, n: int = 100) -> dict[str, Count]:
    return only_accuracy(Count(90, 100)) | dict.fromkeys(("asr", "asr_all", "ra"), Count(asr, n))


def card_of(backdoored: bool, attack: AttackConfig | None) -> ModelCard:
    trigger = None if attack is None else asdict(attack)
    return ModelCard("classifier", "small_resnet", "none", 16, num_classes=3, backdoored=backdoored, attack=trigger)


OWN, OTHER = AttackConfig(BadNets(), target_class=1, rate=0.1), AttackConfig(Sig(), target_class=1)
GIVEN = AttackConfig(images="bd_test.npz")


@pytest.mark.parametrize(
    ("was", "named", "measured", "asr", "expected"),
    [
        (True, OWN, OWN, 99, True),
        (True, OWN, OWN, 50, True),
        (True, OWN, OWN, 49, True),  # neither gone nor open: as it was
        (True, OWN, OWN, 11, True),
        (True, OWN, OWN, 10, False),
        (True, OWN, replace(OWN, rate=0.5, avoid_target=True), 3, False),  # how it was trained does not matter
        (True, OWN, replace(OWN, target_class=2), 3, True),  # another attack fails: no news of the card's own
        (True, OWN, OTHER, 3, True),
        (True, OWN, GIVEN, 3, True),
        (True, None, OTHER, 3, False),  # the card names none, the configuration does
        (True, None, GIVEN, 3, False),
        (False, None, OTHER, 50, True),
        (False, None, OTHER, 49, False),
        (True, OWN, None, 0, True),  # nothing measured
        (False, None, None, 0, False),
    ],
)
def test_backdoored_is_what_was_measured(
    was: bool, named: AttackConfig | None, measured: AttackConfig | None, asr: int, expected: bool
) -> None:
    after = counts(asr) if measured else only_accuracy(Count(90, 100))
    card = defended_card(card_of(was, named), "rnp", measured, counts(100), after)
    assert card.backdoored is expected and card.defended_by == "rnp"
    assert card.counts is not None
    assert card.counts["before"]["asr"] == {"correct": 100, "n": 100}
    assert card.counts["after"]["acc"] == {"correct": 90, "n": 100}
    if named is not None:
        assert card.attack == asdict(named)
    elif measured is OTHER:  # the attack that opened it is kept for later runs
        assert card.attack == asdict(OTHER)
    else:
        assert card.attack is None


def test_an_attack_that_never_opened_the_model_is_not_its_trigger() -> None:
    assert defended_card(card_of(False, None), "ibau", OTHER, counts(4), counts(2)).attack is None
    assert defended_card(card_of(True, None), "ibau", OTHER, counts(49), counts(2)).backdoored  # by another one


def always(folder: Path, label: int, **changes: Any) -> str:
    """A classifier that says this label whatever it sees."""
    path = make_classifier(folder, attack=ATTACK)
    model, card = load_classifier(path)
    with torch.no_grad():
        model.get_parameter("net.linear.weight").zero_()
        model.get_parameter("net.linear.bias").copy_(torch.eye(CLASSES)[label])
    save_artifact(folder, model, replace(card, **changes))
    return path


def test_rnp_with_one_pruned_neuron_leaves_a_backdoored_card(tmp_path: Path) -> None:
    model = always(tmp_path / "model", 1)
    net = load_classifier(model)[0].net
    widths = [(name, len(net.get_parameter(f"{name}.weight"))) for name in norm_names(net)]
    neurons = [Neuron(name, channel, 1.0) for name, width in widths for channel in range(width)]
    write_mask_values(tmp_path / "masks.txt", [neurons[0]._replace(score=0.0), *neurons[1:]])
    options = {
        "model": model,
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 12},
        "test": {"path": make_data(tmp_path / "test", 9, seed=1)},
        "mask_file": str(tmp_path / "masks.txt"),
        "selection": "pruning_number",
        "pruning_number": 0.0,
    }
    assert main(["run", str(make_experiment(tmp_path, "rnp", options))]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metrics"]["pruned_neurons"] == 1 and result["metrics"]["asr_before"] == 100
    assert result["suspect"]["acc_defence"] == {"correct": 4, "n": 12}
    assert result["targets"] == {"noise": "class 1"}
    assert result["classes"] == {"noise": list(open_dataset(tmp_path / "test").classes)}
    card = load_classifier(tmp_path / "run/model")[1]
    assert card.backdoored and card.attack is not None
    assert (card.defended_by, card.chosen_by, card.provenance["method"]) == ("rnp", "pruning_number", "rnp")
    told = {"acc": {"correct": 3, "n": 9}, "asr": {"correct": 6, "n": 6},
            "asr_all": {"correct": 9, "n": 9}, "ra": {"correct": 0, "n": 6}}  # fmt: skip
    assert card.counts == {"before": told, "after": told}
    assert json.loads((tmp_path / "run/model/model.json").read_text())["BACKDOORED"] is True
    later = options | {"model": str(tmp_path / "run/model")}  # whose card still says how to measure it
    assert main(["run", str(make_experiment(tmp_path / "later", "rnp", later))]) == 0
    assert json.loads((tmp_path / "later/run/result.json").read_text())["rows"][0]["asr"] == {"correct": 6, "n": 6}


@pytest.mark.parametrize("method", ["ibau", "rnp", "kd", "ood", "zskt"])
def test_a_suspect_that_is_mostly_wrong_is_told_before_the_start(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = always(tmp_path / "model", 0, guessed=("normalization",))
    options: dict[str, Any] = {"test": {"path": make_data(tmp_path / "test", 9, seed=1)}}
    if method in ("ibau", "rnp"):
        options["model"], where = model, "data"
    else:
        options |= {"teacher": model, "student": "small_resnet"}
        where = "data" if method == "kd" else "test"  # without labelled data of its own: the test set
    if method == "zskt":
        options |= {"attention": 0.0, "batch_size": 4, "pseudo_batches": 1}
    else:
        options["data"] = {"path": make_data(tmp_path / "data")}
    if method == "rnp":
        options["ratio"] = 1.0
    if method in ("kd", "ood"):
        options["update"] = {"batch_size": 4, "epochs": 1}
    assert main(["run", str(make_experiment(tmp_path, method, options)), "--dry-run"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "gets only" in line]
    n = 9 if where == "test" else 24
    share = options["data"] if where == "data" else options["test"]
    told = f"{model} gets only {n // 3} of {n} clean images of {share['path']} right (33.3 %, chance 33.3 %)"
    assert told in line
    assert "normalization none (import's guess), images of 16 px, or classes in another order" in line


def test_a_suspect_that_gets_half_right_is_not_told_of(tmp_path: Path) -> None:
    context = Context(dist.start("fp32", None), 0, LoaderConfig("resident", 1), tmp_path)
    trial = Trial(make_classifier(tmp_path / "model"), context)
    trial.judge(Count(50, 100), tmp_path)
    assert context.notes == []
    trial.judge(Count(49, 100), tmp_path)
    assert "gets only 49 of 100" in context.notes[0]


def test_the_look_takes_no_more_images_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn from all of them, so that a set sorted by class is looked at fairly; the same on every start."""
    monkeypatch.setattr("dist_defend.trial.LOOKED_AT", 12)
    labels = np.repeat(np.arange(CLASSES), 30)
    images = np.zeros((len(labels), SIZE, SIZE, 3), np.uint8)
    write_dataset(ArraySource(images, labels, NAMES), tmp_path / "data", name="n", split="train", storage="npy")
    found = []
    for _ in range(2):
        context = Context(dist.start("fp32", None), 0, LoaderConfig("resident", 1), tmp_path)
        trial = Trial(always(tmp_path / "model", 1), context)
        trial.look(*trial.dataset("defence", DatasetConfig(str(tmp_path / "data"))))
        found.append(trial.suspect["acc_defence"])
    assert found[0] == found[1] and found[0]["n"] == 12 and 0 < found[0]["correct"] < 12


@pytest.mark.parametrize("method", ["ibau", "rnp", "kd", "zskt"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("size", "wants 16 px: prepare it with --image-size 16, or say 'resize: 16'"),
        ("names", "label 0 is class 'class 0' in"),
        ("count", "4 classes"),
    ],
)
def test_data_that_do_not_fit_are_one_line(
    method: str, kind: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"size": NAMES, "names": ["tench", "church", "gas pump"], "count": [*NAMES, "class 3"]}[kind]
    side = 8 if kind == "size" else SIZE
    labels = np.arange(12) % len(names)
    images = np.zeros((12, side, side, 3), np.uint8)
    write_dataset(ArraySource(images, labels, names), tmp_path / "test", name="other", split="test", storage="npy")
    model = make_classifier(tmp_path / "model")
    own, card = load_classifier(model)
    save_artifact(model, own, replace(card, classes=tuple(NAMES)))
    options: dict[str, Any] = {"test": {"path": str(tmp_path / "test")}}
    options |= {"model": model} if method in ("ibau", "rnp") else {"teacher": model, "student": "small_resnet"}
    options |= {"attention": 0.0} if method == "zskt" else {"data": {"path": make_data(tmp_path / "data")}}
    options |= {"ratio": 1.0} if method == "rnp" else {}
    assert main(["run", str(make_experiment(tmp_path, method, options))]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def sample_specific(count: int = 12, seed: int = 5) -> dict[str, Any]:
    """Test images with noise of their own each, which no trigger of one pattern makes; labels 0, 1, 2, ..."""
    draw = np.random.default_rng(seed)
    x = draw.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)
    y = np.arange(count) % CLASSES
    return {"x": x, "y": y, "y_bd": (y * y + 1) % CLASSES}  # 1, 2, 2: no rule of ours


def write_npz(path: Path, arrays: dict[str, Any]) -> str:
    np.savez(path, **arrays)
    return str(path)


def counted(model_folder: str, arrays: dict[str, Any], wanted: np.ndarray, test: str) -> dict[str, Any]:
    """The counts of a model by plain torch and numpy."""
    model = load_classifier(model_folder)[0].eval()
    dataset = open_dataset(test)

    def classes(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits: torch.Tensor = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        return logits.argmax(1).numpy()

    found, y = classes(arrays["x"]), arrays["y"]
    others, hits = y != wanted, found == wanted
    acc = classes(dataset.images(np.arange(len(dataset)))) == dataset.labels
    pairs = {"acc": (acc.sum(), len(acc)), "asr": ((hits & others).sum(), others.sum()),
             "asr_all": (hits.sum(), len(y)), "ra": (((found == y) & others).sum(), others.sum())}  # fmt: skip
    return {key: {"correct": int(correct), "n": int(n)} for key, (correct, n) in pairs.items()}


def test_a_sample_specific_attack_is_measured_by_its_images(tmp_path: Path) -> None:
    arrays = sample_specific()
    model, test = make_classifier(tmp_path / "model"), make_data(tmp_path / "test", 9, seed=1)
    common = {
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 12},
        "test": {"path": test},
        "attack": {"images": write_npz(tmp_path / "bd_test.npz", arrays)},
    }
    ibau = {**common, "model": model, "rounds": 1, "batch_size": 6, "min_patched": 1}
    rnp = {**common, "model": model, "batch_size": 6, "unlearning_epochs": 1, "recovering_epochs": 1,
           "clean_threshold": 0.0, "max_accuracy_drop": 1.0, "exclude_target_from_acc": True}  # fmt: skip
    for method, options in (("ibau", ibau), ("rnp", rnp)):
        folder = tmp_path / method
        assert main(["run", str(make_experiment(folder, method, options))]) == 0
        result = json.loads((folder / "run/result.json").read_text())
        card = load_classifier(folder / "run/model")[1]
        assert card.counts is not None and card.attack is None
        assert card.counts["before"] == counted(model, arrays, arrays["y_bd"], test)
        assert card.counts["after"] == counted(str(folder / "run/model"), arrays, arrays["y_bd"], test)
        row = {key: result["rows"][0][key] for key in card.counts["after"]}
        assert row == card.counts["after"]
        assert "triggered" in result["data"] and result["targets"] == {"noise": "each image's own"}
    table = json.loads((tmp_path / "rnp/run/sweep.json").read_text())
    assert all(stop["asr_all"]["n"] == 12 for stop in table) and "rnp (oracle)" in [r["kind"] for r in result["rows"]]


def test_kd_takes_given_images_too(tmp_path: Path) -> None:
    options = options_of("kd", tmp_path)
    images = write_npz(tmp_path / "bd.npz", sample_specific())
    assert main(["run", str(make_experiment(tmp_path, "kd", options | {"attack": {"images": images}}))]) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["rows"][0]["asr"]["n"] == 8  # those of class 2 are wanted to be of class 2
    assert {"acc_before", "asr_before", "der"} <= result["metrics"].keys()
    assert not [key for key in result["metrics"] if key.startswith("teacher")]


def given(folder: Path, attack: dict[str, Any], num_classes: int = CLASSES) -> Any:
    test = open_dataset(make_data(folder / "test", 9, seed=1))
    return triggered_images(test, np.arange(9), AttackConfig(**attack), num_classes)


def test_images_with_one_target_class(tmp_path: Path) -> None:
    arrays = sample_specific()
    del arrays["y_bd"]
    path = write_npz(tmp_path / "images.npz", arrays)
    found = given(tmp_path, {"images": path, "target_class": 2})
    assert found.wanted.tolist() == [2] * 12 and found.dataset.labels.tolist() == arrays["y"].tolist()
    shifted = given(tmp_path, {"images": path, "labels": "all_to_all", "shift": 2})
    assert shifted.wanted.tolist() == ((arrays["y"] + 2) % CLASSES).tolist()


def test_a_prepared_set_that_lacks_the_target_is_read_by_names(tmp_path: Path) -> None:
    """Folders of triggered images have none for the target class, so that theirs count from another 0."""
    x, labels = sample_specific()["x"], np.arange(12) % 2
    for folder, names in (("named", NAMES[1:]), ("numbered", ["0", "1"])):
        write_dataset(ArraySource(x, labels, names), tmp_path / folder, name="bd", split="test", storage="npy")
    named = given(tmp_path, {"images": str(tmp_path / "named"), "target_class": 0})
    assert named.dataset.labels.tolist() == (open_dataset(tmp_path / "named").labels + 1).tolist()
    numbered = given(tmp_path, {"images": str(tmp_path / "numbered"), "target_class": 2})
    assert numbered.dataset.labels.tolist() == open_dataset(tmp_path / "numbered").labels.tolist()
    write_dataset(ArraySource(x, labels, ["tench", "class 1"]), tmp_path / "other", name="bd", split="t", storage="npy")
    with pytest.raises(UserError, match=r"has the class 'tench', which .* lacks"):
        given(tmp_path, {"images": str(tmp_path / "other"), "target_class": 0})


def test_images_without_a_flag_carry_no_trigger(tmp_path: Path) -> None:
    arrays = sample_specific() | {"flag": np.arange(12) >= 4}
    assert given(tmp_path, {"images": write_npz(tmp_path / "bd.npz", arrays)}).rows.tolist() == list(range(4, 12))


def replaced(**changes: Any) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        arrays = {key: value for key, value in (sample_specific() | changes).items() if value is not None}
        return {"images": write_npz(folder / "bd.npz", arrays)}

    return make


def model_folder(folder: Path) -> dict[str, Any]:
    (folder / "suspect").mkdir()
    write_npz(folder / "suspect/bd_test.npz", sample_specific())
    return {"images": str(folder / "suspect")}


def other_target(folder: Path) -> dict[str, Any]:
    return replaced(y_bd=np.full(12, 2))(folder) | {"target_class": 1}


def pickled(folder: Path) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.savez(buffer, **(sample_specific() | {"y_bd": np.array([object()] * 12)}))
    (folder / "bd.npz").write_bytes(buffer.getvalue())
    return {"images": str(folder / "bd.npz")}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (replaced(x=np.zeros((12, 8, 8, 3), np.uint8)), r"images of \(8, 8, 3\), the test set \(16, 16, 3\)"),
        (replaced(y=np.full(12, 3)), "the label 3 of 12 images is none of the model's 3 classes, 0 to 2"),
        (replaced(y=np.full(12, -1)), "the label -1 of 12 images"),
        (replaced(y_bd=np.full(12, 9)), "the backdoor label 9 of 12 images is none of the model's"),
        (replaced(y_bd=np.zeros(11, np.int64)), "y_bd is int64 of shape"),
        (replaced(y_bd=np.zeros(12)), "y_bd is float64 of shape"),
        (replaced(y_bd=None), "does not say which class the attacker wants"),
        (replaced(y_bd=np.arange(12) % 3), "each image is of the class that the attacker wants"),
        (replaced(flag=np.zeros(12, bool)), "no image has a flag"),
        (other_target, "key 'target_class' is 1, but y_bd in .* names class 2: leave target_class out"),
        (pickled, "damaged or pickled"),
        (model_folder, r"is a model folder: name its triggered test images, .*bd_test\.npz"),
        (lambda folder: {"images": str(folder / "attack_result.pt")}, "triggered images are an npz of x, y and y_bd"),
        (lambda folder: {"images": str(folder / "none.npz")}, r"none\.npz"),
    ],
)
def test_images_that_cannot_be_measured(make: Callable[[Path], dict[str, Any]], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        given(tmp_path, make(tmp_path))


def test_an_attack_is_a_trigger_or_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for attack, told in (
        ({"target_class": 1}, "key 'classifier.attack.trigger' is missing"),
        ({**ATTACK, "images": "a.npz"}, "key 'classifier.attack.images' is set, but 'trigger'"),
        ({"images": "a.npz"}, "key 'images' is a.npz: given images are measured, nothing is trained on them"),
    ):
        options = options_of("classifier", tmp_path / "data") | {"attack": attack}
        assert main(["run", str(make_experiment(tmp_path, "classifier", options))]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_cards_from_before_images_are_read() -> None:
    plain = {"trigger": {"name": "sig", "delta": 20.0, "frequency": 6.0}, "labels": "all_to_one", "target_class": 2,
             "rate": 0.1, "count": None, "shift": 1, "avoid_target": False, "choose": "random"}  # fmt: skip
    assert attack_from(plain) == AttackConfig(Sig(delta=20.0), target_class=2)


SQUARE = {"trigger": {"name": "badnets", "size": 5, "margin": 0}, "target_class": 2, "rate": 1.0}


def backdoored_encoder(folder: Path, size: int = SIZE) -> str:
    path = make_model(folder, size=size)
    model, card = load_simclr(path)
    save_artifact(path, model, replace(card, backdoored=True, attack=SQUARE, guessed=("normalization",)))
    return path


@pytest.mark.parametrize("method", ["simclr", "mimic", "badencoder", "ft_simclr", "nad_simclr"])
def test_what_is_made_of_a_backdoored_encoder(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of(method, tmp_path)
    key = {"simclr": "warm_start", "mimic": "teacher", "badencoder": "clean_encoder"}.get(method, "model")
    parent = backdoored_encoder(tmp_path / "parent", size=32 if method in ("mimic", "nad_simclr") else SIZE)
    config = make_experiment(tmp_path, method, options | {key: parent})
    assert main(["run", str(config)]) == 0
    told = capsys.readouterr().err
    assert told.count(f"{parent}: its source did not tell normalization cifar10, so import guessed") == 1
    _, card = load_artifact(tmp_path / "run/model")
    assert card.backdoored and card.guessed == ("normalization",)
    assert card.parent_sha256 == json.loads((Path(parent) / "model.json").read_text())["sha256"]
    assert card.defended_by == (None if method in ("simclr", "badencoder") else method)
    assert ("is backdoored already" in told) is (method == "badencoder")
    if method == "badencoder":
        wanted = AttackConfig(BadNets(size=4, margin=1), target_class=1, rate=1.0)
        assert card.attack is not None and attack_from(card.attack) == wanted
    else:
        assert card.attack == SQUARE


def test_fresh_encoders_are_clean(tmp_path: Path) -> None:
    assert main(["run", str(make_experiment(tmp_path, "simclr", options_of("simclr", tmp_path)))]) == 0
    _, card = load_artifact(tmp_path / "run/model")
    assert (card.backdoored, card.attack, card.parent_sha256, card.guessed) == (False, None, None, ())
