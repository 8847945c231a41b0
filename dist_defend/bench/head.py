"""The downstream classifier: an epoch of one head, as published and as one of many that are trained together."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dist_defend.bench import runner
from dist_defend.bench.published import head as published
from dist_defend.bench.runner import Case, Settings
from dist_defend.bench.simclr import train_epoch
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.engine.context import Context
from dist_defend.engine.dist import Ranks
from dist_defend.engine.step import GradientStep
from dist_defend.methods.measure.probe import Config, FeatureBatches, ProbeObjective, TaskConfig
from dist_defend.models.encoder import build_encoder
from dist_defend.models.heads import HeadStack

NUM_CLASSES, NUM_TRAIN, NUM_TEST = 10, 5000, 8000  # STL-10's
SEEDS = tuple(range(100, 112))


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """head: an epoch of twelve heads at once, per head; head-alone: of a single head."""
    ranks = runner.start()
    (case,) = runner.cases(settings, "head", ("", "small_cifar", 64, NUM_TRAIN))
    yield _epoch(case, settings, ranks, SEEDS)
    yield _epoch(replace(case, name="head-alone"), settings, ranks, SEEDS[:1])


def _epoch(case: Case, settings: Settings, ranks: Ranks, seeds: tuple[int, ...]) -> dict[str, Any]:
    num_test = case.num_images * NUM_TEST // NUM_TRAIN
    width = build_encoder(case.encoder).feature_dim
    random = np.random.default_rng(0)
    sizes = (case.num_images, num_test, num_test)
    features = [functional.normalize(torch.from_numpy(random.standard_normal((n, width))), dim=1) for n in sizes]
    labels = [random.integers(0, NUM_CLASSES, n) for n in sizes]
    # The published loaders: one for training and two for the evaluations.
    loaders = (published.feature_loader(x.numpy(), y, case.batch_size) for x, y in zip(features, labels, strict=True))
    train, clean, triggered = loaders
    net = published.NeuralNet(width, NUM_CLASSES).to(ranks.device)

    config = _config(seeds, case.batch_size)
    heads = HeadStack(width, NUM_CLASSES, seeds, config.hidden, config.dropout)
    context = Context(ranks, 0, LoaderConfig(), Path())
    data = (features[0].float().to(ranks.device)[None], torch.from_numpy(labels[0]).to(ranks.device))
    batches = FeatureBatches(config, data[1], context, lambda positions, counts: data[0][:, positions])
    step = GradientStep(ProbeObjective(heads, ranks), config.update, ranks, steps_per_epoch=1)
    net.load_state_dict(heads.extract(0).state_dict())
    optimizer = torch.optim.Adam(net.parameters(), lr=config.update.optimizer.lr)
    with torch.no_grad():  # without dropout, whose draws differ
        x, y = data[0][0, : case.batch_size], data[1][: case.batch_size]
        runner.show_equal(
            case.name,
            lambda: functional.cross_entropy(net.eval()(x), y).item(),
            lambda: functional.cross_entropy(heads.eval()(x)[0], y).item(),
        )
    heads.train()
    epochs = count()
    note = (
        f"an epoch of {case.num_images} features of width {width}; ours: {len(seeds)} head(s) at once, time per head; "
        f"published: two evaluations of {num_test} features after every epoch, ours after the last"
    )
    return runner.compare(
        case,
        lambda: published.head_epoch(net, optimizer, train, clean, triggered, ranks.device),
        lambda: train_epoch(step, batches.epoch(next(epochs))),
        settings,
        images=case.num_images * len(seeds),
        note=note,
        heads=len(seeds),
    )


def _config(seeds: tuple[int, ...], batch_size: int) -> Config:
    nowhere = DatasetConfig("")  # features come from memory
    config = Config({"noise": ""}, {"noise": TaskConfig(nowhere, nowhere, 0)}, seeds=seeds)
    return replace(config, update=replace(config.update, batch_size=batch_size))
