"""A classifier as BackdoorBench's defense_result.pt."""

import io
from collections import OrderedDict

import torch

from dist_defend.models.artifact import ModelCard
from dist_defend.models.classifier import Classifier
from dist_defend.models.constants import BACKDOORBENCH_DATA
from dist_defend.models.foreign_classifier import BACKDOORBENCH_ARCHS

_NAMES = {arch: name for name, arch in BACKDOORBENCH_ARCHS.items()}


def defense_result(model: Classifier, card: ModelCard) -> tuple[bytes, list[str]]:
    """The content of a file {model_name, num_classes, model}, and what there is to say about it.

    BackdoorBench normalises by data set before its network; where the model's own constants are others, a line says so.
    """
    name = _NAMES.get(card.arch, card.arch.removeprefix("torchvision:"))
    behind = "" if model.resize is None else "1."  # there a network behind its Resize is Sequential(Resize, network)
    state = OrderedDict((behind + key, value.detach().cpu()) for key, value in model.net.state_dict().items())
    file = io.BytesIO()
    torch.save({"model_name": name, "num_classes": model.num_classes, "model": state}, file)
    lines = [f"{name}, {model.num_classes} classes, {len(state)} tensors"]
    if card.arch not in _NAMES and not card.arch.startswith("torchvision:"):
        lines.append(f"BackdoorBench's zoo lacks this {card.arch}: it loads once the network is added there as {name}")
    fits = [data for data, (constants, *_) in BACKDOORBENCH_DATA.items() if constants == card.normalization]
    lines.append(
        f"normalization {card.normalization}: what BackdoorBench uses for {', '.join(fits)}"
        if fits
        else f"normalization {card.normalization} is none of BackdoorBench's: set mean and std there, or numbers differ"
    )
    return file.getvalue(), lines
