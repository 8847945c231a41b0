"""The command line: ``dist-defend COMMAND``. Only the module of the command that is asked for is imported."""

import argparse
import contextlib
import errno
import importlib
import os
import select
import sys
import time
import traceback
from collections.abc import Sequence
from typing import IO

from dist_defend import __version__, terminal
from dist_defend.arguments import add_experiment, parse_words
from dist_defend.engine.signals import INTERRUPTED, PREEMPTED, Stopped, stoppable
from dist_defend.errors import UserError
from dist_defend.screen import printable

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "PREEMPTED", "main"]

BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells say of a program whose reader went away, as with `| head`
_OTHERS_SECONDS = 3  # after which a launcher has ended the other ranks of one that failed
_COMMANDS = {  # name: (module, what it does); the module is imported when its command is used
    "init": ("dist_defend.templates", "copy the package's configs, launch files and sbatch templates, to edit them"),
    "run": ("dist_defend.cli", "run one experiment file, or resume it"),
    "launch": ("dist_defend.launch", "run one experiment file on several ranks or machines"),
    "plan": ("dist_defend.plan", "memory and work of each rank, before anything is started"),
    "sweep": ("dist_defend.sweep.cli", "run the points of a grid with Slurm or on this machine, collect them"),
    "data": ("dist_defend.data.cli", "prepare data sets and look at them"),
    "evaluate": ("dist_defend.evaluate_command", "count ACC, ASR and RA of a classifier, imported or trained here"),
    "methods": ("dist_defend.methods_command", "list the methods, or the keys of one: type, default, meaning"),
    "models": ("dist_defend.models.cli", "list architectures and normalizations, or tell of one"),
    "attacks": (
        "dist_defend.attacks.cli",
        "list the triggers, or the keys of one; draw them, or make one for a network",
    ),
    "import": ("dist_defend.importing", "turn a foreign checkpoint into a model folder, without unpickling it"),
    "export": ("dist_defend.models.export", "write a classifier as BackdoorBench's defense_result.pt"),
    "zoo": ("dist_defend.zoo.cli", "models with counts and YAML: add, list, count again, make again"),
    "report": ("dist_defend.report", "table, report.md, report.csv and report.html from finished runs"),
    "bench": ("dist_defend.bench", "time the package against the published formulations"),
    "doctor": ("dist_defend.doctor", "print what works on this machine and how to mend the rest"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad input (one line says what to change), 75 stopped by a signal and saved.

    130 stopped by Ctrl-C and saved, 141 whoever read the output went away.
    """
    try:
        try:
            return _main(argv)
        finally:  # also where argparse exits
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread(sys.stdout):
            raise
        return BROKEN_PIPE
    except Stopped as stop:
        _tell(str(stop))
        return stop.status
    except KeyboardInterrupt:
        _tell("stopped by Ctrl-C")
        return INTERRUPTED
    finally:
        for stream in (sys.stdout, sys.stderr):
            if _is_unread(stream):  # Python flushes both when it ends, and would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _is_unread(stream: IO[str]) -> bool:
    """Whether the stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):  # none of the system's files
        return False


def _main(argv: Sequence[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    is_debug = "--debug" in argv
    with terminal.guarded():
        terminal.hold_log()
        try:
            args = _parse([word for word in argv if word != "--debug"])
            args.debug = is_debug
            return int(args.main(args))
        except UserError as error:
            terminal.end_log()  # what was told on the way to it
            _tell(f"error: {error}")
            return 2
        except BrokenPipeError:
            raise
        except Exception as error:
            terminal.release_log()
            _tell_failure(error, is_debug)
            return 1
        finally:
            terminal.release_log()
            terminal.end_log()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dist-defend", description=sys.modules["dist_defend"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure; may stand anywhere")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, told) in _COMMANDS.items():
        command = commands.add_parser(name, help=told)
        if argv[:1] == [name]:
            importlib.import_module(module).add_arguments(command)
    return parse_words(parser, argv)


def _tell_failure(error: Exception, is_debug: bool) -> None:
    """One line for what nobody foresaw. Of several ranks the first one's; another's only where the first goes on."""
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0":
        time.sleep(_OTHERS_SECONDS)
    if is_debug:
        traceback.print_exception(error)
    told = printable(" ".join(str(error).split()), 500)
    where = "" if rank == "0" else f"rank {rank}: "
    hint = "" if is_debug else "; run again with --debug for the traceback"
    print(f"failed: {where}{type(error).__name__}{': ' if told else ''}{told}{hint}", file=sys.stderr)


def _tell(line: str) -> None:
    """Once per machine: every rank finds the same fault."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with contextlib.suppress(BrokenPipeError):  # nobody reads
            print(line, file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of ``run``."""
    add_experiment(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="build data, models and steps, but run nothing")
    parser.set_defaults(main=_run)


@stoppable()  # before torch is imported, which takes seconds
def _run(args: argparse.Namespace) -> int:
    from dist_defend import config, experiment
    from dist_defend.engine import dist
    from dist_defend.engine.checkpoint import SaveError
    from dist_defend.engine.objective import NonFiniteError

    loaded = config.load_experiment(args.config, args.overrides)
    if args.print_config:
        print(config.dump(loaded), end="")
        return 0
    try:
        experiment.run(loaded, dry_run=args.dry_run)
        return 0
    except NonFiniteError as error:
        _tell(f"failed: {error}; the newest checkpoint is from before it; lower the learning rate")
    except SaveError as error:
        _tell(f"failed: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _tell(f"failed: {error}; make room and start the same command, which resumes")
    finally:
        dist.stop()
    return 1
