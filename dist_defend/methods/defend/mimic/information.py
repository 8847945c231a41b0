"""MIMIC's phase 1: how much each stage's output tells about the final feature, and the attention weights from it."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.bounds import not_negative, positive
from dist_defend.engine.context import Context, Place
from dist_defend.engine.objective import NonFiniteError, Objective
from dist_defend.engine.optim import OptimizerConfig, build_optimizer, load_optimizer
from dist_defend.engine.step import Position
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.models.encoder import SimCLR
from dist_defend.ops.collectives import all_reduce_sum
from dist_defend.ops.mutual_info import Club, Critic, DonskerVaradhan, InfoNCE
from dist_defend.ops.streams import Stream, draws
from dist_defend.ops.transfer import to_device

log = logging.getLogger(__name__)

_ESTIMATORS: dict[str, type[Critic]] = {"dv": DonskerVaradhan, "club": Club, "infonce": InfoNCE}
_LAYERS = 4


@dataclass(frozen=True)
class InformationConfig:
    """Defaults are the published ones, but for source (see docs/methods/mimic.md) and all_zero.

    Keys:
        source: network whose stages are measured; the published code measures the untrained student
        estimator: estimator of mutual information: dv: Donsker-Varadhan (MINE); club; infonce; fixed: no estimate,
            attention_weights are used as they are
        epochs: training epochs of the critics
        last_epochs: the estimate is the mean over so many last epochs
        batch_size: images of an update over all ranks
        hidden: width of the critics' hidden layers
        max_inputs: largest number of values that a critic gets from a stage; larger maps are average-pooled, at 32 px
            none is
        cache: where the stages' outputs are kept, memory or disk: images x values for each of a rank's critics
        lr: learning rate of the critics, by Adam
        weight_decay: weight decay of the critics
        scale: layer l's weight is attention_weights[l] + scale times its share of the information
        holdout: share of the images that critics are evaluated on and not trained on; 0, as published: the same images
            serve for both
        all_zero: if every estimate is 0: uniform: all stages get equal weights; fail: the run ends with an error
    """

    source: Literal["teacher", "student"] = "teacher"
    estimator: Literal["dv", "club", "infonce", "fixed"] = "dv"
    epochs: int = 200
    last_epochs: int = 10
    batch_size: int = 128
    hidden: int = 512
    max_inputs: int = 65536
    cache: Place = "memory"
    lr: float = 1e-3
    weight_decay: float = 1e-5
    scale: float = 10000.0
    holdout: float = 0.0
    all_zero: Literal["uniform", "fail"] = "uniform"

    def __post_init__(self) -> None:
        positive(self, "batch_size", "hidden", "max_inputs", "lr")
        not_negative(self, "weight_decay", "scale")
        if not 1 <= self.last_epochs <= self.epochs:
            raise ValueError(
                f"key 'last_epochs' is {self.last_epochs}; it must be between 1 and 'epochs' = {self.epochs}"
            )
        if not 0 <= self.holdout < 1:
            raise ValueError(f"key 'holdout' is {self.holdout}; it must be in [0, 1)")


class RowBatches:
    """Positions 0..n-1 in order, the last batch partial, the same on every rank, as ranks divide layers, not rows."""

    def __init__(self, n: int, batch_size: int, device: torch.device) -> None:
        self.rows = torch.arange(n, device=device).split(batch_size)
        self.num_batches = len(self.rows)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for rows in self.rows[start_batch:]:
            yield Batch((), rows, rows)


class CriticLoss(Objective):
    """What an update of one layer's critic minimises; batches are positions in the cache."""

    def __init__(self, layer: int, critic: Critic, information: "LayerInformation") -> None:
        super().__init__()
        self.layer, self.critic, self.information = layer, critic, information

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        at, (x, y) = self.information.at, self.information.pairs(self.layer, batch.index)
        return {"loss": self.critic.loss(x, y, self.information.permutation(self.layer, at.epoch, at.batch, len(y), 0))}


