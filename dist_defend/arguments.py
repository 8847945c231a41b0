"""The words of commands that read an experiment file: options and ``key.sub=value`` in any order."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """``args.config`` and ``args.overrides``, once ``parse_words`` has read the line."""
    config = parser.add_argument("config", help="YAML file, see configs/")
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="change single keys; anywhere on the line"
    )
    config.completer, overrides.completer = yaml_files, keys_in_file  # type: ignore[attr-defined]  # for argcomplete


def yaml_files(prefix: str, **unused: object) -> list[str]:
    """YAML files and folders whose path begins so, as a shell completes them."""
    folder, _, begun = prefix.rpartition("/")
    at = f"{folder}/" if "/" in prefix else ""
    try:
        found = sorted(Path(at or ".").iterdir())
    except OSError:
        return []
    wanted = [file for file in found if file.name.startswith(begun) and (begun or not file.name.startswith("."))]
    return [f"{at}{f.name}/" if f.is_dir() else at + f.name for f in wanted if f.is_dir() or f.suffix == ".yaml"]


def keys_in_file(prefix: str, parsed_args: argparse.Namespace, **unused: object) -> list[str]:
    """``key.sub=`` of each value in the experiment file that the line names, for a shell's completion."""
    from dist_defend.errors import UserError
    from dist_defend.strict_yaml import read_yaml

    try:
        content = read_yaml(Path(parsed_args.config or ""))
    except UserError:
        return []
    return [key for key in _paths(content) if key.startswith(prefix)]


def _paths(content: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{at}{key}.")
        else:
            yield f"{at}{key}="


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
