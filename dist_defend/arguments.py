"""The words of commands that read an experiment file: options and ``key.sub=value`` in any order."""

import argparse
from collections.abc import Sequence


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """``args.config`` and ``args.overrides``, once ``parse_words`` has read the line."""
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change single keys; anywhere on the line"
    )


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """argparse alone takes positional words in one place only; what it leaves over belongs to them.

    The file is the first word that is no ``key=value``. SystemExit with status 2 for words that no command reads.
    """
    args, rest = parser.parse_known_args(argv)
    takes_words = hasattr(args, "overrides")
    unread = [word for word in rest if word.startswith("-") or not takes_words]
    if unread:
        parser.error(f"unrecognized arguments: {' '.join(unread)}")
    if takes_words:
        words = [args.config, *args.overrides, *rest]
        args.config = next((word for word in words if not _is_override(word)), words[0])
        words.remove(args.config)
        args.overrides = words
    return args


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and "/" not in key  # runs/lr=0.1/config.yaml is a file
