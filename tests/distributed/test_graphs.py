"""CUDA graphs on two ranks, emulated over gloo: collectives are in the graphs, and two ranks are still one rank."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from dist_defend.batch import Batch
from dist_defend.engine.graphed import GraphedUpdate, GraphMode
from tests.capture import cases
from tests.capture.cases import CASES, tensors
from tests.capture.emulator import EmulatedGraph, UnnamedWrite, emulated_gpu
from tests.distributed.comparison import assert_same
from tests.ranks import Pool, RankError

STEPS = 5  # more than an epoch of the labelled cases, and past the start of self-retrospection
NAMES = [
    "ibau",
    "ibau, adam inside, clamped",
    "rnp unlearn, clipped",
    "rnp recover",
    "zskt, both",
    "cmi",
]
Outcome = dict[str, Any]


def drive(name: str, graph: GraphMode, is_emulated: bool = True) -> Outcome:
    """A case in float64 -> its state and scalars after STEPS steps, and what its graphs sum over ranks."""
    place: AbstractContextManager[list[EmulatedGraph]] = emulated_gpu() if is_emulated else nullcontext([])
    with pytest.MonkeyPatch.context() as patch, place as graphs:
        patch.setattr(cases, "PRECISION", "fp64")
        torch.manual_seed(3)
        case = CASES[name](graph)
        device = case.updates[0].parameters[0].device
        told = []
        for batch, at in case.given[:STEPS]:
            moved = Batch((batch.images.to(device),), batch.labels.to(device), batch.index.to(device))
            told.append({key: value.item() for key, value in case.step(moved, at).items()})
        assert all(update.is_graphed == (graph == "on") for update in case.graphs)
        sums = [[list(shape) for shape in captured.collectives] for captured in graphs]
        state = [tensor.cpu() for tensor in tensors(case.step.state_dict())]
        return {"state": state, "told": told, "sums": sums}


def both(name: str, is_emulated: bool = True) -> dict[GraphMode, Outcome]:
    """What a rank's eager steps give, and its graphs."""
    modes: tuple[GraphMode, ...] = ("off", "on")
    return {graph: drive(name, graph, is_emulated) for graph in modes}


def assert_replays_are_eager_steps(eager: Outcome, graph: Outcome) -> None:
    """Bitwise, on one rank."""
    assert graph["told"] == eager["told"]
    pairs = list(zip(graph["state"], eager["state"], strict=True))
    assert pairs and all(a.equal(b) for a, b in pairs)


def mean_over_ranks(told: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """As the log has it."""
    return [{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]} for rows in zip(*told, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_replays_on_two_ranks_are_eager_steps_of_one(name: str, two_ranks: Pool) -> None:
    found = two_ranks.run(both, name, timeout=200.0)
    for outcomes in found:
        assert_replays_are_eager_steps(outcomes["off"], outcomes["on"])
    alone = drive(name, "off")
    graphs = [outcomes["on"] for outcomes in found]
    for outcome in graphs:
        assert_same({"state": outcome["state"]}, {"state": alone["state"]}, 1e-10, floor=1e-14)
    assert_same({"told": mean_over_ranks([g["told"] for g in graphs])}, {"told": alone["told"]}, 1e-10)
    first, second = (graph["sums"] for graph in graphs)
    assert first == second and any(first)


@pytest.mark.parametrize("name", ["rnp unlearn, dropout", "ft_sam", "nad"])
def test_replays_on_two_ranks_are_their_eager_steps(name: str, two_ranks: Pool) -> None:
    """Two ranks do not drop what one drops. FT-SAM's and NAD's norms over single pixels enlarge the last digits.

    test_tuning.py compares these two with one rank, at 32 pixels.
    """
    for outcomes in two_ranks.run(both, name, timeout=200.0):
        assert_replays_are_eager_steps(outcomes["off"], outcomes["on"])


def test_gradients_go_in_one_bucket(two_ranks: Pool) -> None:
    """I-BAU: g, four products and the bucket. RNP: the norms' tables, the counts, the tables' slopes, the bucket."""
    delta = [1, 3, cases.IMAGE, cases.IMAGE]
    weights = sum(p.numel() for p in CASES["ibau"]("off").updates[0].parameters)
    for outcome in two_ranks.run(drive, "ibau", "on"):
        assert outcome["sums"] == [[delta], [*5 * [delta], [2 * weights]]]
    update = CASES["rnp unlearn, clipped"]("off").updates[0]
    for outcome in two_ranks.run(drive, "rnp unlearn, clipped", "on"):
        for *norms, bucket in outcome["sums"]:
            count = len(norms) // 2
            tables, slopes = norms[:count], norms[count + 1 :]
            assert norms[count] == [2] and bucket == [sum(p.numel() for p in update.parameters)]
            assert slopes == tables[::-1] and count and all(len(shape) == 2 for shape in tables)


def sum_of_given_memory() -> str:
    """An update that sums a tensor of its own over ranks in place, and does not name it."""
    total = torch.zeros(3)

    def update(x: torch.Tensor) -> dict[str, torch.Tensor]:
        total.add_(x)
        torch.distributed.all_reduce(total)
        return {"total": total.sum()}

    with emulated_gpu():
        named = GraphedUpdate("sum", update, lambda: [total], torch.device("cpu"), "on")
        told = [named(torch.ones(3))["total"].item() for _ in range(2)]
        try:
            GraphedUpdate("sum", update, list, torch.device("cpu"), "on")(torch.ones(3))
        except UnnamedWrite:
            return f"found: {told}"
    return "not found"


def test_a_collective_writes_to_what_it_sums(two_ranks: Pool) -> None:
    """2 in each of three places after a first call; (2 + 1) on both ranks, so 6, after the second."""
    assert two_ranks.run(sum_of_given_memory) == 2 * ["found: [6.0, 18.0]"]


def unlike_shapes(is_told: bool) -> list[float]:
    """Batches of 4, 4 and 3 over the ranks: the last has a new shape on the second one alone."""
    total, rank = torch.zeros(()), torch.distributed.get_rank()

    def update(x: torch.Tensor) -> dict[str, torch.Tensor]:
        share = x.sum()
        torch.distributed.all_reduce(share)
        total.add_(share)
        return {"total": total}

    with emulated_gpu():
        call = GraphedUpdate("sum", update, lambda: [total], torch.device("cpu"), "on")
        sizes = [2, 2, 2 if rank == 0 else 1]
        return [call(torch.ones(n), kind=is_told and at == 2)["total"].item() for at, n in enumerate(sizes)]


def test_ranks_capture_together(two_ranks: Pool) -> None:
    assert two_ranks.run(unlike_shapes, True) == 2 * [[4.0, 8.0, 11.0]]


def test_a_rank_that_captures_alone_is_found(two_ranks: Pool) -> None:
    """Its calls that warm up meet the others' replays, and then wait for nobody."""
    two_ranks.run(unlike_shapes, True)  # whose time is not counted, for what a rank imports
    with pytest.raises(RankError, match="no answer in time"):
        two_ranks.run(unlike_shapes, False, timeout=3.0)
