"""Zero-shot knowledge transfer (Micaelli and Storkey, NeurIPS 2019), with ABD's defences (Hong et al., ICML 2023).

A generator makes images on which student and teacher disagree, and the student learns to agree there. No data needed.
"""

from typing import Any

import torch
from torch import Tensor

from dist_defend.engine.context import Context, Plan
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.abd.pair import Pair
from dist_defend.methods.defend.zskt.batches import LatentBatches
from dist_defend.methods.defend.zskt.options import PRESETS, Config
from dist_defend.methods.defend.zskt.step import TransferStep
from dist_defend.methods.pictures import save_grid
from dist_defend.models.generator import ZSKTGenerator
from dist_defend.models.wide_resnet import WideResNet
from dist_defend.ops.hypergrad import check_twice_differentiable

__all__ = ["PRESETS", "Config", "build"]

_PICTURED = 64  # images of generated.png


def build(config: Config, context: Context) -> Plan:
    """One stage whose epochs are pseudo-batches."""
    if config.batch_size % context.ranks.world_size:
        raise UserError(
            f"key 'zskt.batch_size' is {config.batch_size}, not divisible by {context.ranks.world_size} ranks; "
            "choose a multiple"
        )
    is_second_order = config.retrospection is not None
    pair = Pair(config.teacher, config.student, config.test, config.attack, context, is_second_order)
    teacher, student = pair.teacher.net, pair.student.net
    if config.attention and not (isinstance(teacher, WideResNet) and isinstance(student, WideResNet)):
        raise UserError(
            f"key 'zskt.attention' is {config.attention:g}, but attention transfer needs WideResNets, not "
            f"{pair.teacher.arch} and {pair.student.arch}: set it to 0"
        )
    pixels = pair.teacher.normalize if config.bounded else None
    generator = ZSKTGenerator(config.z_dim, pair.image_size, config.generator_width, config.grey, pixels)
    context.synchronise(generator)
    latents = LatentBatches(config.batch_size, config.z_dim, context.seed, context.ranks)
    step = TransferStep(teacher, student, generator, config, context.ranks, context.seed)
    if is_second_order:
        check_twice_differentiable(student, pair.image_size, f"the student {pair.student.arch}")
    pair.trial.look()

    def result() -> dict[str, Any]:
        z = LatentBatches(_PICTURED, config.z_dim, context.seed, context.ranks).draw(0)
        if context.ranks.is_main:
            save_grid(
                context.folder / "generated.png",
                _pixels(pair, generator, z.to(context.ranks.device, context.ranks.dtype)),
            )
        metrics = {"pseudo_batches": config.pseudo_batches}
        return pair.result(metrics, step.vaccine, step if is_second_order else None)

    stage = Stage("zskt", latents, step, config.pseudo_batches, pair.evaluate, config.evaluate_every)
    stage.shown = "student_loss", "generator_loss"
    return Plan([stage], result)


@torch.no_grad()
def _pixels(pair: Pair, generator: ZSKTGenerator, z: Tensor) -> Tensor:
    """Images of the generator, which are normalised, as pixels; not clipped to [0, 1]."""
    normalize = pair.teacher.normalize
    images: Tensor = generator.eval()(z)
    return images if normalize.is_identity else images * normalize.std + normalize.mean
