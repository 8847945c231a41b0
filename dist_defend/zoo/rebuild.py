"""A zoo's model made again from its YAML, and how far the new weights are from the old ones."""

import json
import platform
from pathlib import Path

import torch

from dist_defend.config import load_experiment
from dist_defend.engine import dist
from dist_defend.experiment import run
from dist_defend.files import sha256_file
from dist_defend.models.artifact import load_artifact
from dist_defend.zoo.entry import Entry


def machine(num_ranks: int) -> dict[str, str | int]:
    """What weights depend on beside configuration and data: processor or GPU, torch, threads, ranks."""
    is_cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ranks": num_ranks,
    }


def _processor() -> str:
    """Its name and, as clouds give several kinds one name, its numbers, where Linux tells them; what torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    numbers = [f"{key} {told[key]}" for key in ("cpu family", "model", "stepping") if key in told]
    return ", ".join([told.get("model name", platform.machine()), *numbers, torch.backends.cpu.get_cpu_capability()])


def rebuild(zoo: Path, name: str, entry: Entry, output: Path) -> Path:
    """Run experiment.yaml, with the zoo's own models where it names some; the new model's folder.

    output: the run's folder. UserError as that of any run: data that is missing, a folder that holds another run.
    """
    changes = {"output": output, **{key: zoo / parent for key, parent in entry.parents.items()}}
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in changes.items()]
    experiment = load_experiment(zoo / name / "experiment.yaml", overrides)
    try:
        run(experiment)
    finally:
        dist.stop()
    return output / "model"


def distance(old: Path, new: Path) -> str:
    """ "" for the same weights; else by how much they differ, in words. UserError for folders that hold no model."""
    if sha256_file(old / "model.safetensors") == sha256_file(new / "model.safetensors"):
        return ""
    (one, _), (two, _) = load_artifact(old), load_artifact(new)
    other = two.state_dict()
    apart = {
        key: (value.double() - other[key].double()).abs().max().item()
        for key, value in one.state_dict().items()
        if key in other and other[key].shape == value.shape and value.numel()
    }
    if len(apart) < len(one.state_dict()):
        return "another network"
    key = max(apart, key=lambda name: apart[name])
    scale = one.state_dict()[key].double().abs().max().item()
    count = sum(value > 0 for value in apart.values())
    most = f"{key}, by {apart[key]:.2g} where its largest number is {scale:.2g}"
    return f"{count} of {len(apart)} tensors differ, most of all {most}"
