"""NAD (Li et al., ICLR 2021): neural attention distillation from a fine-tuned teacher.

    L = CE(f(x), y) + sum_l beta_l AT(F_l, F_l of the teacher),   AT: ops.attention.attention_loss, p = 2

The teacher is the suspect itself, fine-tuned on the same images, or a model folder. It is frozen, in eval mode.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_defend.bounds import at_least_one
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.tuning.options import TuningConfig
from dist_defend.methods.defend.tuning.plan import Tuned, tuning_plan
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.models.batch_statistics import repeated_statistics
from dist_defend.models.classifier import Classifier
from dist_defend.ops.attention import attention_loss


def _rates(lr: float, weight_decay: float, milestones: Sequence[int] = (), **other: Any) -> dict[str, Any]:
    schedule = "multistep" if milestones else "constant"
    usual = {"name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": weight_decay, "nesterov": bool(milestones)}
    return {**usual, "schedule": schedule, "milestones": tuple(milestones), **other}


def _official() -> OptimizerConfig:
    """SGD with learning rate 0.1, from the third epoch on 0.01, from the 21st on 1e-4."""
    return OptimizerConfig(**_rates(0.1, 1e-4, (2, 20, 20)))


@dataclass(frozen=True, kw_only=True)
class Config(TuningConfig):
    """Defaults are bboylyg/NAD's. The teacher is made as the paper says; the repository has no code for it.

    Keys:
        teacher: model folder of the teacher; null: the suspect, fine-tuned first on the same images
        teacher_epochs: epochs of the teacher's fine-tuning
        teacher_optimizer: optimizer of the teacher's fine-tuning
        layers: names of the modules whose outputs are compared; empty: the last blocks, as many as ``betas``
        betas: weights of the layers' attention losses
        repeat_statistics: update running statistics as often as BackdoorBench, which runs the student once for its
            logits, once for each layer and once for the pooled map (whose attention loss is always 0)
    """

    teacher: str | None = None
    teacher_epochs: int = 10
    teacher_optimizer: OptimizerConfig = field(default_factory=_official)
    layers: tuple[str, ...] = ()
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    repeat_statistics: bool = False
    batch_size: int = 64
    epochs: int = 20
    optimizer: OptimizerConfig = field(default_factory=_official)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "teacher_epochs")
        if not self.betas or min(self.betas) < 0 or (self.layers and len(self.layers) != len(self.betas)):
            raise ValueError(f"key 'betas' is {list(self.betas)}; give each of the layers a number, 0 or more")


PRESETS: dict[str, dict[str, Any]] = {
    "official": {},
    "backdoorbench": {  # for PreActResNet-18; it compares one constant map of other networks, so it only fine-tunes
        "layers": ["layer3", "layer4"],
        "betas": [500, 1000],
        "repeat_statistics": True,
        "batch_size": 256,
        "epochs": 10,
        "optimizer": _rates(0.01, 5e-4),
        "teacher_optimizer": _rates(0.01, 5e-4, schedule="cosine_epochs", period=100),
    },
}


def attention_layers(net: nn.Module, config: Config) -> list[str]:
    """Names of the compared modules. UserError for unknown names, and for a network whose blocks are not recognised."""
    names = dict(net.named_modules())
    if config.layers:
        for name in config.layers:
            if name not in names:
                raise UserError(f"key 'nad.layers' names '{name}', which the network lacks: choose modules of its own")
        return list(config.layers)
    blocks = [name for name, _ in net.named_children() if name.rstrip("0123456789") in ("block", "layer", "stages")]
    if len(blocks) < len(config.betas):
        told = ", ".join(name for name, _ in net.named_children())
        raise UserError(f"key 'nad.layers': the network's blocks cannot be told; name {len(config.betas)} of ({told})")
    return blocks[-len(config.betas) :]


class Taps:
    """The outputs (B, C, H, W) of the named modules of a network in its last forward pass."""

    def __init__(self, net: nn.Module, names: Sequence[str]) -> None:
        self.maps: dict[str, Tensor] = {}
        for name in names:
            net.get_submodule(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.ndim != 4:
                raise UserError(f"key 'nad.layers' names '{name}', whose output {tuple(output.shape)} is no map")
            self.maps[name] = output

        return hook


class AttentionStep(TuningStep):
    """Cross-entropy plus attention losses; the teacher runs without gradients."""

    def __init__(self, config: Config, model: Classifier, teacher: Classifier, **options: Any) -> None:
        self.config, self.teacher = config, teacher
        self.names = attention_layers(model.net, config)
        self.student_maps, self.teacher_maps = (Taps(one.net, self.names).maps for one in (model, teacher))
        super().__init__(model, config.optimizer, epochs=config.epochs, **options)

    def loss(self, images: Tensor, labels: Tensor, weight: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            self.teacher.eval()(images)
        with self._statistics():
            scalars = super().loss(images, labels, weight)
        told = {"cross_entropy": scalars["loss"]}
        for number, name in enumerate(self.names, start=1):
            own, wanted = self.student_maps.pop(name), self.teacher_maps.pop(name)
            told[f"attention{number}"] = attention_loss(own, wanted) * len(labels) * weight
        terms = zip(self.config.betas, list(told.values())[1:], strict=True)
        return {"loss": told["cross_entropy"] + sum(beta * term for beta, term in terms), **told}

    def _statistics(self) -> ExitStack:
        stack = ExitStack()
        if self.config.repeat_statistics:
            times = len(self.names) + 2
            for name, child in self.model.net.named_children():  # type: ignore[union-attr]
                stack.enter_context(repeated_statistics(child, times - (name == self.names[-1])))
        return stack

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.teacher.load_state_dict(state["teacher"])


def build(config: Config, context: Context) -> Plan:
    """The student's stage; before it the teacher's, unless ``teacher`` names a model folder."""

    def make(tuned: Tuned) -> tuple[Sequence[Stage], TuningStep]:
        if config.teacher is not None:
            teacher = context.load_classifier(config.teacher)[0].to(context.ranks.device, context.ranks.dtype)
            return (), AttentionStep(config, tuned.model, teacher, **tuned.options)
        teacher = copy.deepcopy(tuned.model)
        first = TuningStep(teacher, config.teacher_optimizer, epochs=config.teacher_epochs, **tuned.options)
        stage = Stage("teacher", tuned.loader, first, config.teacher_epochs, shown=("loss",))
        return (stage,), AttentionStep(config, tuned.model, teacher, **tuned.options)

    return tuning_plan(config, context, make, ("loss", "cross_entropy"))
