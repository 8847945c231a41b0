"""``dist-defend export``: a model folder becomes a Hugging Face folder, or BackdoorBench's defense_result.pt."""

import argparse
from pathlib import Path

from dist_defend.errors import UserError
from dist_defend.files import write_atomic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument(
        "source", type=Path, metavar="MODEL", help="model folder, or the folder of the run that made it"
    )
    told = "hf: a folder for Hugging Face and timm; backdoorbench (default): a classifier's defense_result.pt"
    parser.add_argument("--to", choices=["backdoorbench", "hf"], default="backdoorbench", help=told)
    parser.add_argument("--out", type=Path, required=True, help="file or folder to write, which must not be there yet")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write it and say what it is; 0. UserError for a place that is taken, and for what --to cannot hold."""
    if args.out.exists() or args.out.is_symlink():
        raise UserError(f"{args.out} exists already: name another place with --out")
    if not args.out.parent.is_dir():
        raise UserError(f"{args.out.parent} is not a folder: make it, or name another place with --out")
    source = args.source / "model" if (args.source / "model" / "model.json").is_file() else args.source
    lines = _hf(source, args.out) if args.to == "hf" else _backdoorbench(source, args.out)
    print(f"wrote {args.out}: " + "\n".join(lines))
    return 0


def _backdoorbench(source: Path, out: Path) -> list[str]:
    from dist_defend.models.artifact import load_classifier
    from dist_defend.models.export import defense_result

    content, lines = defense_result(*load_classifier(source))
    write_atomic(out, content)
    return lines


def _hf(source: Path, out: Path) -> list[str]:
    from dist_defend.models.artifact import load_artifact
    from dist_defend.publish.folder import HubFolder

    model, card = load_artifact(source)
    folder = HubFolder.of(model, card, source)
    folder.write(out)
    return folder.told()
