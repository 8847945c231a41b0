"""A step: one batch in, one update done, device scalars out."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dist_defend.batch import Batch
from dist_defend.engine.dist import Ranks
from dist_defend.engine.grad_cache import is_cached, micro_batches
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import UpdateConfig, lr_factor
from dist_defend.engine.recompute import recompute_activations
from dist_defend.engine.strategy import make_strategy
from dist_defend.errors import UserError
from dist_defend.models.blocks import repeated_blocks


@dataclass(frozen=True)
class Position:
    """Where a run stands. Batches are global batches, so it means the same on any number of ranks."""

    stage: int = 0
    epoch: int = 0  # of the stage
    batch: int = 0  # of the epoch
    step: int = 0  # over all stages

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if value < 0:
                raise ValueError(f"key '{key}' is {value}; it cannot be negative")

    def done(self, num_batches: int) -> int:
        """Batches of the stage that are done, with so many in each epoch."""
        return self.epoch * num_batches + self.batch


class Step(Protocol):
    """What Trainer.fit drives. It holds the model that it trains, never waits for the device, and counts nothing."""

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        """Update with this rank's share of the global batch at this position.

        Returns scalars, means over this rank's share.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next call depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        ...


class GradientStep:
    """First-order step: forward, backward, (clip,) update, on whatever strategy the launch asked for.

    accumulation splits this rank's share into so many micro-batches; the objective is then the mean of theirs, which
    for a contrastive loss means negatives from one micro-batch only, unless it is a cached CoupledObjective (see
    grad_cache.py). recompute keeps the inputs of repeated blocks instead of their activations; compile has
    torch.compile make each of them.
    A gradient that is not finite stops the run: before the update on a CPU; on a GPU the fused optimizer skips the
    update and the trainer raises when it next reads the scalars, so no step waits for the device; DeepSpeed's third
    stage raises after the update, which is then not saved.
    """

    def __init__(self, objective: Objective, options: UpdateConfig, ranks: Ranks, steps_per_epoch: int) -> None:
        self.objective, self.options = objective, options
        self.steps_per_epoch, self.total_steps = steps_per_epoch, steps_per_epoch * options.epochs
        layout = torch.channels_last if ranks.sharding.strategy == "ddp" else torch.contiguous_format  # flat shards
        objective.to(ranks.device, ranks.dtype, memory_format=layout)  # type: ignore[call-overload]
        if options.compile:
            for block in _blocks(objective, "compile"):
                block.compile()
        if options.recompute:
            recompute_activations(_blocks(objective, "recompute"))
        self.strategy = make_strategy(objective, options, ranks)

    def __call__(self, batch: Batch, at: Position) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = {}
        count, optimizer = self.options.accumulation, self.options.optimizer
        parts: list[Any] = split_batch(batch, count)
        whole: dict[str, Tensor] = {}
        if is_cached(self.objective):
            whole["loss"], parts = micro_batches(self.objective, self.strategy.forward, parts)
        for number, part in enumerate(parts):
            terms = self.strategy.forward_backward(part, is_last=number == count - 1)
            for key, value in terms.items():
                scalars[key] = scalars.get(key, 0) + value.detach() / count
        scalars.update(whole)
        self.objective.after_backward()
        factor = lr_factor(optimizer, at.done(self.steps_per_epoch), self.steps_per_epoch, self.total_steps)
        scalars.update(self.strategy.update(optimizer.lr * factor))
        return scalars

    def state_dict(self) -> dict[str, Any]:
        return self.strategy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strategy.load_state_dict(state)


def plain_weights(step: Step) -> AbstractContextManager[None]:
    """Within, whom the step trains is a plain model on every rank, to evaluate, hand on or save."""
    return step.strategy.plain() if isinstance(step, GradientStep) else nullcontext()


def check_strategy(steps: dict[str, Step], strategy: str) -> None:
    """UserError, before any work, for a step that needs all weights on every rank where the launch shards them.

    Only first-order steps are sharded. A step with is_rank_local trains what no other rank has, which is fine too.
    """
    for stage, step in steps.items():
        is_fine = strategy == "ddp" or isinstance(step, GradientStep) or getattr(step, "is_rank_local", False)
        if not is_fine:
            raise UserError(
                f"stage '{stage}' cannot run under {strategy}: {type(step).__name__} uses or edits the whole network "
                "on every rank, and its collectives do not gather shards; launch it with --strategy ddp"
            )


def _blocks(objective: Objective, key: str) -> list[nn.Module]:
    blocks = repeated_blocks(objective)
    if not blocks:
        raise UserError(f"key 'update.{key}' is true, but the network has no repeated blocks: leave it out")
    return blocks


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """A rank's share in so many micro-batches."""
    if parts == 1:
        return [batch]
    views = [view.chunk(parts) for view in batch.views]
    rest = zip(batch.labels.chunk(parts), batch.index.chunk(parts), strict=True)
    return [Batch(tuple(view[i] for view in views), *pair) for i, pair in enumerate(rest)]
