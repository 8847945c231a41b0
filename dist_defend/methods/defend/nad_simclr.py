"""NAD for encoders (after Li et al., ICLR 2021): attention distillation with SimCLR's loss in place of cross-entropy.

    L = NT-Xent(z, z') + sum_l beta_l AT(F_l(x), F_l of the teacher(x)),   x: the first view, l: the last stages

The teacher is the suspect, fine-tuned (ft_simclr). It is frozen, in eval mode. AT: ops.attention, p = 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective, at_least_float32
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.errors import UserError
from dist_defend.methods.defend.tuning.encoder import EncoderTuningConfig, encoder_plan
from dist_defend.models.encoder import SimCLR
from dist_defend.ops.attention import attention_loss
from dist_defend.ops.losses import nt_xent


@dataclass(frozen=True, kw_only=True)
class Config(EncoderTuningConfig):
    """Defaults are bboylyg/NAD's, with the learning rate of its epochs 3 to 20.

    Keys:
        teacher: model folder of the fine-tuned suspect
        betas: weights of the attention losses of the last stages, one number for each stage
    """

    teacher: str
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    update: UpdateConfig = UpdateConfig(
        batch_size=64, epochs=20, optimizer=OptimizerConfig("sgd", lr=0.01, weight_decay=1e-4, nesterov=True)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= len(self.betas) <= 4 or min(self.betas) < 0:
            raise ValueError(f"key 'betas' is {list(self.betas)}; give one to four stages a number, 0 or more")


class AttentionObjective(Objective):
    """loss = contrastive + sum_l beta_l AT_l of the last stages. batch.views: two of (B, 3, H, W)."""

    def __init__(self, student: SimCLR, teacher: SimCLR, temperature: float, betas: Sequence[float]) -> None:
        super().__init__()
        self.student, self.temperature, self.betas = student, temperature, betas
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list, so that DDP and checkpoints leave it out

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        maps, _, z1 = self.student.layers(first)
        _, z2 = self.student(second)
        with torch.no_grad():
            wanted, _, _ = self._teacher[0].layers(first)
        terms = {"contrastive": nt_xent(z1, z2, self.temperature)}
        loss, skipped = terms["contrastive"], len(maps) - len(self.betas)
        for number, beta in enumerate(self.betas, start=skipped):
            own, theirs = at_least_float32(maps[number]), at_least_float32(wanted[number])
            terms[f"attention{number + 1}"] = attention_loss(own, theirs)
            loss = loss + beta * terms[f"attention{number + 1}"]
        return {"loss": loss, **terms}


def build(config: Config, context: Context) -> Plan:
    """The stages of ft_simclr. UserError for a teacher of another architecture or image size."""

    def make(student: SimCLR) -> Objective:
        teacher, _, _ = context.load_encoder(config.teacher)
        own, wanted = ((m.arch, m.image_size, m.resize) for m in (teacher, student))
        if own != wanted:
            told = f"key 'nad_simclr.teacher' names a {own[0]} of {own[1]} px, but {config.model} is a {wanted[0]} of "
            raise UserError(f"{told}{wanted[1]} px: take the suspect, fine-tuned (ft_simclr)")
        teacher.to(context.ranks.device, context.ranks.dtype)
        return AttentionObjective(student, teacher, config.temperature, config.betas)

    return encoder_plan(config, context, make, ("loss", "contrastive"))
