"""Run folders as the report reads them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load_file

from dist_defend.errors import UserError


@dataclass(frozen=True)
class Run:
    """A finished run. Whatever it did not leave behind is empty."""

    path: Path
    label: str  # its name, or its path where another run has the same name
    result: dict[str, Any] = field(repr=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Counts by model, task and seed, see evaluate.backdoor_counts; empty for a run that counts nothing."""
        return list(self.result.get("rows", []))

    def before(self, metric: str) -> float:
        """Percent that the model scored before this run, a defence, changed it; nan where it does not say."""
        value = self.result.get("metrics", {}).get(f"{metric}_before")
        return math.nan if value is None else float(value)

    @cached_property
    def sweep(self) -> list[dict[str, Any]]:
        """The stops of a pruning sweep. UserError for a damaged sweep.json.

        Each has "threshold" (or null), "pruned", "chosen" and "oracle" (bool), and those of "acc", "asr" and
        "acc_defence" that were counted.
        """
        path = self.path / "sweep.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            for row in rows:
                int(row["pruned"]), float(row["threshold"] or 0)
                for key in row.keys() & {"acc", "asr", "acc_defence"}:
                    int(row[key]["correct"]), int(row[key]["n"])
            return rows
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged ({type(error).__name__}: {error}); delete it to report without it"
            ) from error

    @cached_property
    def metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Lines of metrics.jsonl, and how many could not be read (a killed run tears its last one)."""
        path = self.path / "metrics.jsonl"
        rows, torn = [], 0
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                rows.append({**row, "step": int(row["step"]), "stage": str(row["stage"])})
            except (ValueError, KeyError, TypeError):
                torn += 1
        return rows, torn

    @cached_property
    def features(self) -> dict[str, np.ndarray]:
        """kind/task/clean and kind/task/triggered (M, D) float32, kind/task/labels (M,)."""
        return _tensors(self.path / "features.safetensors")

    @cached_property
    def examples(self) -> dict[str, np.ndarray]:
        """task/clean and task/triggered (8, H, W, 3) uint8."""
        return _tensors(self.path / "examples.safetensors")

    @cached_property
    def generated(self) -> bytes:
        """A grid of images that a generator made, PNG."""
        path = self.path / "generated.png"
        return path.read_bytes() if path.exists() else b""

    @cached_property
    def config_text(self) -> str:
        """The resolved configuration as it stands in the run folder."""
        path = self.path / "config.yaml"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def target_class(self, task: str) -> int | None:
        """The class the attacker wants, from the run's configuration."""
        config = yaml.safe_load(self.config_text) or {}
        options = config.get("probe") or config.get("zeroshot") or {}
        return options.get("tasks", {}).get(task, {}).get("target_class")

    def target_name(self, task: str) -> str:
        """That class' name, or an empty string."""
        return str(self.result.get("targets", {}).get(task, ""))


def find_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Finished runs among these folders and below them, oldest first, and the names of unfinished ones.

    Raises UserError for a folder that does not exist, a damaged result.json, or when no run is finished.
    """
    results: dict[Path, tuple[Path, dict[str, Any]]] = {}
    unfinished = set()
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; name run folders or a folder that holds some")
        for file in sorted(path.rglob("result.json")):
            results[file.parent.resolve()] = file.parent, _read_result(file)
        started = {file.parent for file in path.rglob("config.yaml")}
        unfinished |= {str(folder) for folder in started if not (folder / "result.json").exists()}
    if not results:
        raise UserError(f"{', '.join(map(str, paths))}: no finished run (a folder with result.json) here or below")
    names = {folder: str(result.get("name", folder.name)) for folder, result in results.values()}
    times = Counter(names.values())
    labels = {folder: name if times[name] == 1 else str(folder) for folder, name in names.items()}
    runs = [Run(folder, labels[folder], result) for folder, result in results.values()]
    return sorted(runs, key=_age), sorted(unfinished)


def _age(run: Run) -> tuple[str, str]:
    try:
        return str(json.loads((run.path / "env.json").read_text())["time"]), run.label
    except (OSError, ValueError, KeyError, TypeError):
        return "", run.label


def _read_result(file: Path) -> dict[str, Any]:
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for row in result.get("rows", []):
            for key in ("acc", "asr", "asr_all", "ra"):
                int(row[key]["correct"]), int(row[key]["n"])
            str(row["kind"]), str(row["task"]), int(row["seed"])
        for metric in ("acc", "asr"):
            float(result.get("metrics", {}).get(f"{metric}_before") or 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not a result of dist-defend ({type(error).__name__}: {error}); run it again"
        ) from error
    return result


def _tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: damaged ({error}); delete it to report without it") from error
