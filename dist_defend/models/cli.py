"""``dist-defend import``: a checkpoint of somebody else's becomes a model folder."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend.errors import UserError
from dist_defend.files import sha256_file, write_atomic
from dist_defend.models.artifact import ModelCard, load_artifact, save_artifact
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import NORMALIZATIONS, SimCLR
from dist_defend.models.foreign import import_encoder
from dist_defend.models.foreign_classifier import ClassifierReport, holds_classifier, import_classifier
from dist_defend.models.foreign_file import read_checkpoint
from dist_defend.models.foreign_images import SPLITS, PoisonedImages, read_poisoned

_MOST_NAMES = 8


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("import", help="turn a foreign checkpoint into a model folder, without unpickling it")
    parser.add_argument(
        "source", type=Path, help=".pth, .tar, .pt or .safetensors file, as BadEncoder, MIMIC, I-BAU, RNP, "
        "BackdoorBench, torchvision or timm write them"
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument(
        "--kind", choices=("encoder", "classifier"), help="what to make of it; default: read off the keys"
    )
    parser.add_argument("--arch", help="architecture, where the keys do not tell")
    parser.add_argument(
        "--normalization", choices=list(NORMALIZATIONS), help="constants that the model was trained with; default: by "
        "layout and data set, see docs/models.md"
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, help="pixels; default: by layout and data set")
    parser.add_argument(
        "--by-position", action="store_true", help="a classifier's tensors of other names: match them in order"
    )
    parser.add_argument("--backdoored", action="store_true", help="mark the model as poisoned")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Import, write, and say what was recognised. UserError for an unusable file or a folder that is taken."""
    if (args.out / "model.json").exists():
        raise UserError(f"{args.out} already holds a model: name another folder with --out")
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size is {args.image_size}: it must be at least 1 pixel")
    content = read_checkpoint(args.source)
    origin = {"method": "import", "file": args.source.name, "file_sha256": sha256_file(args.source)}
    is_classifier = holds_classifier(content) if args.kind is None else args.kind == "classifier"
    if args.by_position and not is_classifier:
        raise UserError("--by-position is for classifiers: leave it out, or give --kind classifier")
    make = _classifier if is_classifier else _encoder
    try:
        told = make(args, content, origin)
    except OSError as error:
        raise UserError(f"{args.out} cannot be written ({error.strerror}): name another folder with --out") from error
    print("\n".join(told))
    return 0


def _encoder(args: argparse.Namespace, content: Any, origin: dict[str, Any]) -> list[str]:
    model, report = import_encoder(args.source, args.arch, args.normalization, args.image_size, content)
    card = ModelCard(
        kind="simclr" if report.has_projector else "encoder",
        arch=report.arch,
        normalization=report.normalization,
        image_size=report.image_size,
        feature_dim=model.f.feature_dim,
        backdoored=args.backdoored,
        provenance=origin,
    )
    left_out = [f"left out: {_some(report.dropped)}"] if report.dropped else []
    return [
        f"{args.source}: {report.layout}; {report.arch}",
        f"{report.num_tensors} tensors, {report.num_parameters} parameters",
        f"normalization {report.normalization}, images of {report.image_size} px, {card.kind}",
        *left_out,
        _save(args.out, model, card),
    ]


def _classifier(args: argparse.Namespace, content: Any, origin: dict[str, Any]) -> list[str]:
    model, report = import_classifier(
        args.source, args.arch, args.normalization, args.image_size, args.by_position, content
    )
    poisoned: dict[str, PoisonedImages] = {}
    if "clean_data" in report.facts:
        for split in SPLITS:
            size = report.facts.get("img_size")
            found = read_poisoned(content.get(split), split, args.source, size, report.num_classes)
            if found is not None:
                poisoned[split] = found
    rules = {split: images.rule(report.num_classes) for split, images in poisoned.items()}
    card = ModelCard(
        kind="classifier",
        arch=report.arch,
        normalization=report.normalization,
        image_size=report.image_size,
        num_classes=report.num_classes,
        backdoored=args.backdoored or bool(poisoned),
        provenance={**origin, "layout": report.layout, **report.facts, **({"labels": rules} if rules else {})},
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for split, images in poisoned.items():
        write_atomic(args.out / f"{split}.npz", _npz(images))
    saved = _save(args.out, model, card)
    told = _told(args.source, report)
    broken = tuple(key for key, value in model.net.state_dict().items() if not value.isfinite().all())
    if broken:
        told.append(f"NOT FINITE (NaN or infinite values): {_some(broken)}")
    return [*told, *(_images(args.out, split, poisoned[split], rules[split]) for split in poisoned), saved]


def _told(source: Path, report: ClassifierReport) -> list[str]:
    lines = [
        f"{source}: {report.layout}; {report.arch}, {report.num_classes} classes",
        f"{report.num_tensors} tensors, {report.num_parameters} parameters"
        + (f", {len(report.renamed)} matched by order:" if report.renamed else ", matched by name"),
        *(f"  {theirs} -> {ours}" for theirs, ours in report.renamed),
        f"normalization {report.normalization}, images of {report.image_size} px, classifier",
    ]
    if report.filled:
        lines.append(f"set to 0, as the file has none: {_some(report.filled)}")
    if report.facts:
        lines.append("it says: " + ", ".join(f"{key} {json.dumps(value)}" for key, value in report.facts.items()))
    return lines


def _images(out: Path, split: str, images: PoisonedImages, rule: str) -> str:
    height, width = images.x.shape[1:3]
    return f"{split}: {len(images.x)} images of {height}x{width} px, {rule}, in {out / f'{split}.npz'}"


def _save(out: Path, model: SimCLR | Classifier, card: ModelCard) -> str:
    """Write both files and load them again, which checks the digest and every key."""
    sha256 = save_artifact(out, model, card)
    load_artifact(out)
    return f"wrote {out}, sha256 {sha256}, read back" + ("; marked BACKDOORED" if card.backdoored else "")


def _npz(images: PoisonedImages) -> bytes:
    file = io.BytesIO()
    np.savez(file, x=images.x, y=images.y, y_bd=images.y_bd, index=images.index, flag=images.flag)
    return file.getvalue()


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
