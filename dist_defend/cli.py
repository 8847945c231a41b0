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
from dist_defend.commands import COMMANDS, overview
from dist_defend.engine.signals import INTERRUPTED, PREEMPTED, Stopped, stoppable
from dist_defend.errors import UserError
from dist_defend.screen import printable

__all__ = ["BROKEN_PIPE", "INTERRUPTED", "PREEMPTED", "main"]

BROKEN_PIPE = 141  # 128 + SIGPIPE, what shells say of a program whose reader went away, as with `| head`
_OTHERS_SECONDS = 3  # after which a launcher has ended the other ranks of one that failed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 2 bad input (one line says what to change), 75 stopped by a signal and saved.

    130 stopped by Ctrl-C and saved, 141 whoever read the output went away.
    """
    if "_ARGCOMPLETE" in os.environ:  # a shell asks, by argcomplete's script
        return _complete(os.environ.get("COMP_LINE", ""))
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
    if not argv:
        print(overview(sys.modules["dist_defend"].__doc__ or ""))
        return 0
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
            if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # of any path that was given
                terminal.end_log()
                _tell(f"error: {printable(str(error.filename), 200)}: the name is too long; give a shorter path")
                return 2
            terminal.release_log()
            _tell_failure(error, is_debug)
            return 1
        finally:
            terminal.release_log()
            terminal.end_log()


def _complete(line: str) -> int:
    """Answer a shell that completes the line, and end the process. 1 where argcomplete is not installed."""
    try:
        import argcomplete
    except ImportError:
        return 1
    words = [word for word in line.split()[1:] if not word.startswith("-")]
    argcomplete.autocomplete(_parser(words[:1]))  # writes where the shell's script reads, and ends
    return 1


def _parse(argv: list[str]) -> argparse.Namespace:
    return parse_words(_parser(argv[:1]), argv)


def _parser(command_words: list[str]) -> argparse.ArgumentParser:
    """All commands; only those that the words name, one or none, have their options, and are imported."""
    parser = argparse.ArgumentParser(prog="dist-defend", description=sys.modules["dist_defend"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of a failure; may stand anywhere")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, told) in COMMANDS.items():
        command = commands.add_parser(name, help=told)
        if command_words == [name]:
            importlib.import_module(module).add_arguments(command)
    return parser


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
    _show(f"failed: {where}{type(error).__name__}{': ' if told else ''}{told}{hint}")


def _tell(line: str) -> None:
    """Once per machine: every rank finds the same fault."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        with contextlib.suppress(BrokenPipeError):  # nobody reads
            _show(line)


def _show(line: str) -> None:
    """On standard error; "error:" and "failed:" are red where it has colour."""
    word, space, rest = line.partition(" ")
    terminal.put(sys.stderr, word, "red" if word in ("error:", "failed:") else "")
    print(f"{space}{rest}", file=sys.stderr)


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
