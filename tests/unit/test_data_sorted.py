"""Folders lie sorted by class; prepared as a user would, they serve the shipped configurations fairly."""

from pathlib import Path
from typing import Any

import dacite
import numpy as np
import pytest
import yaml

from dist_defend.attacks.attack import AttackConfig
from dist_defend.cli import main
from dist_defend.data.classes import tell_missing_classes, tell_uniform_batches
from dist_defend.data.loader import DatasetConfig, LoaderConfig, select_rows
from dist_defend.data.store import PreparedDataset, open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.engine.optim import UpdateConfig
from dist_defend.methods.defend import ibau
from dist_defend.methods.measure import probe
from dist_defend.methods.pretrain import classifier

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COUNTS = {"train": 250, "test": 250}  # images of a class: a twentieth of CIFAR-10's training, a quarter of its test set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of 5,000 pictures of 2x2 pixels, prepared with and without --keep-order."""
    root = tmp_path_factory.mktemp("sorted")
    for split, count in COUNTS.items():
        for label, name in enumerate(CLASSES):
            (root / "in" / split / name).mkdir(parents=True)
            for number in range(count):
                content = b"P6 2 2 255 " + bytes([label, number % 256, 0] * 4)
                (root / "in" / split / name / f"{number:04d}.ppm").write_bytes(content)
    for name, option in (("data", []), ("kept", ["--keep-order"])):
        prepare = ["data", "prepare", "imagefolder", "--path", str(root / "in"), "--out", str(root / name)]
        assert main([*prepare, "--storage", "npy", *option]) == 0
    return root


def section(config: str, method: str) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text())[method]
    return options


def opened(folder: Path, config: DatasetConfig, share: float) -> tuple[PreparedDataset, np.ndarray]:
    """The data set that stands for the one named, and the rows of the configuration, max_samples in this share."""
    dataset = open_dataset(folder / Path(config.path).name)
    if config.max_samples is not None:
        config = DatasetConfig(config.path, config.fraction, round(config.max_samples * share), config.subset)
    return dataset, select_rows(dataset, config, seed=100)


def read(plain: dict[str, Any]) -> DatasetConfig:
    return dacite.from_dict(DatasetConfig, plain, dacite.Config(strict=True))


@pytest.mark.parametrize("config", sorted(path.name for path in (CONFIGS / "defend").glob("mimic_*.yaml")))
def test_mimics_defender_has_all_classes(folder: Path, config: str) -> None:
    data = read(section(f"defend/{config}", "mimic")["data"])
    num_images = {0.04: 100, 0.25: 625}[data.fraction]  # of 2,500; the second of Imagenette's few photographs
    assert data.subset == "first"
    dataset, rows = opened(folder / "data", data, 1.0)
    counts = np.bincount(dataset.labels[rows], minlength=10)
    assert counts.sum() == num_images and (np.abs(counts - num_images / 10) <= 3 * np.sqrt(num_images / 10)).all()
    assert tell_missing_classes(dataset.labels, rows, dataset.classes) is None
    dataset, rows = opened(folder / "kept", data, 1.0)
    lack = {100: "9 of the 10 classes: automobile, bird", 625: "7 of the 10 classes: cat, deer"}[num_images]
    told = tell_missing_classes(dataset.labels, rows, dataset.classes)
    assert told is not None and told.startswith(f"{num_images} images lack {lack}")


@pytest.mark.parametrize("config", sorted(path.name for path in (CONFIGS / "defend").glob("ibau_cifar10_*.yaml")))
def test_ibaus_first_batches_have_nearly_all_classes(folder: Path, config: str) -> None:
    options = section(f"defend/{config}", "ibau")
    data = read(options["data"])
    dataset, rows = opened(folder / "data", data, 0.25)
    preset = ibau.PRESETS[options["preset"]] if "preset" in options else {}
    batch = {**preset, **options}.get("batch_size", 100)
    labels = dataset.labels[rows]
    assert len(np.unique(labels)) == 10 or len(rows) < 50
    for start in range(0, min(12 * batch, len(labels) - batch + 1), batch):
        assert len(np.unique(labels[start : start + batch])) >= 9 or batch < 50
    assert tell_uniform_batches(labels, batch) is None


def test_ibaus_official_settings_are_told_where_the_order_was_kept(folder: Path) -> None:
    data = read(section("defend/ibau_cifar10_official.yaml", "ibau")["data"])
    dataset, rows = opened(folder / "kept", data, 0.25)
    assert len(rows) == 1250 and (dataset.labels[rows] == np.arange(1250) // 250).all()
    told = tell_missing_classes(dataset.labels, rows, dataset.classes)
    assert told is not None and "lack 5 of the 10 classes: dog, frog, horse, ship, truck" in told
    told = tell_uniform_batches(dataset.labels[rows], 100)
    assert told is not None and "in a random order 5.0" in told


@pytest.mark.parametrize("config", sorted(path.name for path in (CONFIGS / "measure").glob("probe_*.yaml")))
def test_probes_published_order_is_fair(folder: Path, config: str) -> None:
    options = section(f"measure/{config}", "probe")
    batch = options["update"]["batch_size"]
    assert not options.get("shuffle") and probe.Config.__dataclass_fields__["shuffle"].default is False
    assert batch == (128 if "imagenette" in config else 64)  # 64 is published
    for task in options["tasks"].values():
        dataset, rows = opened(folder / "data", read(task["train"]), 1.0)
        first = dataset.labels[rows[: 12 * batch]].reshape(12, batch)
        assert min(len(np.unique(labels)) for labels in first) >= 9
        assert tell_uniform_batches(dataset.labels[rows], batch) is None
        dataset, rows = opened(folder / "kept", read(task["train"]), 1.0)
        assert tell_uniform_batches(dataset.labels[rows], batch) is not None


@pytest.mark.parametrize(("name", "lack"), [("data", None), ("kept", "lack 8 of the 9 classes: bird, cat, deer, dog")])
def test_first_poisons_are_told_where_they_are_of_one_class(
    folder: Path, tmp_path: Path, name: str, lack: str | None
) -> None:
    """ABD's shipped recipe, 10 % of 2,500 training images, the first that are no airplanes."""
    plain = section("attack/abd_teacher_cifar10.yaml", "classifier")["attack"]
    assert plain["choose"] == "first" and plain["avoid_target"]
    attack = dacite.from_dict(AttackConfig, {**plain, "trigger": {"name": "badnets", "size": 1, "margin": 0}})
    data = DatasetConfig(str(folder / name / "train"), resize=8)
    update = UpdateConfig(batch_size=50, epochs=1)
    options = classifier.Config(data, data, "small_resnet", "none", attack=attack, update=update)
    context = Context(dist.start("fp64", None), 0, LoaderConfig("torch"), tmp_path)
    classifier.build(options, context)
    assert len(context.notes) == (lack is not None)
    if lack is not None:
        assert lack in context.notes[0] and "'classifier.attack.choose' is first" in context.notes[0]
