"""``dist-defend init``: the files that users edit, copied from the package: configs/, launch/ and slurm/.

A wheel has them in this folder, where setup.py puts them; in a checkout they are the folders at its root.
"""

import argparse
import os
import shutil
from pathlib import Path

from dist_defend.errors import UserError

PARTS = ("configs", "launch/accelerate", "launch/deepspeed", "launch/torchvision_hook.py", "slurm")
_HERE = Path(__file__).parent


def template(part: str) -> Path:
    """The package's own file or folder of that name, one of PARTS. UserError where it was not installed."""
    for place in (_HERE / part, _HERE.parents[1] / part):
        if place.exists():
            return place
    raise UserError(f"{_HERE / part} is missing: install dist-defend again, from its wheel or its source")


def shipped(file: str) -> Path:
    """A file of configs/: the user's own, in the working folder, or else the package's. Any other path stays."""
    path = Path(file)
    if os.path.exists(path) or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    own = template("configs").joinpath(*path.parts[1:])
    return own if os.path.isfile(own) else path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("folder", nargs="?", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Copy what is not there yet, change nothing that is; 0. UserError for a folder that cannot be written."""
    for part in PARTS:
        source, written, kept = template(part), 0, 0
        for file in [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file()):
            place = args.folder / part / file.relative_to(source)
            if place.exists() or place.is_symlink():
                kept += 1
                continue
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
            except OSError as error:
                raise UserError(f"{place}: cannot be written ({error.strerror}); name another DIR") from error
            written += 1
        print(f"{args.folder / part}: {written} file(s)" + (f", {kept} there already and left alone" if kept else ""))
    return 0
