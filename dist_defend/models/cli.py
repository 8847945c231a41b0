"""``dist-defend import``: a checkpoint of BadEncoder or MIMIC becomes a model folder."""

import argparse
from pathlib import Path

from dist_defend.errors import UserError
from dist_defend.files import sha256_file
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.encoder import NORMALIZATIONS
from dist_defend.models.foreign import import_encoder


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("import", help="turn a foreign checkpoint into a model folder, without unpickling it")
    parser.add_argument("source", type=Path, help=".pth or .safetensors file, as BadEncoder, MIMIC or timm write them")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--arch", help="architecture, where the keys do not tell")
    parser.add_argument(
        "--normalization", choices=list(NORMALIZATIONS), help="constants that the encoder was trained with; "
        "default: cifar10 for SimCLR models, none for ImageNet's, clip for CLIP's"
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, help="pixels; default: 32 for SimCLR models, else 224")
    parser.add_argument("--backdoored", action="store_true", help="mark the model as poisoned")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Import, write, and say what was recognised. UserError for an unusable file or a folder that is taken."""
    if (args.out / "model.json").exists():
        raise UserError(f"{args.out} already holds a model: name another folder with --out")
    if args.image_size is not None and args.image_size < 1:
        raise UserError(f"--image-size is {args.image_size}: it must be at least 1 pixel")
    model, report = import_encoder(args.source, args.arch, args.normalization, args.image_size)
    card = ModelCard(
        kind="simclr" if report.has_projector else "encoder",
        arch=report.arch,
        normalization=report.normalization,
        image_size=report.image_size,
        feature_dim=model.f.feature_dim,
        backdoored=args.backdoored,
        provenance={"method": "import", "file": args.source.name, "file_sha256": sha256_file(args.source)},
    )
    sha256 = save_artifact(args.out, model, card)
    print(f"{args.source}: {report.layout}; {report.arch}")
    print(f"{report.num_tensors} tensors, {report.num_parameters} parameters")
    print(f"normalization {report.normalization}, images of {report.image_size} px, {card.kind}")
    if report.dropped:
        print(f"left out: {', '.join(report.dropped[:8])}{', ...' if len(report.dropped) > 8 else ''}")
    print(f"wrote {args.out}, sha256 {sha256}" + ("; marked BACKDOORED" if args.backdoored else ""))
    return 0
