"""MIMIC's whole phase 1: the information of four stages, with fewer epochs than the published 200."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_defend.bench import runner
from dist_defend.bench.published import mimic_mi as published
from dist_defend.bench.published.mimic import LAYERS
from dist_defend.bench.runner import Case, Settings
from dist_defend.data.loader import LoaderConfig
from dist_defend.engine.context import Context
from dist_defend.engine.dist import Ranks
from dist_defend.engine.step import Position
from dist_defend.methods.defend.mimic.information import InformationConfig, LayerInformation
from dist_defend.models.encoder import SimCLR
from dist_defend.ops.mutual_info import DonskerVaradhan

EPOCHS, LAST_EPOCHS = 4, 1


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """mimic-mi: phase 1 from images to weights, loading and the one pass that fills our cache included."""
    ranks = runner.start()
    wanted = runner.cases(
        settings, "mimic-mi", ("", "small_cifar", 128, 1000), ("-resnet18", "resnet18_cifar", 128, 128)
    )
    for case in wanted:
        with tempfile.TemporaryDirectory() as folder:
            yield _phase(case, settings, ranks, Path(folder))


def _phase(case: Case, settings: Settings, ranks: Ranks, folder: Path) -> dict[str, Any]:
    images = runner.random_images(case.num_images)
    theirs, ours = runner.twin_models(case.encoder, seed=0, device=ranks.device)
    batches = published.memory_loader(images, runner.MEAN, runner.STD, case.batch_size)
    context = Context(ranks, 0, LoaderConfig(workers=batches.num_workers), folder)
    dataset = runner.prepare(images, folder)
    config = InformationConfig("student", epochs=EPOCHS, last_epochs=LAST_EPOCHS, batch_size=case.batch_size)

    def ours_phase() -> torch.Tensor:
        information = LayerInformation(config, ours, context, dataset, np.arange(case.num_images))
        stage = information.stage(lambda: None)
        for epoch in range(stage.epochs):
            for number, batch in enumerate(stage.loader.epoch(epoch)):
                information(batch, Position(epoch=epoch, batch=number))
            information.evaluate(epoch + 1)
        return information.weights()

    def their_phase() -> np.ndarray:
        for stage in theirs.get_submodule("f.f").children():
            stage._forward_hooks.clear()  # each run starts with a student that has none
        estimates = published.estimate_information(theirs, batches, EPOCHS, LAST_EPOCHS)
        return np.asarray(published.attention_weights(estimates))

    _show_critics_equal(case, images, theirs, ours, ranks)
    note = (
        f"the whole phase, four stages, {case.num_images} images, {EPOCHS} epochs with the estimate of the last "
        f"{LAST_EPOCHS} (published: 2000 images, 200 epochs, the last 10)"
    )
    return runner.compare(case, their_phase, ours_phase, settings, images=case.num_images * EPOCHS, note=note)


def _show_critics_equal(case: Case, images: np.ndarray, theirs: SimCLR, ours: SimCLR, ranks: Ranks) -> None:
    """Give both critics of the last stage the same weights, images and permutation."""
    pixels = runner.to_pixels(images[: case.batch_size], ranks.device)
    permutation = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0)).to(ranks.device)
    tap = published.StageTap(theirs.eval(), LAYERS[-1], leaks=False)
    with torch.no_grad(), runner.without_tf32():
        x, y = tap(runner.normalised(pixels))
        maps, feature, _ = ours.eval().layers(pixels)
        ours_critic = DonskerVaradhan(x.shape[1], y.shape[1]).to(ranks.device)
        critic = published.TNet(x.shape[1] + y.shape[1]).to(ranks.device)
        state = zip(critic.state_dict(), ours_critic.state_dict().values(), strict=True)
        critic.load_state_dict(dict(state))
        for weight in (critic.get_parameter("layers.4.weight"), ours_critic.get_parameter("rest.3.weight")):
            weight.mul_(100)  # fresh critics hardly tell pairs apart
        runner.show_equal(
            case.name,
            lambda: published.donsker_varadhan(critic, x, y, permutation).item(),
            lambda: ours_critic.bound(maps[-1].flatten(1), feature, permutation).item(),
            limit=1e-3,
        )
