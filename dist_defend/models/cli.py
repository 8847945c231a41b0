"""``dist-defend import``: a checkpoint of BadEncoder or MIMIC becomes a model folder."""

import argparse
from pathlib import Path

from dist_defend.errors import UserError


def add_arguments(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = commands.add_parser("import", help="turn a foreign checkpoint into a model folder, without unpickling it")
    parser.add_argument("source", help=".pth file of BadEncoder or MIMIC")
    parser.add_argument("--out", required=True, help="model folder to write")
    parser.add_argument("--arch", help="architecture, where the keys do not tell")
    parser.add_argument("--normalization", default="cifar10", help="constants that the encoder was trained with")
    parser.add_argument("--image-size", type=int, help="pixels; default: the architecture's usual size")
    parser.add_argument("--backdoored", action="store_true", help="mark the model as poisoned")
    parser.set_defaults(main=main)
