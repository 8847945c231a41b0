"""Which label a class gets: one list for all splits, whole numbers in numeric order, other names in string order."""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dist_defend.data.splits import listed
from dist_defend.errors import UserError

MAX_CLASSES = 100_000  # a label beyond is taken for a mistake
_WHOLE = re.compile(r"[0-9]{1,18}")


def is_whole(name: str) -> bool:
    return _WHOLE.fullmatch(name) is not None


def order_classes(names: Iterable[str]) -> list[str]:
    """Label i is the class at place i. If all names are whole numbers, 2 comes before 10; otherwise as strings."""
    every = set(names)
    return sorted(every, key=int) if all(is_whole(name) for name in every) else sorted(every)


def number_notes(classes: Sequence[str]) -> list[str]:
    """What to tell where classes are numbers, but not 0 to n - 1."""
    if not classes or not all(map(is_whole, classes)) or [*map(int, classes)] == [*range(len(classes))]:
        return []
    last = len(classes) - 1
    return [
        f"the classes are numbers from {classes[0]} to {classes[-1]}, not 0 to {last}; labels are places in this "
        f"order: class {classes[0]} is label 0, class {classes[-1]} is label {last}"
    ]


def labels_of_words(
    words: Mapping[str, Sequence[str | None]], origin: object
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Classes and labels (N,) int64 per split, of labels as text. Numbers are labels, other words classes' names.

    None and -1 mean unlabelled. UserError, naming ``origin``, for a number below -1 or beyond MAX_CLASSES.
    """
    every = {word for split in words.values() for word in split if word is not None} - {"-1"}
    are_numbers = all(re.fullmatch(r"-?[0-9]{1,18}", word) for word in every)
    classes = [] if are_numbers else order_classes(every)
    label: dict[str | None, int] = {name: place for place, name in enumerate(classes)}
    if are_numbers:
        label = {word: int(word) for word in every}
    labels = {split: np.array([label.get(word, -1) for word in mine], np.int64) for split, mine in words.items()}
    return classes_of_labels(labels, origin) if are_numbers else classes, labels


def classes_of_labels(labels: Mapping[str, np.ndarray], origin: object) -> list[str]:
    """Names "0" to the highest label of all splits. UserError, naming ``origin``, for one that cannot be."""
    lowest = min((int(values.min()) for values in labels.values() if len(values)), default=-1)
    highest = max((int(values.max()) for values in labels.values() if len(values)), default=-1)
    if lowest < -1:
        raise UserError(f"{origin} has the label {lowest}; classes count from 0, and -1 means unlabelled")
    if highest >= MAX_CLASSES:
        raise UserError(f"{origin} has the label {highest}; labels go to {MAX_CLASSES - 1}")
    return [str(label) for label in range(highest + 1)]


def label_notes(classes: Sequence[str], labels: Mapping[str, np.ndarray], split: str) -> list[str]:
    """What to tell of a split: classes that no split has, that it lacks, that it alone has; images without a label."""
    seen = {name: set(np.unique(values).tolist()) - {-1} for name, values in labels.items()}
    everywhere = set().union(*seen.values())
    notes = []
    if classes and (unused := [name for label, name in enumerate(classes) if label not in everywhere]):
        start = next((label for label in range(len(classes)) if label in everywhere), 0)
        begins = f"; labels start at {start}" if start else ""
        notes.append(f"classes without an image in any split: {listed(unused)}{begins}")
    if seen[split]:
        lacking = [classes[label] for label in sorted(everywhere - seen[split])]
        own = [classes[label] for label in sorted(seen[split].difference(*(seen[s] for s in seen if s != split)))]
        if lacking:
            notes.append(f"classes without an image in {split}: {listed(lacking)}")
        if own and any(seen[s] for s in seen if s != split):
            notes.append(f"classes that only {split} has: {listed(own)}")
    if split != "unlabeled" and (unlabelled := int((labels[split] == -1).sum())):
        notes.append(f"images without a label (-1): {unlabelled}")
    return notes
