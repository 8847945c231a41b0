"""One mistake that a test must notice."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """What is wrong, and in the file below dist_defend/ the text ``old`` (there once) that becomes ``new``."""

    wrong: str
    file: str
    old: str
    new: str
    test: str  # below tests/, as pytest names it


def mutated(text: str, mutation: Mutation) -> str:
    """The file with the mistake. ValueError unless ``old`` is there exactly once and ``new`` is another text."""
    if text.count(mutation.old) != 1 or mutation.old == mutation.new:
        raise ValueError(f"{mutation.file}: {mutation.old!r} is there {text.count(mutation.old)} times")
    return text.replace(mutation.old, mutation.new)
