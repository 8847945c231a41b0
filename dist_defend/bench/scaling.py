"""One rank against several, per method, and several experiments at a time against several ranks per experiment.

Each measurement is a whole run through ``dist-defend launch``, as a user would start it, on noise images.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from dist_defend.bench.runner import IMAGE_SIZE, NORMALIZATION, Settings, prepare, random_images
from dist_defend.errors import UserError
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.encoder import build_simclr

_IMAGES, _EPOCHS, _BATCH = 4096, 2, 128  # _BATCH: of a rank
_FIRST = 2  # log lines that still warm up
_LOG_EVERY = 4  # steps


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Per method: ``-strong`` (equal global batch), ``-weak`` (equal batch per rank), ``-points`` (runs per hour).

    Ratio = speed of all devices over that of one; for points, one experiment per device over one experiment on all of
    them, one after the other. Without GPUs: two ranks, and "one device" has half of the cores.
    UserError with a single GPU: there is nothing to compare.
    """
    devices = torch.cuda.device_count()
    if devices == 1:
        raise UserError("bench scaling compares ranks, and here is one GPU: run it where there are several")
    ranks, arch, batch = devices or 2, settings.encoder or "small_cifar", settings.batch_size or _BATCH
    with TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, arch, settings.num_images or _IMAGES)
        sections = _sections(folder, arch)
        for method in (settings.method,) if settings.method else sections:
            runs, trained = _Runs(folder, method, sections[method], ranks), sections[method].get("arch", arch)
            alone, strong, weak = [], [], []
            for _ in range(settings.repeats):
                alone.append(runs.images_per_second(1, batch * ranks))
                strong.append(runs.images_per_second(ranks, batch * ranks))
                weak.append((runs.images_per_second(ranks, batch * ranks), runs.images_per_second(1, batch)))
            shape = {"encoder": trained, "batch_size": batch * ranks, "ranks": ranks}
            yield _row(f"scaling-{method}-strong", list(zip(strong, alone, strict=True)), shape, "one batch shared")
            yield _row(f"scaling-{method}-weak", weak, shape, f"{batch} images per rank")
            points = [runs.runs_per_hour(batch * ranks) for _ in range(settings.repeats)]
            each, shared = (statistics.median(column) for column in zip(*points, strict=True))
            note = f"whole runs, an hour: {each:.0f} with one per device, {shared:.0f} with all devices on each"
            per_run = (settings.num_images or _IMAGES) * _EPOCHS / 3600
            yield _row(f"scaling-{method}-points", [(a * per_run, b * per_run) for a, b in points], shape, note)


class _Runs:
    def __init__(self, folder: Path, method: str, section: Mapping[str, Any], ranks: int) -> None:
        self.folder, self.method, self.ranks, self.count = folder, method, ranks, 0
        self.config = folder / f"{method}.yaml"
        trainer = {"log_every": _LOG_EVERY, "checkpoint_every": 10**6, "checkpoint_seconds": 1e6, "trackers": []}
        self.config.write_text(yaml.safe_dump({"method": method, "trainer": trainer, "seed": 0, method: section}))

    def images_per_second(self, ranks: int, batch: int) -> float:
        """Over all ranks; the median of the log lines after the first."""
        output = self._output()
        self._finish([self._start(output, ranks, batch)])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        own = [x for x in lines if x["stage"] == self.method and "images_per_second" in x]
        return statistics.median(float(x["images_per_second"]) for x in own[_FIRST:])

    def runs_per_hour(self, batch: int) -> tuple[float, float]:
        """As many experiments as there are devices: all at once on a device each; one by one on all devices."""
        started = time.perf_counter()
        self._finish([self._start(self._output(), 1, batch, device) for device in range(self.ranks)])
        together = time.perf_counter() - started
        for _ in range(self.ranks):
            self._finish([self._start(self._output(), self.ranks, batch)])
        one_by_one = time.perf_counter() - started - together
        return 3600 * self.ranks / together, 3600 * self.ranks / one_by_one

    def _output(self) -> Path:
        self.count += 1
        return self.folder / "runs" / f"{self.method}_{self.count}"

    def _start(self, output: Path, ranks: int, batch: int, device: int = 0) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dist_defend", "launch", str(self.config), f"output={output}"]
        command += [f"{self.method}.update.batch_size={batch}", "--ranks", str(ranks)]
        cores = sorted(os.sched_getaffinity(0))
        share = cores[device :: self.ranks] or cores
        environment = {"OMP_NUM_THREADS": str(len(share))}
        prefix = []
        if ranks == 1 and torch.cuda.is_available():
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        elif ranks == 1:
            prefix = ["taskset", "--cpu-list", ",".join(map(str, share))]
        with (self.folder / "log.txt").open("ab") as log:
            return subprocess.Popen(prefix + command, env={**os.environ, **environment}, stdout=log, stderr=log)

    def _finish(self, started: "list[subprocess.Popen[bytes]]") -> None:
        if any([process.wait() for process in started]):
            raise RuntimeError(f"bench scaling, {self.method}: {(self.folder / 'log.txt').read_text()[-2000:]}")


def _prepare(folder: Path, arch: str, count: int) -> None:
    prepare(random_images(count), folder, classes=10)
    torch.manual_seed(0)
    encoder = build_simclr(arch, NORMALIZATION, IMAGE_SIZE)
    save_artifact(folder / "clean", encoder, ModelCard("simclr", arch, NORMALIZATION, IMAGE_SIZE))


def _sections(folder: Path, arch: str) -> dict[str, dict[str, Any]]:
    """What each method needs in its YAML section."""
    data, update = {"path": str(folder / "train")}, {"epochs": _EPOCHS}
    target = {"dataset": data["path"], "target_class": 0, "number": 0}
    probe = {"epochs": 1, "last_epochs": 1, "batch_size": 128, "hidden": 64}
    return {
        "simclr": {"arch": arch, "normalization": NORMALIZATION, "data": data, "update": update},
        "badencoder": {"clean_encoder": str(folder / "clean"), "shadow": data, "reference": target, "update": update},
        "mimic": {"teacher": str(folder / "clean"), "data": data, "information": probe, "update": update},
        "classifier": {"arch": "small_resnet", "data": data, "test": data, "evaluate_every": _EPOCHS, "update": update},
    }


def _row(name: str, pairs: list[tuple[float, float]], shape: dict[str, Any], note: str) -> dict[str, Any]:
    """pairs: images per second, ours and of what they are compared with."""
    ratios = [ours / baseline for ours, baseline in pairs]
    ours, baseline = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "ours_ms": 1e3 * shape["batch_size"] / ours,
        "baseline_ms": 1e3 * shape["batch_size"] / baseline,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
        "images_per_second": {"ours": ours, "baseline": baseline},
        "note": note,
        **shape,
    }
