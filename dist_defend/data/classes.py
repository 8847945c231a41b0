"""Class names: whether two lists of them mean the same labels, and which classes rows or batches of a set lack."""

from collections.abc import Sequence

import numpy as np

from dist_defend.errors import UserError
from dist_defend.screen import printable

_SHOWN = 5  # names of a message
_LEAST_SHARE = 0.5  # of the classes that a batch of a random order holds
_RENAME = "if these are the same classes, give them the same names (key 'classes' of manifest.json or model.json)"


def check_same_classes(
    first: Sequence[str] | None, first_path: str, second: Sequence[str] | None, second_path: str
) -> str | None:
    """Compare the class names of two data sets, or of a model and a data set, label by label.

    Numbers ("7", "00007") are compared as numbers; upper case, spaces, "-" and "_" make no difference. None for a
    side means that it has no names, and nothing is compared. Returns what must be said to the user, if anything: where
    one side has numbers only and the other has names, they are taken to be in the same order.
    UserError, with the first difference, for other names, another order, or another number of classes.
    """
    if first is None or second is None:
        return None
    if len(first) != len(second):
        raise UserError(f"{_count(first, first_path, second)}, but {_count(second, second_path, first)}")
    if _are_numbers(first) != _are_numbers(second):
        numbers, names = (first_path, second_path) if _are_numbers(first) else (second_path, first_path)
        return f"the classes of {numbers} are numbers: they are taken to be in the order of {names}'s"
    for label, (one, other) in enumerate(zip(first, second, strict=True)):
        if _key(one) != _key(other):
            is_order = sorted(map(_key, first)) == sorted(map(_key, second))
            remedy = "prepare both data sets in one order of classes" if is_order else _RENAME
            raise UserError(
                f"label {label} is class {one!r} in {first_path}, but {other!r} in {second_path}"
                f"{': the same names in another order' if is_order else ''}; {remedy}"
            )
    return None


def check_class(key: str, number: int, num_classes: int, path: object) -> None:
    """UserError, which names the key, for the number of a class that a data set does not have."""
    if not 0 <= number < num_classes:
        raise UserError(f"key '{key}' is {number}; {path} has classes 0 to {num_classes - 1}")


def named_classes(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    """Of two lists that check_same_classes lets pass the one with names, the first if both have them."""
    return tuple(second if _are_numbers(first) else first)


def tell_missing_classes(labels: np.ndarray, rows: np.ndarray, classes: Sequence[str]) -> str | None:
    """One sentence on the classes that the data set with ``labels`` (N,) has and its ``rows`` (M,) lack, if any."""
    missing = np.setdiff1d(labels[labels >= 0], labels[rows])
    if not len(missing):
        return None
    have = len(np.unique(labels[labels >= 0]))
    return f"{len(rows)} images lack {len(missing)} of the {have} classes: {_listed([classes[c] for c in missing])}"


def tell_uniform_batches(labels: np.ndarray, batch_size: int) -> str | None:
    """One sentence where batches in the order of ``labels`` (M,) hold less than half of the classes that they would
    hold in a random order, as those of a set that is sorted by class do; else None. Only whole batches count.

    A batch of B from classes of shares p_c holds sum_c 1 - (1 - p_c)^B different ones.
    """
    count = len(labels) // batch_size
    if not count:
        return None
    _, found = np.unique(labels, return_inverse=True)
    shares = np.bincount(found) / len(found)
    expected = float((1 - (1 - shares) ** batch_size).sum())
    whole = found[: count * batch_size].reshape(count, batch_size)
    held = len(np.unique(whole + len(shares) * np.arange(count)[:, None])) / count
    if held >= _LEAST_SHARE * expected:
        return None
    return f"batches of {batch_size} in order hold {held:.1f} classes on average, in a random order {expected:.1f}"


def _are_numbers(names: Sequence[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names)


def _key(name: str) -> str:
    if name.isascii() and name.isdigit():
        return name.lstrip("0") or "0"
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _count(names: Sequence[str], path: str, others: Sequence[str]) -> str:
    known = set(map(_key, others))
    only = [] if _are_numbers(names) or _are_numbers(others) else [name for name in names if _key(name) not in known]
    return f"{path} has {len(names)} classes" + (f" (it alone has {_listed(only)})" if only else "")


def _listed(names: Sequence[str]) -> str:
    return printable(", ".join(names[:_SHOWN]), 500) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
