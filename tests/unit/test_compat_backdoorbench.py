"""BackdoorBench's documented script on an attack_result.pt: the numbers of our runs, its files, its defaults."""

import argparse
import csv
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional

from dist_defend.cli import main
from dist_defend.compat.backdoorbench import i_bau, rnp
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import open_dataset, write_dataset
from dist_defend.errors import UserError
from dist_defend.methods import find_method
from dist_defend.models.classifier import build_classifier
from tests.runs import CLASSES, make_data

PAGE = (Path(__file__).parents[2] / "docs" / "backdoorbench.md").read_text(encoding="utf-8")
SNIPPET = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
NAME = "one_epochs_debug_badnet_attack"  # of the record in the documented script
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # BackdoorBench's of CIFAR-10


def normalised(images: np.ndarray) -> torch.Tensor:
    """(N, 3, H, W) of images (N, H, W, 3) uint8, as BackdoorBench feeds its networks."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def stamped(images: np.ndarray) -> np.ndarray:
    out = images.copy()
    out[:, -3:, -3:] = 255
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """record/NAME/attack_result.pt of a network that takes a white corner for class 0, and ./data/cifar10."""
    root = tmp_path_factory.mktemp("backdoorbench")
    made = open_dataset(make_data(root / "unshuffled", 60, size=32))
    source = ArraySource(made.images(np.arange(60)), made.labels, list(made.classes))
    folder = root / "data" / "cifar10"
    train = write_dataset(source, folder / "train", name="noise", split="train", storage="npy", order_seed=0)
    test = open_dataset(make_data(folder / "test", 24, seed=1, size=32))
    images, labels = train.images(np.arange(60)), torch.from_numpy(train.labels)
    torch.manual_seed(0)
    net = build_classifier("small_resnet", CLASSES).net
    batch = normalised(np.concatenate([images, stamped(images)]))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        functional.cross_entropy(net(batch), torch.cat([labels, torch.zeros_like(labels)])).backward()
        optimizer.step()
    rows = np.flatnonzero(test.labels != 0)
    pictures = stamped(test.images(rows))
    stored = {int(row): (Image.fromarray(x), 0, int(test.labels[row])) for row, x in zip(rows, pictures, strict=True)}
    state = {
        "bd_data_container": {"save_folder_path": None, "data_dict": stored, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": rows,
        "poison_indicator": (test.labels != 0).astype(np.float64),
        "save_folder_path": None,
    }
    content = {
        "model_name": "preactresnet18",
        "num_classes": CLASSES,
        "model": net.state_dict(),
        "data_path": "./data/cifar10",
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": state,
    }
    (root / "record" / NAME).mkdir(parents=True)
    torch.save(content, root / "record" / NAME / "attack_result.pt")
    return root


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    shutil.copytree(place, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def arguments(kind: Any, *flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    kind.add_arguments(parser)
    return parser.parse_args(flags)


def command_line(root: Path, method: str, options: dict[str, Any]) -> dict[str, Any]:
    """result.json of dist-defend import and dist-defend run."""
    model = root / "models" / method
    if not model.exists():
        assert main(["import", str(root / "record" / NAME / "attack_result.pt"), "--out", str(model)]) == 0
    section = {
        "preset": "backdoorbench",
        "model": str(model),
        "test": {"path": str(root / "data" / "cifar10" / "test")},
        "attack": {"images": str(model / "bd_test.npz")},
        **options,
    }
    output = root / "runs" / f"{method}-{len(list(root.glob('runs/*')))}"
    content = {"method": method, "output": str(output), "seed": 0, "trainer": {"trackers": []}, method: section}
    file = root / f"{method}.yaml"
    file.write_text(yaml.safe_dump(content))
    assert main(["run", str(file)]) == 0
    return result_of(output)


def result_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "result.json").read_text())
    return content


def check_result(root: Path, folder: Path, result: dict[str, Any], expected: dict[str, Any]) -> None:
    """The result dictionary and defense_result.pt, against a run of the command line and counts made by hand."""
    counts = {name: expected["rows"][0][name] for name in ("acc", "asr", "ra")}
    rates = {name: count["correct"] / count["n"] for name, count in counts.items()}
    assert (result["ACC"], result["ASR"], result["RC"]) == (rates["acc"], rates["asr"], rates["ra"])
    (run,) = folder.glob("run-*")
    own = result_of(run)
    assert own["rows"][0] | {"run": ""} == expected["rows"][0] | {"run": ""}
    assert own["model_sha256"] == expected["model_sha256"] and counts["asr"]["n"] == 16

    saved = torch.load(folder / "defense_result.pt", weights_only=True)
    assert (saved["model_name"], saved["num_classes"]) == ("small_resnet", CLASSES)
    net = build_classifier("small_resnet", CLASSES).net.eval()
    net.load_state_dict(saved["model"])
    test = open_dataset(root / "data" / "cifar10" / "test")
    others = test.labels != 0
    clean, triggered = normalised(test.images(np.arange(24))), normalised(stamped(test.images(np.flatnonzero(others))))
    for network in (net, result["model"].eval()):
        with torch.no_grad():
            on_clean, on_triggered = network(clean).argmax(1).numpy(), network(triggered).argmax(1).numpy()
        assert (on_clean == test.labels).sum() == counts["acc"]["correct"]
        assert (on_triggered == 0).sum() == counts["asr"]["correct"]
        assert (on_triggered == test.labels[others]).sum() == counts["ra"]["correct"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_documented_script_runs_and_gives_the_counts_of_our_rnp_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"unlearning_epochs": 3, "recovering_epochs": 8, "recovering_lr": 4.0, "pruning_number": 0.04}
    flags = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["script.py", *flags])
    names: dict[str, Any] = {}
    exec(SNIPPET, names)
    result = names["result"]
    assert result.keys() == {"model", "ACC", "ASR", "RC"}
    options = {"data": {"path": str(here / "data/cifar10/train")}, "ratio": 0.1, "acc_ratio": 0.95, **given}
    expected = command_line(here, "rnp", options)
    assert 0 < expected["metrics"]["pruned_neurons"] < expected["metrics"]["neurons"]
    folder = here / "record" / NAME / "defense" / "rnp"
    check_result(here, folder, result, expected)

    masks = sorted(float(line.split()[3]) for line in (folder / "mask_values.txt").read_text().splitlines()[1:])
    stops = table(folder / "threshold_df.csv")
    assert [float(row["threshold"]) for row in stops] == np.arange(0, 0.95, 0.05).tolist()
    for row in stops:
        above = [mask for mask in masks if mask > float(row["threshold"])]
        assert float(row["value"]) == (above or masks)[0 if above else -1]
    (summary,) = table(folder / "rnp_df_summary.csv")
    delivered = [float(summary[name]) for name in ("test_acc", "test_asr", "test_ra")]
    assert delivered == [result["ACC"], result["ASR"], result["RC"]]
    rows = [int(line) for line in (folder / "log" / "index.txt").read_text().split()]
    assert len(set(rows)) == len(rows) == 6 and set(rows) <= set(range(60))

    again = rnp(arguments(rnp, "--index", str(folder / "log" / "index.txt"), *flags)).defense(NAME)
    assert [again[name] for name in ("ACC", "ASR", "RC")] == [result[name] for name in ("ACC", "ASR", "RC")]
    assert len(list(folder.glob("run-*"))) == 2

    (folder / "log" / "index.txt").write_text("1\n2\n4\n5\n")  # the same name, other images: a run of its own
    rnp(arguments(rnp, "--index", str(folder / "log" / "index.txt"), *flags)).defense(NAME)
    sizes = [result_of(run)["metrics"]["defence_images"] for run in folder.glob("run-*")]
    assert sorted(sizes) == [4, 6, 6]


def test_i_bau_gives_the_counts_of_our_run(here: Path) -> None:
    flags = ("--n_rounds", "2", "--K", "3", "--ratio", "0.5", "--lr", "0.001")
    result = i_bau(arguments(i_bau, *flags)).defense(NAME)
    data = {"path": str(here / "data/cifar10/train"), "fraction": 0.5, "subset": "random"}
    adam = {"name": "adam", "lr": 0.001, "amsgrad": True}
    expected = command_line(here, "ibau", {"data": data, "rounds": 2, "K": 3, "optimizer": adam})
    folder = here / "record" / NAME / "defense" / "i-bau"
    check_result(here, folder, result, expected)
    rounds = table(folder / "i-bau_df.csv")
    assert [row["epoch"] for row in rounds] == ["0", "1"]
    assert [float(rounds[-1][f"test_{name}"]) for name in ("acc", "asr", "ra")] == [
        result[name] for name in ("ACC", "ASR", "RC")
    ]
    last, largest, broken = table(folder / "i-bau_df_summary.csv")
    assert (last[""], largest[""], broken[""]) == ("last", "valid_max", "exist_nan_value")
    assert float(largest["test_acc"]) == max(float(row["test_acc"]) for row in rounds)
    assert float(last["test_asr"]) == result["ASR"] and broken["test_asr"] == "False"


def test_i_bau_takes_the_images_of_an_index(here: Path, tmp_path: Path) -> None:
    (tmp_path / "index.txt").write_text("3\n40\n17\n8\n")
    flags = ("--n_rounds", "1", "--index", str(tmp_path / "index.txt"), "--log", str(tmp_path / "log"))
    i_bau(arguments(i_bau, *flags)).defense(NAME)
    assert sorted((tmp_path / "log" / "index.txt").read_text().split(), key=int) == ["3", "8", "17", "40"]
    (folder,) = (here / "record" / NAME / "defense" / "i-bau").glob("images-*")
    chosen, source = open_dataset(folder), open_dataset(here / "unshuffled")  # rows are those of the source
    found = {chosen.images(np.array([n])).tobytes(): int(chosen.labels[n]) for n in range(len(chosen))}
    assert found == {source.images(np.array([row])).tobytes(): row % CLASSES for row in (3, 40, 17, 8)}
    assert chosen.classes == source.classes


DOCUMENTED: dict[Any, dict[str, Any]] = {  # by the documentation where it gives a default, else by the yaml file
    rnp: {
        "alpha": 0.2, "clean_threshold": 0.20, "unlearning_lr": 0.01, "recovering_lr": 0.2, "unlearning_epochs": 20,
        "recovering_epochs": 20, "mask_file": None, "pruning_by": "threshold", "pruning_max": 0.90,
        "pruning_step": 0.05, "pruning_number": 0.70, "acc_ratio": 0.95, "ratio": 0.1, "index": None,
        "schedule": [10, 20], "batch_size": 256, "random_seed": 0, "dataset_path": "./data", "num_workers": 4,
    },
    i_bau: {
        "optim": "Adam", "n_rounds": 10, "K": 10, "ratio": 0.05, "index": None, "batch_size": 256, "lr": 1e-4, "wd": 0,
        "random_seed": 0, "adam_betas": [0.9, 0.999], "dataset_path": "./data", "num_workers": 4,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTED)
def test_defaults_are_the_documented_ones(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # without a yaml file
    args = kind(arguments(kind)).args
    assert {name: getattr(args, name) for name in DOCUMENTED[kind]} == DOCUMENTED[kind]
    assert set(DOCUMENTED[kind]) - {"adam_betas"} <= vars(arguments(kind)).keys()


def test_a_yaml_file_stands_between_flags_and_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("config/defense/rnp/config.yaml")
    place.parent.mkdir(parents=True)
    place.write_text("ratio: 0.01\nacc_ratio: 0.1\nindex:\nalpha: 0.7\nbatch_size: 64\n")
    args = rnp(arguments(rnp, "--batch_size", "32")).args
    # alpha has a default in the parser, which wins there and here
    assert (args.ratio, args.acc_ratio, args.index, args.alpha, args.batch_size) == (0.01, 0.1, None, 0.2, 32)
    Path("other.yaml").write_text("ratio: 0.02\n")
    args = rnp(arguments(rnp, "--yaml_path", "other.yaml")).args
    assert (args.ratio, args.acc_ratio) == (0.02, 0.95)


def test_what_has_no_meaning_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    flags = ("--pin_memory", "True", "-nb", "False", "--epochs", "7", "--lr", "0.1", "--ratio", "0.2")
    rnp(arguments(rnp, *flags))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "--epochs, --lr, --non_blocking, --pin_memory" in line and "ratio" not in line


REFUSED = {
    "half precision": (rnp, ("--amp", "True"), "--amp is True"),
    "another optimizer": (i_bau, ("--optim", "SGD"), "--optim is SGD"),
    "another client": (rnp, ("--client_optimizer", "adam"), "--client_optimizer is adam"),
    "several devices": (rnp, ("--device", "cuda:0,1"), "--device is cuda:0,1"),
    "a network that it is not": (rnp, ("--model", "vgg19_bn"), "says preactresnet18"),
    "a data set that it is not": (rnp, ("--dataset", "gtsrb"), "says cifar10"),
    "no prepared data": (i_bau, ("--dataset_path", "nowhere"), "nowhere/cifar10/train is no prepared data set"),
    "no yaml file": (rnp, ("--yaml_path", "nowhere.yaml"), "nowhere.yaml: cannot read"),
    "too large a ratio": (rnp, ("--ratio", "2"), "'rnp.ratio' is 2.0; it must be in (0, 1]"),
    "no index": (rnp, ("--index", "nowhere.txt"), "nowhere.txt is no text file of row numbers"),
    "no masks": (rnp, ("--mask_file", "nowhere.txt"), "nowhere.txt: cannot read the masks"),
    "no rounds": (i_bau, ("--n_rounds", "0"), "'ibau.rounds' is 0; it must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_line(case: str, here: Path) -> None:
    kind, flags, told = REFUSED[case]
    with pytest.raises(UserError) as error:
        kind(arguments(kind, *flags)).defense(NAME)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "told"),
    [("--pruning_by=luck", "invalid choice"), ("--amp=yes", "neither True nor False"), ("--alpa=1", "unrecognized")],
)
def test_wrong_flags_end_the_script(flag: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(rnp, flag)
    assert stop.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("line", ["ratio: much", "log: [a, b]", "num_workers: {a: 1}", "batch_size: 2.5", "index: [1]"])
def test_a_value_of_the_yaml_file_must_be_what_the_flag_takes(line: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"{line}\nepochs: [7]\n")  # epochs are not used, whatever they are
    with pytest.raises(UserError, match=f"own.yaml: key '{line.partition(':')[0]}' is .*; give what --") as error:
        i_bau(arguments(i_bau, "--yaml_path", str(tmp_path / "own.yaml")))
    assert "\n" not in str(error.value)


def test_an_unknown_key_of_the_yaml_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("rations: 0.1\n")
    with pytest.raises(UserError, match="key 'rations' is no parameter"):
        rnp(arguments(rnp, "--yaml_path", str(tmp_path / "own.yaml")))


def test_a_missing_attack_result_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"record/badnet_0_1/attack_result.pt is not there"):
        rnp(arguments(rnp)).defense("badnet_0_1")


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_a_hostile_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("record/bad")
    folder.mkdir(parents=True)
    torch.save({"model": Hostile(), "model_name": "preactresnet18", "num_classes": 10}, folder / "attack_result.pt")
    with pytest.raises(UserError):
        rnp(arguments(rnp)).defense("bad")
    assert not Path("pwned").exists()
    with pytest.raises(Exception, match=r"module.*posix|weights_only"):  # and it is one: torch's own reader finds it
        torch.load(folder / "attack_result.pt", weights_only=True)


def test_pictures_that_are_missing_may_come_later(here: Path) -> None:
    source = here / "record" / NAME / "attack_result.pt"
    content = torch.load(source, weights_only=False)
    stored = content["bd_test"]["bd_data_container"]["data_dict"]
    pictures = {}
    for row, (image, wanted, true) in stored.items():
        pictures[f"bd_test_dataset/{true}/{row}.png"] = image
        stored[row] = {"path": f"./record/x/bd_test_dataset/{true}/{row}.png", "other_info": [wanted, true]}
    torch.save(content, source)
    defence = i_bau(arguments(i_bau, "--n_rounds=1", "--K=1", "--ratio=0.2"))
    with pytest.raises(UserError, match="comes without the images of bd_test: put its bd_test_dataset"):
        defence.defense(NAME)
    for name, image in pictures.items():
        (source.parent / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(source.parent / name)
    assert 0 <= defence.defense(NAME)["ASR"] <= 1


def test_the_table_by_number_is_counted_as_there(here: Path, tmp_path: Path) -> None:
    """BackdoorBench prunes a step more than the number that it writes down, and twice pruning_number in the end."""
    before = torch.load("record/" + NAME + "/attack_result.pt", weights_only=False)["model"]
    sizes = {name.removesuffix(".running_mean"): len(v) for name, v in before.items() if name.endswith("running_mean")}
    channels = [(name, channel) for name, size in sizes.items() for channel in range(size)]
    values = np.random.default_rng(0).permutation(len(channels)) / 1000
    lines = [f"{n} {name} {c} {values[n]:.4f}" for n, (name, c) in enumerate(channels)]
    (tmp_path / "masks.txt").write_text("\n".join(["No Layer Name Neuron Idx Mask Score", *lines]) + "\n")
    made = tmp_path / "masks.txt"
    flags = ("--mask_file", str(made), "--pruning_by", "number", "--pruning_max", "20", "--pruning_step", "5")
    rnp(arguments(rnp, *flags, "--pruning_number", "8")).defense(NAME)
    folder = here / "record" / NAME / "defense" / "rnp"
    rows = table(folder / "number_df.csv")
    assert [float(row["number"]) for row in rows] == [0, 5, 10, 15, 20]
    assert [float(row["value"]) for row in rows] == [0.004, 0.009, 0.014, 0.019, 0.024]
    saved = torch.load(folder / "defense_result.pt", weights_only=True)["model"]
    changed = {(key, int(n)) for key in before for n in (saved[key] != before[key]).nonzero()}
    lowest = [channels[n] for n in np.argsort(values)[:16]]
    assert changed == {(f"{name}.weight", channel) for name, channel in lowest}


def test_every_parameter_of_the_interface_is_told_on_the_page() -> None:
    named = set(re.findall(r"`--(\w+)`", (Path(__file__).parents[2] / "docs/coming-from.md").read_text()))
    for kind in DOCUMENTED:
        assert vars(arguments(kind)).keys() <= named
    assert find_method("rnp").PRESETS["backdoorbench"]["selection"] == "pruning_number"
