"""The kNN monitor against the published one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.counts import knn_classes, knn_predict
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import write_dataset
from dist_defend.models.encoder import build_simclr
from tests.distributed.comparison import train
from tests.numerics.det import det_images, golden
from tests.runs import SIZE, make_data, make_experiment


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


def vote(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Classes by loops over the nearest of the bank, all features divided by their lengths."""
    bank, queries = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (bank, queries))
    classes = []
    for cosines in queries @ bank.T:
        votes = np.zeros(3)
        for neighbour in np.argsort(-cosines)[:k]:
            votes[labels[neighbour]] += math.exp((cosines[neighbour] - cosines.max()) / temperature)
        classes.append(votes.argmax())
    return np.array(classes)


def test_the_monitor_votes_with_the_memory_on_the_test_images(tmp_path: Path) -> None:
    """What a run logs, against loops on the trained encoder's features; every mistake made here would change it."""
    draws, sets = np.random.default_rng(5), {}
    for name, count in (("memory", 40), ("test", 300)):
        blocks = draws.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        sets[name] = blocks.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2), draws.integers(0, 3, count)
        source = ArraySource(*sets[name], ["a", "b", "c"])
        write_dataset(source, tmp_path / name, name=name, split="train", storage="npy")
    monitor = {"memory": {"path": str(tmp_path / "memory")}, "test": {"path": str(tmp_path / "test")},
               "every": 2, "k": 5, "temperature": 0.1}  # fmt: skip
    options: dict[str, Any] = {
        "data": {"path": make_data(tmp_path / "data"), "max_samples": 8},
        "arch": "small_cifar",
        "update": {"batch_size": 4, "epochs": 3, "optimizer": {"name": "sgd", "lr": 1e-4}},
        "monitor": monitor,
    }
    done = train(make_experiment(tmp_path, "simclr", options), tmp_path / "run")
    told = {row["epoch"]: row["knn_acc"] for row in done["rows"] if "knn_acc" in row}
    assert list(told) == [2, 3]  # every second epoch and the last
    model = build_simclr("small_cifar", "cifar10", image_size=SIZE).double()
    state = done["states"]["simclr"]["objective"]
    model.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})

    def features(name: str) -> np.ndarray:
        pixels = torch.from_numpy(sets[name][0].astype(np.float32) / np.float32(255)).double().permute(0, 3, 1, 2)
        with torch.no_grad():
            found: Tensor = model.f.eval()(pixels)
        return found.numpy()

    memory, test = features("memory"), features("test")
    (_, memory_labels), (_, labels) = sets["memory"], sets["test"]

    def accuracy(k: int = 5, temperature: float = 0.1) -> float:
        return 100 * float((vote(test, memory, memory_labels, k, temperature) == labels).mean())

    assert told[3] == pytest.approx(accuracy(), rel=1e-12)
    mistaken = [
        accuracy(k=4), accuracy(k=6), accuracy(k=40), accuracy(temperature=0.5),
        100 * float((vote(memory, test, labels, 5, 0.1) == memory_labels).mean()),
    ]  # fmt: skip
    assert all(abs(other - told[3]) > 1e-6 for other in mistaken)
    apart = (test[:, None] - memory[None]) ** 2
    raw = np.array([np.bincount(memory_labels[row], minlength=3).argmax() for row in apart.sum(2).argsort(1)[:, :5]])
    assert abs(100 * float((raw == labels).mean()) - told[3]) > 1e-6  # features that are not normalised
