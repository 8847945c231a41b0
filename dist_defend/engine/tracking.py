"""What trackers get beside the scalars: the run's name, its configuration as flat keys, and its final metrics.

Their files lie in the run folder.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

PROJECT = "dist_defend"


def start(accelerator: Accelerator, folder: Path, configuration: Mapping[str, Any]) -> None:
    """Open the trackers that the Accelerator was made with, for the run of this folder."""
    own = {"wandb": {"name": folder.name, "dir": str(folder)}}
    accelerator.init_trackers(PROJECT, config={"run": folder.name, **dict(_flat(configuration))}, init_kwargs=own)


def finish(accelerator: Accelerator, entries: Mapping[str, Any], step: int) -> None:
    """Log the numbers of a run's result as ``final/...``: rates in percent by kind and task, and its metrics."""
    final: dict[str, float] = {}
    rows = [row for row in entries.get("rows", []) if "acc" in row]  # a detector's has no counts
    for row in rows:
        for name in ("acc", "asr", "asr_all", "ra"):
            if row[name]["n"]:
                seed = f"/seed {row['seed']}" if len(rows) > 1 else ""
                final[f"final/{row['kind']}/{row['task']}{seed}/{name}"] = 100 * row[name]["correct"] / row[name]["n"]
    for name, value in _flat(entries.get("metrics", {})):
        if isinstance(value, int | float) and not isinstance(value, bool):
            final[f"final/{name}"] = value
    if final:
        accelerator.log(final, step=step)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys joined by dots; what is no number, text or truth value as JSON."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, int | float | str) else json.dumps(value)
