"""``dist-defend sweep plan | submit | status | resubmit | cancel | collect | report``."""

import argparse
import contextlib
import importlib.util
from collections import Counter
from collections.abc import Iterator

from dist_defend.errors import UserError
from dist_defend.lock import FolderLock
from dist_defend.sweep import estimate, local, progress, slurm
from dist_defend.sweep.grid import Sweep, load_sweep
from dist_defend.sweep.progress import STATES, Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    told = {
        plan: "print the points and what they will cost by those that are done, change nothing",
        submit: "run the points that were never tried",
        status: "count the points by state, and say why some failed",
        resubmit: "run the points that failed or were never tried",
        cancel: "cancel what Slurm has not finished",
        collect: "write results.parquet and results.csv",
        report: "collect, then leaderboard, trade-off plot and missing points",
    }
    for action, text in told.items():
        own = actions.add_parser(action.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.")
        own.add_argument("sweep", help="YAML file, see configs/sweeps/")
        own.add_argument("--scale", metavar="NAME", help="another size of the sweep, of the file's 'scales'")
        own.set_defaults(main=action)
        if action in (submit, resubmit):
            own.add_argument("--local", action="store_true", help="on this machine instead of Slurm")
            own.add_argument("-j", type=int, metavar="N", help="with --local: points at a time (default: one per GPU)")
            own.add_argument("--no-collect", action="store_true", help="with Slurm: no job that collects in the end")


def plan(args: argparse.Namespace) -> int:
    """Every point, the number of each stage's, and what is left to compute, as far as results tell."""
    sweep = load_sweep(args.sweep, args.scale)
    slurm.check_options(sweep)
    for point in sweep.points:
        after = f" after {point.parent.key}" if point.parent else ""
        print(f"{point.key} {point.stage}{after}: {point.name}")
    counts = Counter(point.stage for point in sweep.points)
    stages = ", ".join(f"{stage} {count}" for stage, count in counts.items())
    print(f"{len(sweep.points)} points ({stages}) -> {sweep.folder}")
    for stage, config in sweep.config.stages.items():
        if config.points_per_job > 1:
            print(
                f"stage {stage}: {config.points_per_job} points at most share a job and its process, one after another"
            )
    for line in estimate.told(sweep):
        print(line)
    return 0


def submit(args: argparse.Namespace) -> int:
    """Points that were never tried."""
    return _run(args, again=False)


def resubmit(args: argparse.Namespace) -> int:
    """Points that failed too."""
    return _run(args, again=True)


def _run(args: argparse.Namespace, again: bool) -> int:
    if args.j is not None and (args.j < 1 or not args.local):
        raise UserError(f"-j {args.j}: at least 1, and together with --local; 'throttle' in the file is for Slurm")
    sweep = load_sweep(args.sweep, args.scale)
    return run_points(sweep, again, is_local=args.local, at_a_time=args.j, with_collect=not args.no_collect)


def run_points(
    sweep: Sweep, again: bool, *, is_local: bool, at_a_time: int | None = None, with_collect: bool = True
) -> int:
    """Run here, or submit to Slurm, what was never tried; with ``again`` what failed too. Returns the exit status.

    at_a_time, with_collect: the options -j and --no-collect.
    """
    if not is_local:
        slurm.check_options(sweep)
    with _alone(sweep):
        known, tasks = progress.survey(sweep)
        chosen, blocked = progress.to_submit(sweep, known, again)
        _tell_counts(sweep, known)
        failed = sum(known[point.key].state == "failed" for point in sweep.points)
        if failed and not again:
            print(f"{failed} failed and {len(blocked)} that come after them are left alone; `resubmit` runs them again")
        if not chosen:
            print("nothing to run")
            return 0
        print(f"running {len(chosen)} points", flush=True)
        progress.write_points(sweep, chosen)
        if is_local:
            if sweep.config.setup or any(stage.setup for stage in sweep.config.stages.values()):
                print("the lines of 'setup' are for Slurm's jobs: they are not run here")
            return local.run(sweep, chosen, at_a_time)
        for line in slurm.submit(sweep, chosen, tasks, with_collect=with_collect):
            print(line)
        return 0


@contextlib.contextmanager
def _alone(sweep: Sweep) -> Iterator[None]:
    """Keep other commands from this sweep's folder: two that submit would run its points twice."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(sweep.folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def status(args: argparse.Namespace) -> int:
    """Counts by stage and state, and a line for each failed point."""
    sweep = load_sweep(args.sweep, args.scale)
    known, _ = progress.survey(sweep)
    _tell_counts(sweep, known)
    for point in sweep.points:
        if (own := known[point.key]).state == "failed":
            print(f"failed {point.stage} {point.key} ({point.name}): {own.reason}{f'; {own.log}' if own.log else ''}")
    return 0


def _tell_counts(sweep: Sweep, known: dict[str, Progress]) -> None:
    for stage in sweep.config.stages:
        states = Counter(known[point.key].state for point in sweep.stage(stage))
        print(f"{stage}: " + ", ".join(f"{states[state]} {state}" for state in STATES if states[state]))


def cancel(args: argparse.Namespace) -> int:
    """Points that run save before they end."""
    sweep = load_sweep(args.sweep, args.scale)
    with _alone(sweep) if sweep.folder.exists() else contextlib.nullcontext():
        jobs = slurm.cancel(sweep)
    print(f"cancelled {len(jobs)} jobs{': ' if jobs else ''}{', '.join(jobs)}")
    return 0


def collect(args: argparse.Namespace) -> int:
    """One table of everything that is done; 1 if some results are damaged."""
    check_pandas()
    from dist_defend.sweep import collect as collecting

    sweep = load_sweep(args.sweep, args.scale)
    return 1 if collecting.write(sweep, collecting.table(sweep)) else 0


def check_pandas() -> None:
    """UserError where the tables' library is not installed."""
    if importlib.util.find_spec("pandas") is None:
        raise UserError("collecting needs pandas, which is not installed; pip install 'dist-defend[sweep]'")


def report(args: argparse.Namespace) -> int:
    """collect, and what it means."""
    check_pandas()
    from dist_defend.sweep import collect as collecting
    from dist_defend.sweep import report as reporting

    sweep = load_sweep(args.sweep, args.scale)
    table = collecting.table(sweep)
    damaged = collecting.write(sweep, table)
    reporting.write(sweep, table)
    return 1 if damaged else 0
