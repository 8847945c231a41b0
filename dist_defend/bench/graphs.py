"""Updates as CUDA graphs against the same updates called one operator after the other, and their share of the peaks."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_defend.bench import ibau, peaks, rnp, runner
from dist_defend.bench.peaks import Peaks
from dist_defend.bench.runner import Case, Settings
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.engine.dist import Ranks
from dist_defend.engine.graphed import GraphMode, can_capture
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.models.masked_norm import mask_norms, norm_names

CALLS = {"cuda": 20, "cpu": 1}  # of an update in one measurement
Update = Callable[[], dict[str, Tensor]]


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """graphs-ibau-inner, -outer, graphs-rnp-unlearn, -recover: an update; graphs-rnp-defence: RNP from model to table.

    The sizes are those of `bench ibau` and `bench rnp`, whose --encoder and so on they take.
    """
    ranks = runner.start()
    found = peaks.measure(ranks.device)
    (of_ibau,) = runner.cases(settings, "graphs", ("", "ibau_vgg", 100, 300))
    (of_rnp,) = runner.cases(settings, "graphs", ("", *rnp.sizes(ranks)))
    with tempfile.TemporaryDirectory() as folder:
        both = [_ibau(of_ibau, ranks, Path(folder, graph), graph) for graph in _modes()]
        yield from _compare(of_ibau, ranks, found, settings, *both)
        both = [_rnp(of_rnp, ranks, graph) for graph in _modes()]
        yield from _compare(of_rnp, ranks, found, settings, *both)
        pair = rnp.Pair(replace(of_rnp, name="graphs-rnp-defence"), Path(folder))
        before, after = (pair.ours(ranks, full=True, graph=graph) for graph in _modes())
        note = f"{_note(ranks)}; a whole defence, all thresholds tested"
        yield runner.compare(pair.case, before, after, settings, images=pair.images_of(full=True), note=note)


def _modes() -> tuple[GraphMode, GraphMode]:
    return "off", "auto"


def _note(ranks: Ranks) -> str:
    return "eager calls against replays" if can_capture(ranks.device) else "no GPU here: eager calls on both sides"


def _ibau(case: Case, ranks: Ranks, folder: Path, graph: GraphMode) -> dict[str, Update]:
    images = runner.random_images(case.num_images)
    data = runner.prepare(images, folder, classes=ibau.CLASSES, storage="npy")
    config = LoaderConfig("resident", 1)
    loader = make_loader(data, config=config, batch_size=case.batch_size, device=ranks.device)
    model = runner.seasoned(case.encoder, ibau.CLASSES, "none")
    rounds = Rounds(loader, runner.IMAGE_SIZE, ranks)
    step = UnlearningStep(model, ibau.config_of(case, graph), rounds, seed=0)
    pixels, labels, weights = step.first
    mask = torch.zeros(case.batch_size, 1, 1, 1, device=ranks.device)
    mask[: max(1, step.config.num_patched(case.batch_size))] = 1
    return {
        "graphs-ibau-inner": lambda: step.inner(pixels, weights),
        "graphs-ibau-outer": lambda: step.outer(pixels, labels, mask, weights),
    }


def _rnp(case: Case, ranks: Ranks, graph: GraphMode) -> dict[str, Update]:
    unlearned, masked = (runner.seasoned(case.encoder, rnp.CLASSES, runner.NORMALIZATION) for _ in range(2))
    for model in (unlearned, masked):
        model.to(ranks.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = runner.to_pixels(runner.random_images(case.batch_size), ranks.device)
    labels = torch.arange(case.batch_size, device=ranks.device) % rnp.CLASSES
    unlearn = UnlearnStep(unlearned, ranks, graph=graph)
    recover = RecoverStep(masked, mask_norms(masked.net, norm_names(masked.net)), ranks, graph=graph)
    return {
        "graphs-rnp-unlearn": lambda: unlearn.graphed(images, labels),
        "graphs-rnp-recover": lambda: recover.graphed(images, labels),
    }


def _compare(
    case: Case,
    ranks: Ranks,
    found: Peaks,
    settings: Settings,
    eager: dict[str, Update],
    graphed: dict[str, Update],
) -> Iterator[dict[str, Any]]:
    """A row for each update, after showing that the first calls of both sides give the same sums of scalars."""
    for name, update in eager.items():
        runner.show_equal(name, partial(_told, update), partial(_told, graphed[name]))
    calls = CALLS[ranks.device.type]

    def several(update: Update) -> None:
        for _ in range(calls):
            update()

    for name, update in eager.items():
        both = partial(several, update), partial(several, graphed[name])
        images = calls * case.batch_size
        row = runner.compare(replace(case, name=name), *both, settings, images=images, note=_note(ranks))
        row |= {key: row[key] / calls for key in ("ours_ms", "baseline_ms")}
        work = peaks.count(update)
        row |= {**work._asdict(), "peak_flop": found.flop, "peak_bytes": found.bytes}
        shares = work.shares(found, row["ours_ms"] / 1e3)
        row["note"] += "; " + ", ".join(f"{key.replace('_', ' ')} {share:.0%}" for key, share in shares.items())
        yield row | shares


def _told(update: Update) -> float:
    return float(torch.stack([value.double() for value in update().values()]).sum())
