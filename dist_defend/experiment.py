"""An experiment from its configuration to its result.json."""

import contextlib
import json
import logging
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from dist_defend.config import Experiment, dump
from dist_defend.counts import Count, told
from dist_defend.engine import dist, signals, tracking
from dist_defend.engine.clock import WorkClock
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.identity import Identity, digests_of
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import check_strategy, plain_weights
from dist_defend.engine.trainer import Trainer
from dist_defend.errors import UserError
from dist_defend.methods import find_method
from dist_defend.terminal import hold_log, release_log

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A run that is done: its folder, and what its result.json says."""

    folder: Path
    result: dict[str, Any]


@signals.stoppable()
def run(experiment: Experiment, dry_run: bool = False) -> Finished | None:
    """Build everything, train from wherever the run folder left off, evaluate, write result.json; what came out.

    A finished run is not done again, but read. dry_run, which gives None, builds data, models and steps, reads the
    checkpoint that a run would go on from, tells what they are, and runs and writes nothing: it refuses what a run
    refuses before its first step.
    Raises UserError for bad input, Stopped after a signal, NonFiniteError for a diverged run.
    """
    folder = Path(experiment.output)
    trackers = experiment.trainer.trackers
    ranks = dist.start(experiment.precision, experiment.world_size, trackers, folder)
    log_to_terminal(ranks.is_main)
    run_folder = RunFolder(folder, ranks.is_main)
    run_folder.check(experiment.resolved())
    section = experiment.resolved()[experiment.method]
    inputs = _on_main(ranks, lambda: digests_of(section, experiment.method))
    if run_folder.is_finished:
        found = _on_main(ranks, lambda: run_folder.read_result(inputs))
        if not dry_run:
            release_log()
            log.info("%s is finished; delete the folder to run it again", folder)
            return Finished(folder, found)
    identity = Identity(inputs, ranks.world_size, clock=WorkClock(ranks.device))
    context = Context(ranks, experiment.seed, experiment.loader, folder, experiment.method, clock=identity.clock)
    torch.manual_seed(experiment.seed)  # what networks draw themselves: initial weights, dropout
    plan: Plan = find_method(experiment.method).build(experiment.options, context)
    check_strategy({stage.name: stage.step for stage in plan.stages}, ranks.sharding.strategy)
    trainer = Trainer(ranks, run_folder, experiment.trainer, identity)
    if dry_run:
        _on_main(ranks, run_folder.check_free)
        if not run_folder.is_finished:
            trainer.resume(plan.stages, is_dry=True)
        release_log()
        _describe(experiment, plan, context)
        return None
    try:
        _on_main(ranks, lambda: run_folder.open(experiment.resolved(), dump(experiment)))
        if trackers:
            tracking.start(ranks.accelerator, folder, {**experiment.resolved(), "config_sha256": experiment.digest()})
        trainer.fit(plan.stages, context.at_start)
        with contextlib.ExitStack() as stack:
            for stage in plan.stages:
                stack.enter_context(plain_weights(stage.step))
            entries = plan.result()
        tracking.finish(ranks.accelerator, entries, trainer.position.step)
        result = provenance(experiment.method, experiment.digest(), context, identity) | entries
        run_folder.finish(result)
        ranks.accelerator.wait_for_everyone()
        ranks.accelerator.end_training()  # leaves the process group
        log.info("finished %s in %.0f s", folder, identity.lives[-1].wall_seconds)
        if outcome := _outcome(entries):
            log.info("%s", outcome)
        return Finished(folder, json.loads(json.dumps(result)))  # as it is read
    except (signals.Stopped, KeyboardInterrupt) as stop:
        run_folder.note_end("stopped", str(stop))
        raise
    except Exception as error:
        run_folder.note_end("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        run_folder.close()


def _on_main(ranks: dist.Ranks, act: Callable[[], T]) -> T:
    """What the main rank's act gives, on every rank; what speaks against it is raised on all, so that none waits."""
    done: list[Any] = [None, None]
    if ranks.is_main:
        try:
            done[0] = act()
        except UserError as error:
            done[1] = error
    if ranks.world_size > 1:
        torch.distributed.broadcast_object_list(done)
    if done[1] is not None:
        raise done[1]
    result: T = done[0]
    return result


def provenance(method: str, config_sha256: str, context: Context, identity: Identity) -> dict[str, Any]:
    """What result.json says of where its numbers come from. Seconds are those of all the run's lives."""
    ranks, lives = context.ranks, identity.lives
    return {
        "name": context.folder.name,
        "method": method,
        "config_sha256": config_sha256,
        "code_version": identity.version,
        "seed": context.seed,
        "data": context.digests,
        "inputs": identity.inputs,
        **({"notes": context.notes} if context.notes else {}),
        "wall_seconds": sum(life.wall_seconds for life in lives),
        "device_seconds": sum(life.wall_seconds * life.world_size for life in lives),
        "work_seconds": identity.work_seconds,
        "lives": [asdict(life) for life in lives],
        "peak_memory_bytes": _peak_memory(),
        "world_size": ranks.world_size,
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu",
    }


def log_to_terminal(is_main: bool) -> None:
    """The log goes to standard error, once the input has been found to be good (see terminal)."""
    hold_log(logging.INFO if is_main else logging.ERROR)


def _outcome(entries: dict[str, Any]) -> str:
    """What the run has counted, in a line: of a defence before and after, of many rows where they are found."""
    rows, metrics = [row for row in entries.get("rows", []) if "acc" in row], entries.get("metrics", {})
    before = {name: metrics[f"{name}_before"] for name in ("acc", "asr") if f"{name}_before" in metrics}
    if len(rows) > 1 and not before:
        return f"{len(rows)} rows: dist-defend report shows them"
    if not rows:
        return ""
    counts = {name: Count(**rows[0][name]) for name in ("acc", "asr")}
    return f"{rows[0]['kind']} on {rows[0]['task']}: {told(counts, before)}"


def _describe(experiment: Experiment, plan: Plan, context: Context) -> None:
    if not context.ranks.is_main:
        return
    print(f"{experiment.method} -> {experiment.output}: {context.ranks.world_size} rank(s) on {context.ranks.device}")
    for stage in plan.stages:
        steps = stage.epochs * stage.loader.num_batches
        print(f"  stage {stage.name}: {stage.epochs} epochs x {stage.loader.num_batches} batches = {steps} steps")
    for role, digest in context.digests.items():
        print(f"  data {role}: sha256 {digest[:16]}")


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
