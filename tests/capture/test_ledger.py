"""The ledger of what steps cost a GPU: it finds waits, it counts what it should, and its numbers do not rise."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dist_defend.data.augment import SIMCLR, View
from dist_defend.data.ffcv_presence import ffcv_installed
from dist_defend.data.loader import BackendName
from tests.capture.ledger import DEVICE, PAGE, Cost, Ledger, Look, changes, counted, pretended_gpu, stored, table
from tests.capture.ledger_cases import CASES
from tests.capture.ledger_loaders import OF_JPEGS, loaded


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[None]:
    with pretended_gpu():
        yield


@pytest.mark.parametrize("key", CASES)
def test_a_call_waits_for_nothing_and_costs_what_the_ledger_says(key: str) -> None:
    if key in OF_JPEGS and not ffcv_installed():
        pytest.skip("ffcv is not installed")
    ledger = counted(CASES[key]())
    assert not ledger.copies.blocking and not ledger.copies.pageable
    changed = changes(key, ledger.cost, stored().get(key))
    told = "; it may fall, not rise: `python -m tests.capture.ledger --write` writes what fell to ledger.json"
    assert not changed, "\n".join(changed) + told


@pytest.mark.skipif(not ffcv_installed(), reason="ffcv is not installed")
@pytest.mark.parametrize("backend", ["torch", "ffcv"])
def test_a_batch_of_images_that_differ_in_size_takes_as_many_operators_as_one_image(backend: BackendName) -> None:
    views = (View(replace(SIMCLR, size=16)),)
    costs = [counted(loaded(backend, "of several sizes", count, views=views)) for count in (1, 16)]
    names = [[row[0] for row in cost.rows] for cost in costs]
    assert names[0] == names[1]
    assert [cost.copies.free.total() for cost in costs] == 2 * [4 if backend == "torch" else 3]


def test_the_ledger_has_no_key_that_nothing_counts_and_the_page_shows_it() -> None:
    assert stored().keys() == CASES.keys()
    assert table(stored()) in PAGE.read_text()


LOOKS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "a branch": lambda x: bool(x.sum() > 0),
    "a list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "written to the host": lambda x: torch.zeros(6).copy_(x),
    "a mask": lambda x: x[x > 0],
    "a masked write": lambda x: x.index_put_((x > 0,), x.sum()),
    "where it is not zero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_at_a_value_is_an_error(name: str) -> None:
    x = torch.zeros(6, device=DEVICE)
    with Ledger(), pytest.raises(Look, match="look at a value"):
        LOOKS[name](x)


def test_a_look_in_a_step_is_an_error() -> None:
    call = CASES["rnp resnet18: recover update"]()
    with Ledger(), pytest.raises(Look):
        call()["loss"].item()  # type: ignore[index]


def test_copies_from_the_host_are_told_apart() -> None:
    host, x = torch.zeros(1 << 15), torch.zeros(1 << 15, device=DEVICE)
    rows = torch.arange(4)

    def copies(call: Callable[[], object]) -> tuple[int, int, int]:
        with Ledger() as ledger:
            call()
        found = ledger.copies
        return found.blocking.total(), found.pageable.total(), found.free.total()

    assert copies(lambda: host.to(DEVICE)) == (1, 0, 0)
    assert copies(lambda: x.copy_(host)) == (1, 0, 0)
    assert copies(lambda: torch.tensor([1.0, 2.0], device=DEVICE)) == (1, 0, 0)
    assert copies(lambda: x.new_tensor([1.0])) == copies(lambda: torch.as_tensor(host, device=DEVICE)) == (1, 0, 0)
    assert copies(lambda: x[rows]) == copies(lambda: x[[0, 3]]) == (1, 0, 0)
    assert copies(lambda: x[rows.to(DEVICE, non_blocking=True)]) == (0, 0, 1)
    assert copies(lambda: host.to(DEVICE, non_blocking=True)) == (0, 1, 0)
    assert copies(lambda: x.copy_(host, non_blocking=True)) == (0, 1, 0)
    assert copies(lambda: host.pin_memory().to(DEVICE, non_blocking=True)) == (0, 0, 1)
    assert copies(lambda: x * 2 + torch.tensor(1.0)) == (0, 0, 0)  # a kernel's argument
    assert copies(lambda: x.new_full((), 3.0)) == (0, 0, 0)


def test_operators_flop_and_bytes_are_those_that_a_device_has() -> None:
    a, b = torch.zeros(3, 5, device=DEVICE), torch.zeros(5, 7, device=DEVICE)
    table, rows = torch.zeros(100, 2, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    assert counted(lambda: a @ b).cost == Cost(1, 2 * 3 * 5 * 7, 4 * (3 * 5 + 5 * 7 + 3 * 7))
    assert counted(lambda: a.t().view(5, 3)[1:]).cost == counted(lambda: torch.empty_like(a)).cost == Cost(0, 0, 0)
    assert counted(lambda: a.add_(1)).cost == Cost(1, 0, 4 * 15)
    assert counted(lambda: a[:1].expand(3, 5) + a).cost == Cost(1, 0, 4 * (5 + 15 + 15))
    assert counted(lambda: table[rows]).cost == Cost(1, 0, 4 * 8 + 8 * 4 + 4 * 8)
    assert counted(lambda: torch.zeros(9) + 1).cost == Cost(0, 0, 0)  # on the host


def test_a_number_that_rises_and_one_that_falls_are_told() -> None:
    before = {"operators": 10, "flop": 5, "bytes": 7, "first": {}}
    assert not changes("k", Cost(10, 5, 7), before)
    assert changes("k", Cost(11, 5, 6), before) == ["k: operators 10 -> 11", "k: bytes 7 -> 6"]
    assert changes("k", Cost(1, 1, 1), None) == ["k: is not in ledger.json"]
