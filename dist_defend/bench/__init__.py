"""Speed of the package's steps and loaders against what the papers' published code does: ``dist-defend bench``."""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError
from dist_defend.files import write_atomic

NAMES = ("data", "simclr", "badencoder", "mimic", "mimic-mi", "head", "ibau", "rnp", "zskt", "graphs", "scaling")
SCALED = ("simclr", "badencoder", "mimic", "classifier")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("name", choices=[*NAMES, "all"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as they come, as a JSON list")
    parser.add_argument(
        "--encoder", metavar="ARCH", help="time only this encoder (default: small_cifar and a ResNet-18)"
    )
    parser.add_argument("--method", choices=SCALED, help="scaling: only this method (default: each of them)")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="images per step (default: each row's own)")
    parser.add_argument("--num-images", type=_positive, metavar="N", help="images per epoch (default: each row's own)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="timed pairs (default: 5)")
    parser.set_defaults(main=main)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def main(args: argparse.Namespace) -> int:
    """Run the benches, print their rows and write them to --json. UserError for what cannot be timed."""
    from dist_defend.bench.runner import Settings  # torch is imported only when something is timed

    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; create it")
    if args.name == "data" and args.encoder is not None:
        raise UserError("--encoder: bench data trains nothing; leave it out")
    if args.name != "scaling" and args.method is not None:
        raise UserError("--method: only bench scaling reads it; leave it out")
    settings = Settings(args.encoder, args.batch_size, args.num_images, args.repeats, args.method)
    rows: list[dict[str, Any]] = []
    for name in NAMES if args.name == "all" else (args.name,):
        module = importlib.import_module(f"dist_defend.bench.{name.replace('-', '_')}")
        for row in module.rows(settings):
            print(_line(row), flush=True)
            rows.append(row)
            if args.json is not None:  # a crash or a time limit leaves what there is
                write_atomic(args.json, json.dumps(rows, indent=1) + "\n")
    return 0


def _line(row: dict[str, Any]) -> str:
    spread = f" ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})" if "min_ratio" in row else ""
    speed = row["images_per_second"]
    speeds = speed if isinstance(speed, dict) else {"ours": speed}
    return (
        f"{row['name']}: {row['ratio']:.2f}x{spread}, ours {row['ours_ms']:.1f} ms, baseline {row['baseline_ms']:.1f} "
        f"ms, batch {row['batch_size']}, {row['device']} {row['dtype']}, images/s "
        + ", ".join(f"{key} {value:.0f}" for key, value in speeds.items())
        + (f"; {row['encoder']}; {row['note']}" if "note" in row else "")
    )
