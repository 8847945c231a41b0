"""MIMIC's distillation step on views in memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from dist_defend.batch import Batch
from dist_defend.bench import runner
from dist_defend.bench.published import mimic as published
from dist_defend.bench.runner import Case, Settings
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.defend.mimic import MimicObjective

OPTIMIZER = OptimizerConfig("adam", lr=1e-2, weight_decay=1e-6)
WEIGHTS = (1000.0, 1000.0, 1000.0, 1000.0)
LEAKED_HOOKS = 6401  # per stage, after the published phase 1 with its published epochs and images


def rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """mimic: a step; mimic-after-phase1: with the hooks that the published phase 1 leaves on the student."""
    ranks = runner.start()
    wanted = runner.cases(settings, "mimic", ("", "small_cifar", 128, 128), ("-resnet18", "resnet18_cifar", 32, 32))
    for case in wanted:
        yield _step(case, settings, ranks, hooks=0, note="a step, without loading and without leaked hooks")
        if case is wanted[0]:
            note = (
                f"a step of a student with the {LEAKED_HOOKS} forward hooks per stage that the published phase 1 leaks"
            )
            yield _step(replace(case, name="mimic-after-phase1"), settings, ranks, LEAKED_HOOKS, note)


def _step(case: Case, settings: Settings, ranks: Ranks, hooks: int, note: str) -> dict[str, Any]:
    student, ours = runner.twin_models(case.encoder, seed=0, device=ranks.device)
    teacher, our_teacher = runner.twin_models(case.encoder, seed=1, device=ranks.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)
    objective = MimicObjective(ours, our_teacher, 0.5, WEIGHTS, 1.0)
    step = GradientStep(objective, UpdateConfig(optimizer=OPTIMIZER), ranks, steps_per_epoch=1)
    views = [runner.to_pixels(runner.random_images(case.batch_size, seed), ranks.device) for seed in (0, 1)]
    batch = Batch(tuple(views), torch.zeros(case.batch_size).long(), torch.arange(case.batch_size))
    first, second = (runner.normalised(view) for view in views)
    teacher.eval()
    published.leak_hooks(student.get_submodule("f.f"), hooks)

    def baseline() -> float:
        return float(published.mimic_step(student, teacher, optimizer, first, second, WEIGHTS))

    def our_step() -> float:
        return step(batch, Position())["loss"].item()

    runner.show_equal(case.name, baseline, our_step)
    return runner.compare(case, baseline, our_step, settings, images=case.batch_size, note=note)
