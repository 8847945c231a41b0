"""A model as the hub of Hugging Face keeps it: model.safetensors, config.json and a README.md with metadata.

The weights have the network's own names, without this project's prefix. Where the network is timm's, config.json is the
one that timm reads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dist_defend.files import fsync_path, write_atomic
from dist_defend.models.artifact import ModelCard, packed
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import CLIP_DIM, SimCLR
from dist_defend.models.pixel_space import normalization_constants
from dist_defend.publish.hub_files import FILES
from dist_defend.publish.readme import readme
from dist_defend.results import COUNTS, read_result


@dataclass(frozen=True)
class HubFolder:
    """What is written. timm_name: the network's name in timm, if it is timm's."""

    weights: bytes
    config: dict[str, Any]
    text: str
    timm_name: str | None
    card: ModelCard

    @classmethod
    def of(cls, model: SimCLR | Classifier, card: ModelCard, source: Path) -> "HubFolder":
        """source: the model folder; its run's result.json, if it lies in one, has the counts of a model as trained."""
        name, config = timm_name(card.arch), config_of(model, card)
        title = source.resolve().parent.name if source.resolve().name == "model" else source.resolve().name
        text = readme(title, card, config, name, card.counts or _measured(source))
        return cls(packed(network_of(model), {"format": "pt"}), config, text, name, card)

    def write(self, folder: Path) -> None:
        """All three files or none: they are made beside ``folder``, which must not be there, and renamed."""
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)  # of a dead process with our number
        aside.mkdir()
        contents: tuple[str | bytes, ...] = (self.text, json.dumps(self.config, indent=2) + "\n", self.weights)
        for name, content in zip(FILES, contents, strict=True):
            write_atomic(aside / name, content)
        aside.rename(folder)
        fsync_path(folder.parent)

    def told(self) -> list[str]:
        """Lines about it, for the terminal."""
        lines = [f"{self.card.kind} {self.card.arch}, {len(self.weights) / 1e6:.1f} MB of weights"]
        if self.card.backdoored:
            lines.append("it is BACKDOORED, and its README.md begins with that")
        if self.card.kind == "simclr":
            lines.append("the projector is left out: the folder holds the encoder alone")
        loader = "timm.create_model loads it" if self.timm_name else "README.md says how to load it"
        return [*lines, f"{loader}; `dist-defend push` sends it, nothing else does"]


def timm_name(arch: str) -> str | None:
    """The name of the architecture in timm; None for another library's."""
    if arch == "clip_resnet50":
        return "resnet50_clip"
    return arch.removeprefix("timm:").partition(".")[0] if arch.startswith("timm:") else None


def network_of(model: SimCLR | Classifier) -> nn.Module:
    """The network itself, of images that are normalised already."""
    net = model.net if isinstance(model, Classifier) else model.f.f
    assert isinstance(net, nn.Module)
    return net


def config_of(model: SimCLR | Classifier, card: ModelCard) -> dict[str, Any]:
    """config.json: timm's keys for timm's networks; for others the same words, and the architecture by our name."""
    net, name = network_of(model), timm_name(card.arch)
    side = card.resize or card.image_size
    mean, std = normalization_constants(card.normalization)
    outputs = model.num_classes if isinstance(model, Classifier) else CLIP_DIM if card.arch == "clip_resnet50" else 0
    features = {} if isinstance(model, Classifier) else {"num_features": model.f.feature_dim}
    labels = {"label_names": list(card.classes)} if card.classes else {}
    given = {"num_classes": outputs, **features, **labels}
    images = {"input_size": [3, side, side], "mean": list(mean), "std": list(std)}
    if name is None:
        resize = {"resize": card.resize} if card.resize else {}
        return {"architecture": card.arch, **given, **images, "image_size": card.image_size, **resize}
    published: dict[str, Any] = getattr(net, "pretrained_cfg", {})
    is_fixed = bool(published.get("fixed_input_size"))
    kept = {key: published[key] for key in ("first_conv", "classifier") if published.get(key)}
    own = {"num_classes": outputs, "fixed_input_size": is_fixed, "interpolation": "bilinear", "crop_pct": 1.0}
    sized = {"model_args": {"img_size": side}} if is_fixed else {}
    return {"architecture": name, **given, **sized, "pretrained_cfg": {**own, **images, **kept}}


def _measured(source: Path) -> dict[str, Any]:
    """What the run that made the model counted of it, {"after": counts}; nothing where that is not one row."""
    file = source.resolve().parent / "result.json"
    if source.resolve().name != "model" or not file.is_file():
        return {}
    rows = read_result(file, "restore it, or export a copy of the model folder alone")["rows"]
    return {"after": {name: rows[0][name] for name in COUNTS}} if len(rows) == 1 else {}
