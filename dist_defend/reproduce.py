"""``dist-defend reproduce``: published figures again, from the files of a folder to a table beside them."""

import argparse
import os
from collections import Counter
from pathlib import Path

from dist_defend.errors import UserError
from dist_defend.files import write_atomic
from dist_defend.lifeline import STOPPED
from dist_defend.sweep import preparation
from dist_defend.sweep.cli import check_pandas, run_points
from dist_defend.sweep.expectation import FAIL
from dist_defend.sweep.grid import Sweep, load_sweep
from dist_defend.sweep.preparation import Preparation
from dist_defend.templates import shipped, template

_PLACE = "configs/reproduce"
_TOLD = ("hardware", "minutes")  # lines of a file's head


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    add = parser.add_argument
    add("name", nargs="?", help=f"of a file in {_PLACE}, or any sweep file; without it: what there is")
    add("--from", dest="folder", type=Path, default=Path("downloads"), metavar="DIR",
        help="folder with the data sets and networks that it starts from (default: downloads)")  # fmt: skip
    add("--scale", metavar="NAME", help="another size, of the file's 'scales': small is for two cores")
    add("--plan", action="store_true", help="print what would run, change nothing")
    add("--slurm", action="store_true", help="submit to Slurm; the same command later tells what has come of it")
    add("-j", type=int, metavar="N", help="points at a time on this machine (default: one per GPU)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """0; 1 where a figure FAILs, or a point failed or has a damaged result; UserError for what does not fit."""
    if args.name is None:
        return _list()
    if args.j is not None and (args.j < 1 or args.slurm):
        raise UserError(f"-j {args.j}: at least 1, and not with --slurm; 'throttle' in the file is for Slurm")
    sweep = load_sweep(find(args.name), args.scale)
    wanted = preparation.read_by(sweep.config.before, [point.experiment.resolved() for point in sweep.points])
    for line in _head(sweep):
        print(line)
    if args.plan:
        return _plan(sweep, wanted, args.folder)
    check_pandas()  # before hours of work
    preparation.check(wanted, args.folder)
    for own in wanted:
        if status := preparation.make(own, args.folder):
            if status not in STOPPED:
                print(f"{own.makes} was not made; nothing else was started")
            return status
    status = run_points(sweep, again=True, is_local=not args.slurm, at_a_time=args.j)
    return status if status in STOPPED else max(status, _compare(sweep))


def find(name: str) -> Path:
    """The file of that name, the user's own or the package's. UserError that lists what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped(f"{_PLACE}/{name}.yaml")
    if not os.path.isfile(path):
        raise UserError(f"{name}: there is no file {path}; known: {', '.join(known())}")
    return path


def known() -> dict[str, Path]:
    """Name -> file, the user's own before the package's."""
    files = [*template("configs").joinpath("reproduce").glob("*.yaml"), *Path(_PLACE).glob("*.yaml")]
    return {file.stem: file for file in sorted(files, key=lambda file: file.stem)}


def _list() -> int:
    for name, file in known().items():
        sweep = load_sweep(file)
        lines = file.read_text(encoding="utf-8").splitlines()
        print(f"{name}: {lines[0].lstrip('# ')}")
        for line in _head(sweep):
            print(f"  {line}")
        print(f"  scales: {', '.join(sweep.config.scales) or 'none'}")
    return 0


def _head(sweep: Sweep) -> list[str]:
    """What the head of the file says of hardware and minutes."""
    lines = [line.lstrip("# ") for line in sweep.path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return [line for line in lines if line.startswith(tuple(f"{word}:" for word in _TOLD))]


def _plan(sweep: Sweep, wanted: list[Preparation], folder: Path) -> int:
    for own in wanted:
        way = own.way(folder)
        if own.is_made():
            print(f"{own.makes}: is there")
        elif way is None:
            print(f"missing: {preparation.missing(own, folder)}")
        else:
            print(f"dist-defend {' '.join(way.command(folder))}")
    for point in sweep.points:
        print(f"{point.stage} {point.name}: {'done' if sweep.is_done(point) else 'to run'}")
    counts = Counter(point.stage for point in sweep.points)
    stages = ", ".join(f"{stage} {count}" for stage, count in counts.items())
    print(f"{len(sweep.points)} points ({stages}) -> {sweep.folder}; figures to compare: {len(sweep.config.expect)}")
    return 0


def _compare(sweep: Sweep) -> int:
    """The tables of all points, and the figures beside those that were published; 1 if one FAILs."""
    from dist_defend.sweep import collect, report

    rows = collect.table(sweep)
    damaged = collect.write(sweep, rows)
    outcomes = report.outcomes_of(sweep, rows)
    scale = f" --scale {sweep.scale}" if sweep.scale else ""
    if outcomes:
        table = f"{report.beside_published(outcomes)}\n\n{report.BESIDE}\n"
        write_atomic(sweep.folder / "expectations.md", table)
        verdicts = Counter(outcome.verdict for outcome in outcomes)
        print(f"\n{table}\n{', '.join(f'{count} {verdict}' for verdict, count in verdicts.items())}")
    else:
        print(f"no figures are expected{f' at scale {sweep.scale}' if sweep.scale else ''}")
    print(f"all rows: dist-defend sweep report {sweep.path}{scale}")
    return int(damaged > 0 or any(outcome.verdict == FAIL for outcome in outcomes))
