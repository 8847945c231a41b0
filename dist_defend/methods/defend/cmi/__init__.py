"""CMI, contrastive model inversion (Fang et al. 2021), with ABD's defences (Hong et al., ICML 2023).

Distillation without data. In each epoch a batch of images is synthesised that fits the teacher's batch-norm statistics
and given classes, that is unlike earlier images, and on which student and teacher disagree. The student then distils on
all images so far.
"""

from functools import partial
from typing import Any

from dist_defend.engine.context import Context, Plan
from dist_defend.engine.step import Step
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.abd.epochs import Later, check_selection
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.abd.retrospective_step import RetrospectiveStep
from dist_defend.methods.defend.abd.vaccine import Vaccine
from dist_defend.methods.defend.cmi.options import PRESETS, Config
from dist_defend.methods.defend.cmi.steps import CmiBatches, CmiStep, PoolObjective
from dist_defend.methods.defend.cmi.synthesis import Synthesis
from dist_defend.methods.pictures import save_grid
from dist_defend.ops.losses import distillation

_PICTURED = 64  # images of generated.png

__all__ = ["PRESETS", "Config", "build"]


def build(config: Config, context: Context) -> Plan:
    """One stage, and a second one if there is retrospection; both use the same image pool and memory bank."""
    pair = Pair(config.teacher, config.student, config.test, config.attack, context, config.retrospection is not None)
    pair.check_augment(config.augment)
    _check_shares(config, context)
    vaccine = None if config.vaccine is None else Vaccine(pair.teacher.net, config.vaccine, context.seed)
    epochs, steps, batch_size = config.update.epochs, config.distillation_steps, config.update.batch_size
    synthesis = Synthesis(config.synthesis, pair, epochs * config.synthesis.batch_size, vaccine)
    batches = CmiBatches(config, pair.num_classes, context.seed, context.ranks)
    first = epochs if config.retrospection is None else config.retrospection.start

    check_selection(config.vaccine, first * config.synthesis.iterations)

    def stage(name: str, update: Step, start: int, end: int) -> Stage:
        step = CmiStep(batches, synthesis, update, pair, start)
        return Stage(name, Later(batches, start), step, end - start, pair.evaluate, config.evaluate_every)

    objective = PoolObjective(pair, config.temperature)
    stages = [stage("cmi", context.gradient_step(objective, config.update, steps), 0, first)]
    late: RetrospectiveStep | None = None
    if config.retrospection is not None:
        share = partial(distillation, temperature=config.temperature, convention="batchmean", batch_size=batch_size)
        late = RetrospectiveStep(
            pair,
            config.retrospection,
            config.update.optimizer,
            share,
            share,
            batch_size=batch_size,
            steps_per_epoch=steps,
            epochs=epochs - first,
            graph=config.graph,
        )
        stages.append(stage("retrospection", late, first, epochs))

    pair.trial.look()

    def result() -> dict[str, Any]:
        if context.ranks.is_main:
            latest = synthesis.pool.images[: synthesis.pool.count][-_PICTURED:]
            save_grid(context.folder / "generated.png", latest.permute(0, 3, 1, 2) / 255)
        metrics = {"synthesised_images": synthesis.pool.count}
        return pair.result(metrics, vaccine, late)

    return Plan(stages, result)


def _check_shares(config: Config, context: Context) -> None:
    world_size = context.ranks.world_size
    for key, size in (
        ("synthesis.batch_size", config.synthesis.batch_size),
        ("update.batch_size", config.update.batch_size),
    ):
        if size % world_size:
            raise UserError(f"key 'cmi.{key}' is {size}, not divisible by {world_size} ranks; choose a multiple")
