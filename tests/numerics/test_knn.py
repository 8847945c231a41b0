"""The kNN monitor against the published one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.evaluate import knn_classes, knn_predict
from tests.numerics.det import det_images, golden


def assert_published(predict: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    queries, bank = (functional.normalize(det_images((n, 32), seed)) for n, seed in ((6, 1), (500, 2)))
    assert predict(queries, bank, torch.arange(500) % 7).tolist() == golden("head_and_knn")["knn_pred_order"]


def test_knn_is_the_published_one() -> None:
    assert_published(lambda queries, bank, labels: knn_predict(queries, bank, labels, 7, k=200, temperature=0.5))


@pytest.mark.parametrize(("k", "temperature"), [(100, 0.5), (200, 1e6), (500, 0.5)])
def test_another_k_or_equal_votes_fail_the_same_check(k: int, temperature: float) -> None:
    with pytest.raises(AssertionError):
        assert_published(lambda queries, bank, labels: knn_predict(queries, bank, labels, 7, k, temperature))


def test_votes_are_counted_one_by_one() -> None:
    """Against loops over neighbours; more queries than a block holds, and temperatures whose weights would overflow."""
    queries, bank = (functional.normalize(det_images((n, 8), seed)) for n, seed in ((520, 3), (40, 4)))
    labels = torch.arange(40) % 3
    cosines = queries.numpy() @ bank.numpy().T
    for k, temperature in ((1, 0.5), (7, 0.07), (7, 1e-4), (40, 10.0)):
        expected = []
        for row in cosines:
            votes = [0.0, 0.0, 0.0]
            for neighbour in sorted(range(40), key=lambda n: -row[n])[:k]:
                votes[neighbour % 3] += math.exp((row[neighbour] - 1) / temperature - (row.max() - 1) / temperature)
            expected.append(votes.index(max(votes)))
        assert knn_classes(queries, bank, labels, k, temperature).tolist() == expected
        single = knn_classes(queries.float(), bank.float(), labels, k, temperature)
        assert (single == torch.tensor(expected)).float().mean() > 0.98  # in float32 exp(1 / 1e-4) is infinite


def test_a_query_in_the_bank_gets_its_own_label() -> None:
    bank, labels = functional.normalize(det_images((30, 8), 0)), torch.arange(30) % 4
    assert knn_predict(bank, bank, labels, 4, k=1)[:, 0].equal(labels)