class LayerInformation:
    """One critic per stage, trained on cached activations; a Step whose batches are positions in the cache.

    The network is frozen and the images are not augmented, so its activations are computed once (the published code
    repeats the forward pass for every critic, epoch and batch). The critics are independent: rank r trains those of
    layers r, r + world size, ..., and keeps these layers' outputs only; it passes all images through the network by
    itself, which is less work than sending the maps. The checkpoint and the result hold all critics.
    """

    is_rank_local = True  # so it runs under strategies that shard first-order steps

    def __init__(
        self, config: InformationConfig, network: SimCLR, context: Context, dataset: Any, rows: np.ndarray
    ) -> None:
        self.config, self.network, self.context, self.seed = config, network, context, context.seed
        self.loader = context.whole_loader(dataset, rows)
        context.check_order(dataset, rows, config.batch_size)
        held = int(len(rows) * config.holdout)
        self.train_rows, self.test_rows = len(rows) - held, held or len(rows)
        self.test_start = len(rows) - self.test_rows
        ranks = context.ranks
        self.own = list(range(ranks.rank, _LAYERS, ranks.world_size))
        self.at = Position()  # of the present call, which the critics' draws depend on
        self.history: dict[int, list[float]] = {}  # epoch -> estimate per layer, of all ranks
        height, width = (dataset.image_shape or 2 * (network.image_size,))[:2]
        self.widths, self.feature_dim = self._measure(height, width)
        if len(self.widths) != _LAYERS:
            raise UserError(f"MIMIC needs an encoder with {_LAYERS} stages; {network.arch} has {len(self.widths)}")

    def _measure(self, height: int, width: int) -> tuple[list[int], int]:
        """Number of values that each stage's critic gets from an image, and the length of the final feature."""
        ranks = self.context.ranks
        was_training = self.network.training
        self.network.eval()
        with torch.no_grad():
            maps, feature, _ = self.network.layers(
                torch.zeros(1, 3, height, width, device=ranks.device, dtype=ranks.dtype)
            )
        self.network.train(was_training)
        return [bounded(m, self.config.max_inputs).numel() for m in maps], feature.shape[1]

    @cached_property
    def critics(self) -> dict[int, Critic]:
        """Critics of this rank, by layer; their initial weights do not depend on the number of ranks."""
        kind, made = _ESTIMATORS[self.config.estimator], {}
        for layer in self.own:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + layer)
                critic = kind(self.widths[layer], self.feature_dim, self.config.hidden)
            made[layer] = critic.to(self.context.ranks.device, self.context.ranks.dtype)
        return made

    @cached_property
    def optimizers(self) -> dict[int, torch.optim.Optimizer]:
        """Optimizers of this rank's critics, by layer."""
        config = OptimizerConfig("adam", lr=self.config.lr, weight_decay=self.config.weight_decay)
        return {layer: build_optimizer(critic.parameters(), config) for layer, critic in self.critics.items()}

    @cached_property
    def objectives(self) -> dict[int, CriticLoss]:
        """Losses of this rank's critics, by layer; updated one after the other."""
        return {layer: CriticLoss(layer, critic, self) for layer, critic in self.critics.items()}

    def stage(self, finish: Callable[[], None]) -> Stage:
        """The stage that trains the critics; finish() may then read weights()."""
        batches = RowBatches(self.train_rows, self.config.batch_size, self.context.ranks.device)

        def done() -> None:
            finish()
            self.own = []
            for name in ("activations", "critics", "optimizers", "objectives"):  # gigabytes
                self.__dict__.pop(name, None)

        epochs, shown = self.config.epochs, ("critic_loss",)
        return Stage("information", batches, self, epochs, self.evaluate, finish=done, shown=shown)

    @cached_property
    @torch.no_grad()
    def activations(self) -> tuple[dict[int, Tensor], Tensor]:
        """Outputs (N, C H W) of this rank's layers and normalised final features (N, D), of one pass over images."""
        total, place = self.loader.num_samples, self.config.cache
        outputs = {layer: self.context.room((total, self.widths[layer]), place) for layer in self.own}
        features = self.context.room((total, self.feature_dim), "memory")
        was_training, done = self.network.training, 0
        self.network.eval()
        for batch in self.loader.epoch(0) if self.own else ():
            maps, feature, _ = self.network.layers(batch.images.to(self.context.ranks.device, features.dtype))
            rows = slice(done, done + len(feature))
            features[rows] = feature
            for layer, room in outputs.items():
                room[rows] = bounded(maps[layer], self.config.max_inputs).flatten(1).to(room.device)
            done += len(feature)
        self.network.train(was_training)
        return outputs, features

    def pairs(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """A stage's outputs (B, C H W) and the final features (B, D) at these positions of the cache."""
        outputs, features = self.activations
        return outputs[layer][index.to(outputs[layer].device)].to(features.device), features[index]

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Update each of this rank's critics. Returns the sum of all ranks' losses. Raises NonFiniteError on a CPU."""
        self.at = at
        total = torch.zeros((), dtype=self.context.ranks.dtype, device=self.context.ranks.device)
        for layer, objective in self.objectives.items():
            loss = objective(batch)["loss"]
            loss.backward()
            self.optimizers[layer].step()
            self.optimizers[layer].zero_grad()
            total = total + loss.detach()
        if total.device.type == "cpu" and not torch.isfinite(total):
            raise NonFiniteError("an information estimate diverged")
        scaled = total * self.context.ranks.world_size  # the trainer logs the mean over ranks
        return {"critic_loss": scaled, "nonfinite": (~torch.isfinite(total)).float()}

    @torch.no_grad()
    def evaluate(self, epoch: int) -> dict[str, float]:
        """Estimates after an epoch, for the last epochs only: mean over batches, NaN and negative ones as 0."""
        if epoch <= self.config.epochs - self.config.last_epochs:
            return {}
        device = self.context.ranks.device
        rows = torch.arange(self.test_start, self.test_start + self.test_rows, device=device)
        estimates = torch.zeros(_LAYERS, dtype=torch.float64, device=device)
        for layer, critic in self.critics.items():
            values = []
            for number, index in enumerate(rows.split(self.config.batch_size)):
                permutation = self.permutation(layer, epoch, number, len(index), 1)
                values.append(critic.bound(*self.pairs(layer, index), permutation))
            estimates[layer] = torch.stack(values).nan_to_num(0.0).clamp(min=0).mean()
        self.history[epoch] = all_reduce_sum(estimates).tolist()
        return {f"layer{number + 1}": value for number, value in enumerate(self.history[epoch])}

    def estimates(self) -> Tensor:
        """Mutual information per layer in nats (4,), float64: mean over the last epochs, the same on every rank."""
        rows = torch.tensor(list(self.history.values()), dtype=torch.float64, device=self.context.ranks.device)
        return rows.mean(0)

    def weights(self) -> Tensor:
        """scale * share of each layer (4,), float64; scale / 4 each if all are 0 (or UserError, by all_zero)."""
        return layer_weights(self.estimates(), self.config)

    def permutation(self, layer: int, epoch: int, number: int, length: int, phase: int) -> Tensor:
        """A permutation (length,) int64 for batch ``number`` of an epoch. phase: 0 to train a critic, 1 to evaluate."""
        order = draws(self.seed, Stream.CRITICS, layer, epoch, number, phase).permutation(length)
        return to_device(torch.from_numpy(order), self.context.ranks.device)

    def state_dict(self) -> dict[str, Any]:
        own = {
            str(layer): {"critic": self.critics[layer].state_dict(), "optimizer": self.optimizers[layer].state_dict()}
            for layer in self.own
        }
        if self.context.ranks.world_size > 1:
            gathered: list[Any] = [None] * self.context.ranks.world_size
            torch.distributed.all_gather_object(gathered, own)
            own = {layer: state for part in gathered for layer, state in part.items()}
        return {"history": dict(self.history), "layers": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = dict(state["history"])
        for layer in self.own:
            saved = state["layers"][str(layer)]
            self.critics[layer].load_state_dict(saved["critic"])
            load_optimizer(self.optimizers[layer], saved["optimizer"])


def bounded(maps: Tensor, max_inputs: int) -> Tensor:
    """Maps (B, C, H, W), averaged over a coarser square grid if an image has more than max_inputs values."""
    if maps[0].numel() <= max_inputs:
        return maps
    return functional.adaptive_avg_pool2d(maps, max(1, math.isqrt(max_inputs // maps.shape[1])))


def layer_weights(estimates: Tensor, config: InformationConfig) -> Tensor:
    """scale * estimates / sum(estimates), (4,) float64.

    The published code divides by a sum that may be 0 and then trains on NaN. With all_zero "uniform" the layers share
    the scale equally, with a warning; with "fail" this raises UserError.
    """
    if estimates.sum() == 0:
        if config.all_zero == "fail":
            raise UserError(
                "every information estimate is 0; raise 'mimic.information.epochs' or set all_zero: uniform"
            )
        log.warning("every information estimate is 0: the layers get equal weights")
        return torch.full_like(estimates, config.scale / _LAYERS)
    return config.scale * estimates / estimates.sum()
