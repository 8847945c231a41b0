"""The networks that are re-tuned: classifiers, or encoders with heads that are trained first; and their step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.engine.context import Context
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods.defend.tuning.step import TuningStep
from dist_defend.methods.measure import probe
from dist_defend.methods.measure.reactivate.options import Config
from dist_defend.models.artifact import ModelCard, read_card
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.models.fit import check_image_size
from dist_defend.models.heads import HeadedEncoder, MLPHead
from dist_defend.trial import Trial


class ReactivationStep(TuningStep):
    """Fine-tuning in train or eval mode, as configured. start: called before the stage's first update."""

    def __init__(self, config: Config, model: nn.Module, start: Callable[[], object], **options: Any) -> None:
        self.in_train_mode, self.start = config.train_mode, start
        super().__init__(model, config.optimizer, epochs=config.epochs, graph=config.graph, **options)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        if not at.done(self.steps_per_epoch):
            self.start()
        return super().__call__(batch, at)


def opened(folder: str, config: Config, context: Context) -> tuple[Classifier | SimCLR, ModelCard]:
    """The model on the ranks' device, and its card. UserError where images or classes do not fit it."""
    parts = {"train": config.data, "test": config.test}
    if read_card(folder).kind == "classifier":
        trial = Trial(folder, context)
        for role, part in parts.items():
            trial.dataset(role, part)
        return trial.model, trial.card
    encoder, card, _ = context.load_encoder(folder)
    for role, part in parts.items():
        check_image_size(encoder, folder, context.dataset(role, part, is_labelled=True)[0].image_shape, part.path)
    return encoder.to(context.ranks.device, context.ranks.dtype), card


def normalization_of(model: Classifier | SimCLR) -> nn.Module:
    """A copy of the first layer, which normalises images (B, 3, H, W) in [0, 1]."""
    return copy.deepcopy((model.f if isinstance(model, SimCLR) else model).normalize)


def with_heads(
    models: dict[str, Classifier | SimCLR], config: Config, context: Context, data: probe.LabelledRows
) -> tuple[dict[str, nn.Module], Callable[[str, nn.Module], None], Sequence[Stage], dict[str, str]]:
    """Networks by role; start(role, network), which loads a trained head; the heads' stages; result.json's entries."""
    encoders = {role: model.f for role, model in models.items() if isinstance(model, SimCLR)}
    if len({getattr(encoders.get(role), "feature_dim", None) for role in models}) > 1:
        raise UserError(f"key 'reactivate.control': {config.control} is another kind of model than {config.model}")
    if not encoders:
        if config.head is not None:
            raise UserError(f"key 'reactivate.head' is of encoders, but {config.model} has its own: leave it out")
        return {**models}, lambda role, network: None, (), {}
    how = config.head or probe.HeadConfig()
    task = {"head": probe.TaskConfig(config.data, config.test, 0)}
    options = probe.Config(dict.fromkeys(models, ""), task, seeds=(context.seed,), **vars(how))
    heads = probe.TrainedHeads("head", options, [*encoders.values()], context, data, "reactivate.head")

    def start(role: str, network: nn.Module) -> None:
        number, stacked = [*encoders].index(role), heads.stack.state_dict()
        own = {name.replace("_", "."): value[number] for name, value in stacked.items()}
        network.get_submodule("head").load_state_dict(own)  # without a draw: a resume calls it again

    networks: dict[str, nn.Module] = {}
    for role, encoder in encoders.items():
        fresh = MLPHead(encoder.feature_dim, data[0].num_classes, how.hidden, dropout=0.0)
        networks[role] = HeadedEncoder(encoder, fresh).to(context.ranks.device, context.ranks.dtype)
    return networks, start, heads.stages, {"head": options.head}
