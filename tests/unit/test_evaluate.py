"""Counts and ratings of a classifier and its backdoor."""

import math

import pytest
import torch

from dist_defend.counts import Count, backdoor_counts, der, per_class_accuracy, rir

LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
CLEAN = torch.tensor([0, 1, 1, 0, 2, 2])  # 4 of 6 right
TRIGGERED = torch.tensor([1, 1, 1, 1, 1, 2])


def plain(counts: dict[str, Count]) -> dict[str, tuple[int, int]]:
    return {key: (count.correct, count.n) for key, count in counts.items()}


def test_one_target_class() -> None:
    counts = plain(backdoor_counts(CLEAN, TRIGGERED, LABELS, 1))
    assert counts == {"acc": (4, 6), "asr": (3, 4), "asr_all": (5, 6), "ra": (1, 4)}


def test_a_target_for_each_image() -> None:
    counts = plain(backdoor_counts(CLEAN, TRIGGERED, LABELS, (LABELS + 1) % 3))
    assert counts == {"acc": (4, 6), "asr": (2, 6), "asr_all": (2, 6), "ra": (3, 6)}


def test_one_target_as_a_tensor_counts_the_same() -> None:
    everywhere = torch.full_like(LABELS, 1)
    assert backdoor_counts(CLEAN, TRIGGERED, LABELS, everywhere) == backdoor_counts(CLEAN, TRIGGERED, LABELS, 1)


def test_per_class_accuracy_sums_to_the_accuracy() -> None:
    counts = per_class_accuracy(CLEAN, LABELS, 4)
    assert [(c.correct, c.n) for c in counts] == [(2, 2), (1, 2), (1, 2), (0, 0)]
    assert sum(c.correct for c in counts) == backdoor_counts(CLEAN, TRIGGERED, LABELS, 1)["acc"].correct


def rates(acc: int, asr: int, ra: int) -> dict[str, Count]:
    return {key: Count(value, 100) for key, value in (("acc", acc), ("asr", asr), ("ra", ra))}


@pytest.mark.parametrize(
    ("before", "after", "expected_der", "expected_rir"),
    [
        (rates(90, 100, 0), rates(90, 0, 90), 1.0, 0.95),  # everything gained, nothing lost
        (rates(90, 100, 0), rates(80, 0, 40), 0.95, 0.65),  # ten points of accuracy cost five of rating
        (rates(90, 100, 0), rates(95, 50, 20), 0.75, 0.6),  # gained accuracy is not rewarded
        (rates(90, 20, 70), rates(90, 60, 30), 0.5, 0.5),  # nor is a stronger backdoor punished
        (rates(90, 100, 0), rates(0, 100, 0), 0.05, 0.05),
    ],
)
def test_ratings_follow_the_documented_formula(
    before: dict[str, Count], after: dict[str, Count], expected_der: float, expected_rir: float
) -> None:
    assert der(before, after) == pytest.approx(expected_der, abs=1e-12)
    assert rir(before, after) == pytest.approx(expected_rir, abs=1e-12)


def test_ratings_of_nothing_are_nan() -> None:
    nothing = rates(90, 0, 0) | {"asr": Count(0, 0), "ra": Count(0, 0)}
    assert math.isnan(der(nothing, rates(90, 0, 0))) and math.isnan(rir(nothing, rates(90, 0, 0)))
