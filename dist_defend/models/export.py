"""``dist-defend export``: a classifier's model folder becomes BackdoorBench's defense_result.pt."""

import argparse
import io
from collections import OrderedDict
from pathlib import Path

import torch

from dist_defend.errors import UserError
from dist_defend.files import write_atomic
from dist_defend.models.artifact import ModelCard, load_classifier
from dist_defend.models.classifier import Classifier
from dist_defend.models.constants import BACKDOORBENCH_DATA
from dist_defend.models.foreign_classifier import BACKDOORBENCH_ARCHS

_NAMES = {arch: name for name, arch in BACKDOORBENCH_ARCHS.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("source", type=Path, help="model folder of a classifier")
    parser.add_argument("--out", type=Path, required=True, help="file to write, defense_result.pt for BackdoorBench")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write {model_name, num_classes, model}. UserError for an encoder, a taken file and a folder that is not there.

    BackdoorBench normalises by data set before its network; where the model's own constants are others, say so.
    """
    model, card = load_classifier(args.source)
    if args.out.exists():
        raise UserError(f"{args.out} exists already: name another file with --out")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent} is not a folder: make it, or name another file with --out")
    content, lines = defense_result(model, card)
    write_atomic(args.out, content)
    print(f"wrote {args.out}: " + "\n".join(lines))
    return 0


def defense_result(model: Classifier, card: ModelCard) -> tuple[bytes, list[str]]:
    """The file's content, and what there is to say about it."""
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
