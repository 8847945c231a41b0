"""Peak memory of whole processes: a run of a defence against a script of the published code, imports included."""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.bench import runner
from dist_defend.bench.runner import Case, Settings
from dist_defend.models.artifact import ModelCard, save_artifact

CLASSES = 10
POISON = AttackConfig(BadNets(size=4, margin=1), target_class=8)
_MEASURE = (  # A small process, as one starts with its parent's peak, but a child's child does not
    "import os, subprocess, sys; child = subprocess.Popen(sys.argv[1:], stdout=2); "
    "_, status, usage = os.wait4(child.pid, 0); print(usage.ru_maxrss); sys.exit(status != 0)"
)


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """memory-ibau, memory-rnp: one round, or one epoch of each phase, with the tests before and after."""
    wanted = (*runner.cases(settings, "ibau", ("", "ibau_vgg", 100, 200)),)
    wanted += (*runner.cases(settings, "rnp", ("", "resnet18", 128, 256)),)
    for case in wanted:
        with TemporaryDirectory() as folder:
            yield _row(case, settings, Path(folder))


def _row(case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    config = _prepare(case, folder)
    ours = [sys.executable, "-m", "dist_defend", "run", str(config)]
    published = [sys.executable, "-m", "dist_defend.bench.published.process", case.name, str(folder)]
    published.append(str(case.batch_size))
    imports = "import dist_defend.config, dist_defend.experiment, dist_defend.methods.defend." + case.name
    bases = [peak_mib([sys.executable, "-c", line]) for line in ("import torch, torchvision", imports)]
    pairs = [
        (peak_mib(published), peak_mib([*ours, f"output={folder}/run_{number}"])) for number in range(settings.repeats)
    ]
    ratios = [theirs / mine for theirs, mine in pairs]
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "name": f"memory-{case.name}",
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "ours_mib": mine,
        "baseline_mib": theirs,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": case.batch_size,
        "ranks": 1,
        "encoder": case.encoder,
        "note": f"peak of the whole process, {case.num_images} images to defend with, as many clean and triggered ones "
        f"to test on; imports alone: {bases[1]:.0f} MiB, of torch and torchvision {bases[0]:.0f}",
    }


def peak_mib(command: list[str]) -> float:
    """Largest resident size of the command's process. RuntimeError, with what it printed, if it fails."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"bench memory, {' '.join(command)}: {done.stderr[-2000:]}")
    return int(done.stdout) / 1024


def _prepare(case: Case, folder: Path) -> Path:
    """Data, suspect and configuration in the folder, for both sides."""
    images = {split: runner.random_images(case.num_images, seed) for split, seed in (("train", 5), ("test", 4))}
    train, test = (runner.prepare(array, folder, split, CLASSES) for split, array in images.items())
    stamped = triggered(test, POISON).images(np.arange(len(test)))
    np.savez(
        folder / "arrays.npz",
        train=images["train"],
        train_labels=train.labels,
        test=images["test"],
        test_labels=test.labels,
        triggered=stamped,
        triggered_labels=np.full(len(test), POISON.target_class),
    )
    normalization = "none" if case.name == "ibau" else runner.NORMALIZATION
    model = runner.seasoned(case.encoder, CLASSES, normalization)
    torch.save(model, folder / "suspect.pt")
    card = ModelCard("classifier", case.encoder, normalization, runner.IMAGE_SIZE, num_classes=CLASSES)
    save_artifact(folder / "suspect", model, card)
    section: dict[str, Any] = {
        "model": str(folder / "suspect"),
        "data": {"path": str(folder / "train")},
        "test": {"path": str(folder / "test")},
        "attack": {"trigger": {"name": "badnets", "size": 4, "margin": 1}, "target_class": POISON.target_class},
        "batch_size": case.batch_size,
        **_ONE_ROUND[case.name],
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps({"method": case.name, "seed": 0, "trainer": {"trackers": []}, case.name: section}))
    return config


_ONE_ROUND: dict[str, dict[str, Any]] = {
    "ibau": {"rounds": 1},
    "rnp": {"ratio": 1.0, "unlearning_epochs": 1, "recovering_epochs": 1, "epochs_inclusive": False},
}
