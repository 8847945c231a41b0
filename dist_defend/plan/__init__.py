"""``dist-defend plan``: memory of each rank and work of each update, worked out before anything is started.

A method is built as for a run, but of tensors without content (torch's FakeTensorMode), in a world of N ranks that do
not exist (its fake process group), and one rank's update is run there. What is alive at the peak is measured, not
estimated; times are not known.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from dist_defend.arguments import add_experiment
from dist_defend.engine.dist import Ranks
from dist_defend.engine.sharding import STRATEGIES, StrategyName, check_optimizer, check_precision
from dist_defend.engine.step import GradientStep, split_batch
from dist_defend.engine.trainer import Stage
from dist_defend.errors import UserError
from dist_defend.methods import find_method
from dist_defend.plan.memory import SHARDED, LiveBytes, Memory, measure
from dist_defend.plan.pretended import PretendedAccelerator, PretendedContext, Unseen, pretended_world
from dist_defend.plugins import claims

__all__ = ["LiveBytes", "Memory", "add_arguments", "measure"]

METHODS = ("simclr", "badencoder", "drupe", "mimic", "ft_simclr", "nad_simclr", "classifier", "probe", "kd")
_SIMULATED = (
    "simulated: {ranks} ranks by a fake process group, tensors without content; nothing was allocated or sent. "
    "Not counted: the allocator's waste, communication buffers, the CUDA context, images that wait for their update."
)


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Memory of a rank in a stage. batch: items of one of its micro-batches; mapped: bytes of its files on disk."""

    name: str
    memory: Memory
    strategy: str
    accumulation: int
    batch: int
    mapped: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    add_experiment(parser)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Print the plan; 0. UserError for a method that has none, or a batch that the ranks cannot share."""
    from dist_defend.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    if experiment.method not in METHODS and not claims("methods", experiment.method):
        raise UserError(f"{args.config}: method {experiment.method} has no plan; these have: {', '.join(METHODS)}")
    if args.world_size < 1:
        raise UserError(
            f"--world-size is {args.world_size}: a batch is not divisible by {args.world_size}, name a rank"
        )
    plans, unseen = stage_plans(experiment, args.world_size, args.strategy)
    print("\n".join(render(plan, args.world_size) for plan in plans) or "nothing is trained: no stage")
    for data in unseen:
        told = f"{len(data)} images of {data.num_classes} classes, {data.size} px"
        print(f"{data.path} is not here: counted as {told}")
    print(_SIMULATED.format(ranks=args.world_size))
    return 0


def stage_plans(experiment: Any, world_size: int, strategy: StrategyName) -> tuple[list[StagePlan], list[Unseen]]:
    """What rank 0 needs in each stage of an experiment, and the data sets that were not found.

    UserError for a precision or an optimizer that the strategy does not have, as from a run.
    """
    check_precision(strategy, experiment.precision)
    accelerator: Any = PretendedAccelerator(world_size, experiment.precision in ("bf16", "fp16"))
    ranks = Ranks(accelerator, torch.float64 if experiment.precision == "fp64" else torch.float32)
    module = find_method(experiment.method)
    hints = get_type_hints(type(experiment.options))
    optional = {name for name in ("attack", "monitor") if type(None) in get_args(hints.get(name))}
    unneeded = dict.fromkeys(optional)  # changes images, or measures
    options = dataclasses.replace(experiment.options, **unneeded)
    with tempfile.TemporaryDirectory() as folder, pretended_world(world_size, ranks.dtype):
        context = PretendedContext(ranks, experiment.seed, experiment.loader, Path(folder), experiment.method)
        stages = module.build(options, context).stages
        trained = [stage.step.objective for stage in stages if isinstance(stage.step, GradientStep)]
        plans = [_stage_plan(stage, [*context.models, *trained], context, strategy) for stage in stages]
    return plans, list(context.unseen.values())


def _stage_plan(
    stage: Stage, networks: list[nn.Module], context: PretendedContext, strategy: StrategyName
) -> StagePlan:
    """networks: all that the run holds."""
    step: Any = stage.step
    context.mapped = 0
    with LiveBytes() as live:
        batch = next(iter(stage.loader.epoch(0)))
    in_batch = sum(t.untyped_storage().nbytes() for t in (*batch.views, batch.labels, batch.index))
    if isinstance(step, GradientStep):
        world_size, accumulation = context.ranks.world_size, step.options.accumulation
        if world_size > 1:
            check_optimizer(strategy, step.options.optimizer.name)
        objectives, optimizer = [step.objective], step.options.optimizer.name
    elif not hasattr(step, "objectives"):
        raise UserError(f"stage {stage.name} has no plan: its step is none of context.gradient_step")
    else:  # trained by each rank for itself, one after the other
        world_size, accumulation, strategy = 1, 1, "ddp"
        objectives, optimizer = list(step.objectives.values()), "adam"
    part = split_batch(batch, accumulation)[0]
    found = [measure(objective, part, optimizer, world_size, strategy, accumulation) for objective in objectives]
    own = {id(t) for objective in objectives for t in objective.parameters()}
    others = {id(t): t.nbytes for network in networks for t in network.parameters() if id(t) not in own}
    memory = Memory(
        parameters=sum(memory.parameters for memory in found),
        frozen=sum(others.values()),
        gradients=max(memory.gradients for memory in found),
        optimizer=sum(memory.optimizer for memory in found),
        activations=in_batch + max(memory.activations for memory in found),
        caches=live.now - in_batch + sum(memory.caches for memory in found) - context.mapped,
        filling=max(live.peak - live.now, *(in_batch + memory.filling for memory in found)),
        flops=sum(memory.flops for memory in found),
    )
    return StagePlan(stage.name, memory, strategy, accumulation, len(part.index), context.mapped)


def render(plan: StagePlan, world_size: int) -> str:
    """The table that the command prints for a stage."""
    memory, shared = plan.memory, SHARDED[plan.strategy] if world_size > 1 else ()
    lines = [
        f"stage {plan.name}: {world_size} rank(s), {plan.strategy}, "
        f"{plan.accumulation} micro-batch(es) of {plan.batch} images on each"
    ]
    for key in ("parameters", "frozen", "gradients", "optimizer", "activations", "caches"):
        lines.append(_line(key, getattr(memory, key), "shared by the ranks" if key in shared else ""))
    lines.append(_line("sum", memory.total))
    if memory.caches or plan.mapped:
        lines.append(_line("filling", memory.filling, "while caches are filled, before gradients and optimizer"))
    if plan.mapped:
        lines.append(_line("on disk", plan.mapped, "caches, mapped into memory"))
    if "parameters" in shared:
        lines.append("  and the largest block, gathered whole while it runs")
    lines.append(f"  work per update: {memory.flops / 1e12:.4g} TFLOP on each rank")
    return "\n".join(lines)


def _line(key: str, count: int, note: str = "") -> str:
    return f"  {key:<12}{count / 2**20:12.1f} MiB  {note}".rstrip()
