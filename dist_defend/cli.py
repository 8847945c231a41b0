"""The command line: dist-defend run | evaluate | sweep | data | attacks | import | export | report | bench | doctor."""

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
from dist_defend.engine.signals import INTERRUPTED, PREEMPTED, Stopped, stoppable
from dist_defend.errors import UserError
from dist_defend.screen import printable

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "PREEMPTED", "main"]

BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells say of a program whose reader went away, as with `| head`
_OTHERS_SECONDS = 3  # after which a launcher has ended the other ranks of one that failed
_COMMANDS = {
    "launch": "dist_defend.launch",
    "plan": "dist_defend.plan",
    "sweep": "dist_defend.sweep.cli",
    "data": "dist_defend.data.cli",
    "evaluate": "dist_defend.evaluate_command",
    "attacks": "dist_defend.attacks.cli",
    "import": "dist_defend.importing",
    "export": "dist_defend.models.export",
    "report": "dist_defend.report",
    "bench": "dist_defend.bench",
    "doctor": "dist_defend.doctor",
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
    """Overrides may stand before and after options, which argparse does not allow for below subcommands."""
    parser = argparse.ArgumentParser(prog="dist-defend", description=sys.modules["dist_defend"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure; may stand anywhere")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    asked_for = argv[:1] if argv[:1] in (["run"], *([name] for name in _COMMANDS)) else list(_COMMANDS)
    for name in asked_for:  # a command's module is imported when it is used, or to list them all
        if name in _COMMANDS:
            importlib.import_module(_COMMANDS[name]).add_arguments(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


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


def _add_run(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("run", help="run one experiment file, or resume it")
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single keys")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="build data, models and steps, but run nothing")
    parser.set_defaults(main=_run)


def _run(args: argparse.Namespace) -> int:
    with stoppable():  # before torch is imported, which takes seconds
        return _run_stoppable(args)


def _run_stoppable(args: argparse.Namespace) -> int:
    from dist_defend import config, experiment
    from dist_defend.engine import dist
    from dist_defend.engine.checkpoint import SaveError
    from dist_defend.engine.step import NonFiniteError

    loaded = config.load_experiment(args.config, args.overrides)
    if args.print_config:
        print(config.dump(loaded), end="")
        return 0
    try:
        experiment.run(loaded, dry_run=args.dry_run)
    except NonFiniteError as error:
        _tell(f"failed: {error}; the newest checkpoint is from before it; lower the learning rate")
        return 1
    except SaveError as error:
        _tell(f"failed: {error}")
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _tell(f"failed: {error}; make room and start the same command, which resumes")
        return 1
    finally:
        dist.stop()
    return 0
