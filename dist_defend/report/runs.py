"""Run folders as the report reads them: regular files of the folder only, each by its schema."""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from PIL import Image
from safetensors import SafetensorError

from dist_defend.errors import UserError
from dist_defend.results import Detected, read_inside, read_metrics, read_result, read_stops
from dist_defend.screen import printable
from dist_defend.strict_json import parse_json
from dist_defend.strict_yaml import parse_yaml

_AGAIN = "run it again"
_WITHOUT = "delete it to report without it"
_MEBIBYTES = {
    "features.safetensors": 512, "examples.safetensors": 64, "generated.png": 32, "found.png": 32, "metrics.jsonl": 64
}  # fmt: skip
_MOST_TENSORS = 1000
_MOST_POINTS, _MOST_DIMENSIONS = 5000, 1 << 16  # of features
_PER_IMAGE = ("labels", "clean_classes", "triggered_classes", "triggered_labels")
_MOST_SIDE = 4096  # pixels of a picture


@dataclass(frozen=True)
class Run:
    """A finished run. Whatever it did not leave behind is empty. Reading raises UserError for a damaged file."""

    path: Path
    label: str  # its name, or its path where another run has the same name
    result: dict[str, Any] = field(repr=False)  # see results.read_result

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Counts by model, task and seed, see evaluate.backdoor_counts; empty for a run that counts nothing."""
        return list(self.result["rows"])

    @property
    def detections(self) -> list[Detected]:
        """What detectors found."""
        return list(self.result["detections"])

    def before(self, metric: str) -> float:
        """Percent that the model scored before this run, a defence, changed it; nan where it does not say."""
        return float(self.result["metrics"].get(f"{metric}_before", math.nan))

    @property
    def befores(self) -> dict[str, float]:
        """``before`` by metric."""
        return {metric: self.before(metric) for metric in ("acc", "asr")}

    @property
    def seconds(self) -> float | None:
        """Of work, without what only measures, over all lives; of old runs wall seconds. None where it does not say."""
        found = self.result.get("work_seconds", self.result.get("wall_seconds"))
        return None if found is None else float(found)

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """The stops of a pruning sweep, see results.read_stops."""
        content = self._read("sweep.json")
        return [] if content is None else read_stops(content, self._damaged("sweep.json"), _WITHOUT)

    @cached_property
    def masks(self) -> list[float]:
        """The masks in [0, 1] of a pruning method's neurons, from mask_values.txt; empty without."""
        content = self._read("mask_values.txt")
        try:
            lines = [] if content is None else content.decode("utf-8").splitlines()[1:]
            found = [float(line.split()[-1]) for line in lines if line.strip()]
        except ValueError as error:
            raise UserError(f"{self._damaged('mask_values.txt')} holds a line without a mask: {_WITHOUT}") from error
        if not all(0 <= mask <= 1 for mask in found):
            raise UserError(f"{self._damaged('mask_values.txt')} holds a mask outside of [0, 1]: {_WITHOUT}")
        return found

    @cached_property
    def metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Lines of metrics.jsonl, and how many could not be read, see results.read_metrics."""
        content = self._read("metrics.jsonl")
        return ([], 0) if content is None else read_metrics(content, self._damaged("metrics.jsonl"), _WITHOUT)

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """kind/task/clean and kind/task/triggered (M, D) float32, kind/task/labels (M,).

        Of classifiers also the classes that were predicted, clean_classes and triggered_classes, and triggered_labels,
        each (M,).
        """
        found = self._tensors("features.safetensors", _is_features)
        for key in [key for key in found if key.endswith("/clean")]:
            start = key.removesuffix("clean")
            others = {name: found.get(f"{start}{name}") for name in ("triggered", *_PER_IMAGE)}
            fit = [
                other is None or other.shape[:ndim] == found[key].shape[:ndim]
                for name, other in others.items()
                if (ndim := 2 if name == "triggered" else 1)
            ]
            if not all(fit):
                raise UserError(f"{self._damaged('features.safetensors')} has tensors of several lengths: {_WITHOUT}")
        return found

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """task/clean and task/triggered (8, H, W, 3) uint8; maybe task/cam_clean, cam_triggered and perturbation."""
        found = self._tensors("examples.safetensors", _is_pictures)
        for key in [key for key in found if key.endswith("/clean")]:
            triggered = found.get(f"{key.removesuffix('clean')}triggered")
            if triggered is not None and triggered.shape != found[key].shape:
                raise UserError(f"{self._damaged('examples.safetensors')} has pictures of several sizes: {_WITHOUT}")
        return found

    @cached_property
    def generated(self) -> bytes:
        """A grid of images that a generator made, PNG."""
        return self._picture("generated.png")

    @cached_property
    def found(self) -> bytes:
        """Mask, pattern and their product, a row for each search of a detector, PNG."""
        return self._picture("found.png")

    @cached_property
    def config_text(self) -> str:
        """The resolved configuration as it stands in the run folder."""
        content = self._read("config.yaml")
        try:
            return "" if content is None else printable(content.decode("utf-8"), keep="\n\t")
        except UnicodeDecodeError as error:
            raise UserError(f"{self._damaged('config.yaml')} is no text file: {_AGAIN}") from error

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, empty if it is none."""
        config = parse_yaml(self.config_text, str(self.path / "config.yaml"))
        return config if isinstance(config, dict) else {}

    @cached_property
    def targets(self) -> dict[str, int]:
        """task -> the class that the attacker wants, from the run's configuration."""
        tasks = _mapping(_mapping(self.config.get("probe") or self.config.get("zeroshot")).get("tasks"))
        found = {str(name): _mapping(task).get("target_class") for name, task in tasks.items()}
        return {name: target for name, target in found.items() if type(target) is int}

    @cached_property
    def attack_text(self) -> str:
        """The attack that the configuration names, in a few words; empty where it names none."""
        for section in self.config.values():
            attack = _mapping(_mapping(section).get("attack"))
            trigger = _mapping(attack.get("trigger"))
            if trigger:
                size, rate = trigger.get("size"), attack.get("rate")
                told = [str(trigger.get("name", "trigger")), str(trigger.get("pattern") or "")]
                told += [f"{size} px"] * (type(size) is int)
                if self.config.get("method") == "classifier" and type(rate) is float:  # others do not read it
                    told.append(f"{100 * rate:.3g} % of the training images")
                return printable(", ".join(text for text in told if text), 120)
        return ""

    def encoder_of(self, kind: str) -> str:
        """The name of the run folder that made the encoder of this kind, which this run probes; empty if unknown."""
        folder = _mapping(_mapping(self.config.get("probe")).get("encoders")).get(kind)
        return Path(folder).parent.name if isinstance(folder, str) else ""

    @cached_property
    def started(self) -> str:
        """When, from env.json; empty where it does not say."""
        content = self._read("env.json")
        environment = None if content is None else parse_json(content, self._damaged("env.json"), _WITHOUT)
        return printable(environment.get("time", "")) if isinstance(environment, dict) else ""

    def class_names(self, task: str) -> list[str]:
        """In the order of their numbers; empty where the run does not say."""
        return list(self.result.get("classes", {}).get(task, []))

    def target_class(self, task: str) -> int | None:
        """The class the attacker wants: the configuration's, else the one that has the target's name."""
        names = self.class_names(task)
        named = names.index(self.target_name(task)) if names.count(self.target_name(task)) == 1 else None
        return self.targets.get(task, named)

    def target_name(self, task: str) -> str:
        """That class' name, or an empty string."""
        return str(self.result.get("targets", {}).get(task, ""))

    def read_all(self) -> None:
        """Read every file now. UserError for the first that is damaged."""
        for name in (
            "sweep",
            "masks",
            "metrics",
            "features",
            "examples",
            "generated",
            "found",
            "config_text",
            "targets",
        ):
            getattr(self, name)
        _ = self.started

    def _picture(self, name: str) -> bytes:
        content = self._read(name)
        if content is None:
            return b""
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{self._damaged(name)} is no PNG: {_WITHOUT}") from error
        if max(size) > _MOST_SIDE:
            raise UserError(f"{self._damaged(name)} has {size[0]}x{size[1]} pixels: {_WITHOUT}")
        return content

    def _read(self, name: str) -> bytes | None:
        return read_inside(self.path / name, _MEBIBYTES.get(name, 4) << 20)

    def _damaged(self, name: str) -> str:
        return f"{self.path / name}: damaged: it"

    def _tensors(self, name: str, fits: Callable[[str, np.ndarray], bool]) -> dict[str, np.ndarray]:
        content = self._read(name)
        if content is None:
            return {}
        try:
            found = safetensors.numpy.load(content)
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
            told = printable(error, 100)
            raise UserError(f"{self._damaged(name)} is no safetensors file ({told}): {_WITHOUT}") from error
        wrong = next((key for key, tensor in found.items() if not fits(key, tensor)), None)
        if wrong is not None or len(found) > _MOST_TENSORS:
            told = f"{len(found)} tensors" if wrong is None else f"another tensor as '{printable(wrong, 80)}'"
            raise UserError(f"{self._damaged(name)} holds {told}: {_WITHOUT}")
        return found


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str], list[str]]:
    """Finished runs among these folders and below them, oldest first; unfinished ones' names; why others are left out.

    Raises UserError for a folder that does not exist, when no run is finished, or when each of them is damaged.
    """
    results: dict[Path, tuple[Path, dict[str, Any]]] = {}
    unfinished, damaged = set(), []
    for path in map(Path, paths):
        if not os.path.isdir(path):
            raise UserError(f"{path}: no such folder that may be read; name run folders or a folder that holds some")
        for file in sorted(path.rglob("result.json")):
            try:
                results[file.parent.resolve()] = file.parent, read_result(file, _AGAIN)
            except UserError as error:
                damaged.append(str(error))
        started = {file.parent for file in path.rglob("config.yaml")}
        unfinished |= {str(folder) for folder in started if not (folder / "result.json").exists()}
    names = {folder: str(result.get("name", printable(folder.name))) for folder, result in results.values()}
    times = Counter(names.values())
    runs = []
    for folder, result in results.values():
        name = names[folder]
        runs.append(Run(folder, name if times[name] == 1 else printable(folder), result))
        try:
            runs[-1].read_all()
        except UserError as error:
            runs.pop()
            damaged.append(str(error))
    damaged = list(dict.fromkeys(damaged))
    if damaged and not runs:
        more = f" (and {len(damaged) - 1} more like it)" if len(damaged) > 1 else ""
        raise UserError(damaged[0] + more)
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: no finished run (a folder with result.json) here or below")
    return sorted(runs, key=lambda run: (run.started, run.label)), sorted(unfinished), damaged


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _is_features(key: str, tensor: np.ndarray) -> bool:
    if len(tensor) > _MOST_POINTS if tensor.ndim else True:
        return False
    if key.endswith(("/labels", "_labels", "_classes")):
        return tensor.ndim == 1 and tensor.dtype.kind in "iu"
    is_flat = tensor.ndim == 2 and 2 <= tensor.shape[1] <= _MOST_DIMENSIONS and tensor.dtype.kind == "f"
    return is_flat and bool((np.abs(tensor) <= 1e30).all())


def _is_pictures(key: str, tensor: np.ndarray) -> bool:
    is_rgb = tensor.ndim == 4 and tensor.shape[3] == 3 and tensor.dtype == np.uint8
    return is_rgb and min(tensor.shape) > 0 and max(tensor.shape) <= _MOST_SIDE
