"""The only training loop of the project."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from signal import SIGINT
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from dist_defend.batch import Batch
from dist_defend.bounds import at_least_one, positive
from dist_defend.engine import checkpoint, signals
from dist_defend.engine.dist import Ranks, give_back_memory
from dist_defend.engine.identity import Identity
from dist_defend.engine.objective import NonFiniteError
from dist_defend.engine.resume import Saved, check_position, device_states, restore
from dist_defend.engine.run import RunFolder
from dist_defend.engine.step import Position, Step, plain_weights
from dist_defend.ops.transfer import to_device
from dist_defend.terminal import Progress, release_log

log = logging.getLogger(__name__)

_GO_ON, _SAVE, _STOP, _INTERRUPT = range(4)  # what a rank may wish at a step boundary


@dataclass(frozen=True)
class TrainerConfig:
    """How a run is logged and saved; nothing here changes what it computes.

    Keys:
        log_every: steps between two lines of metrics
        checkpoint_every: steps between two checkpoints; there is one at the end of each stage too
        checkpoint_seconds: seconds after which there is one all the same, unless saving would then take more than 1/20
            of the time
        keep_checkpoints: how many of the newest are kept
        trackers: any of Accelerate's, offline unless told otherwise
    """

    log_every: int = 10
    checkpoint_every: int = 500
    checkpoint_seconds: float = 20.0
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        at_least_one(self, "log_every", "checkpoint_every", "keep_checkpoints")
        positive(self, "checkpoint_seconds")


class BatchSource(Protocol):
    """What a stage reads: data.loader.Loader, or features in memory."""

    num_batches: int

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's shares of the epoch's global batches, from the start_batch-th on."""
        ...


@dataclass
class Stage:
    """A part of a method: at most so many epochs of one step over one loader.

    stop_when() is asked after each epoch, on every rank, and ends the stage early. evaluate(epoch) runs after every
    evaluate_every-th epoch and the last one and returns scalars to log. finish() runs once, when the last epoch is done
    and before the checkpoint that opens the next stage; it hands results on to later stages.
    A stage with is_kept stays in the checkpoints after it is done; the last one always does.
    shown: the scalars that a progress bar shows, its loss and what else the method is watched by.
    """

    name: str
    loader: BatchSource
    step: Step
    epochs: int
    evaluate: Callable[[int], dict[str, float]] | None = None
    evaluate_every: int = 1
    stop_when: Callable[[], bool] | None = None
    finish: Callable[[], None] | None = None
    is_kept: bool = False
    shown: tuple[str, ...] = ("loss",)


class Trainer:
    """Drives stages to their end, from wherever the newest whole checkpoint left off."""

    def __init__(self, ranks: Ranks, run: RunFolder, config: TrainerConfig, identity: Identity | None = None) -> None:
        """identity: what the run reads and how long it has lived; None: nothing but its configuration."""
        self.ranks, self.run, self.config = ranks, run, config
        self.identity = identity or Identity({}, ranks.world_size)
        self.position = Position()
        self.started = self.logged = self.saved = time.perf_counter()
        self.save_seconds = 0.0
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # steps that gave each scalar since the last line
        self.images = 0
        self.bar: Progress | None = None

    def fit(self, stages: Sequence[Stage], at_start: Sequence[Callable[[], None]] = ()) -> None:
        """Run every stage. Raises Stopped after a signal, NonFiniteError before a bad update is kept, SaveError.

        UserError for a checkpoint that is none of this run. at_start: called before the first step, not by a resume.
        """
        with signals.noted():
            self.run.open_metrics(self.resume(stages))
            release_log()  # no bad input can end the run any more
            if self.position == Position():
                for act in at_start:
                    act()
            try:
                for number in range(self.position.stage, len(stages)):
                    self._fit_stage(stages, number)
            finally:
                if self.bar is not None:  # what ends the run is told below it
                    self.bar.close()
            if signals.pending() is not None:  # since the last stage was saved
                raise self._stopped(signals.pending() == SIGINT)

    def _fit_stage(self, stages: Sequence[Stage], number: int) -> None:
        give_back_memory()
        stage, at, num_batches = stages[number], self.position, stages[number].loader.num_batches
        total, begun = stage.epochs * num_batches, at.done(num_batches)
        self.bar = Progress(stage.name, begun, total, stage.shown) if self.ranks.is_main else None
        is_over, is_first = at.epoch >= stage.epochs, True
        while not is_over:
            for batch in stage.loader.epoch(at.epoch, at.batch):
                try:
                    scalars = stage.step(self._move(batch), at)
                except NonFiniteError as error:
                    place = f"stage {stage.name}, step {at.step + 1}, rank {self.ranks.rank}"
                    raise NonFiniteError(f"{error}: {place}") from None
                if is_first:
                    give_back_memory()  # what lasts, such as an optimizer's state, is there now
                    is_first = False
                at = self.position = replace(at, batch=at.batch + 1, step=at.step + 1)
                self._add(scalars, len(batch.labels))
                if self.bar is not None:
                    self.bar.step()
                if at.step % self.config.log_every == 0:
                    self._log(stage)
                wish = self._agreed_wish()
                if wish != _GO_ON or at.step % self.config.checkpoint_every == 0:
                    self._save(stages)
                if wish >= _STOP:
                    raise self._stopped(wish == _INTERRUPT)
            at = self.position = replace(at, epoch=at.epoch + 1, batch=0)
            is_over = at.epoch == stage.epochs or (stage.stop_when is not None and stage.stop_when())
            is_due = is_over or at.epoch % stage.evaluate_every == 0
            if stage.evaluate is not None and is_due:
                with plain_weights(stage.step):
                    values = stage.evaluate(at.epoch)
                if values:
                    if self.bar is not None:
                        self.bar.show(values)
                    self._write(stage, {**values, "work_seconds": self.identity.work_seconds})
        self._log(stage)
        if self.bar is not None:
            self.bar.close()
        if stage.finish is not None:
            with plain_weights(stage.step):
                stage.finish()
        self.position = Position(stage=number + 1, step=at.step)
        self._save(stages)
        wish = self._agreed_wish(is_due=True)
        if wish >= _STOP:
            raise self._stopped(wish == _INTERRUPT)

    def _stopped(self, is_interrupt: bool) -> signals.Stopped:
        signals.agree()
        place = checkpoint.path_of(self.run.checkpoints, self.position.step)
        return signals.Stopped(
            f"signal received: saved step {self.position.step} to {place}; the same command goes on from there",
            is_interrupt,
        )

    def _move(self, batch: Batch) -> Batch:
        device, dtype = self.ranks.device, self.ranks.dtype
        views = (to_device(view, device, dtype if view.is_floating_point() else None) for view in batch.views)
        return Batch(tuple(views), to_device(batch.labels, device), to_device(batch.index, device))

    def _add(self, scalars: dict[str, Tensor], images: int) -> None:
        for key, value in scalars.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()
            self.counts[key] = self.counts.get(key, 0) + 1
        self.images += images

    def _log(self, stage: Stage) -> None:
        """Means over ranks and over the steps since the last line that gave the scalar.

        The one place where the host waits for the device.
        """
        if not self.counts:
            return
        names = sorted(self.sums)
        values = torch.stack([self.sums[name].double() / self.counts[name] for name in names])
        values = torch.cat([values, values.new_tensor([self.images])])
        if self.ranks.world_size > 1:
            torch.distributed.all_reduce(values)
            values[:-1] /= self.ranks.world_size
        *means, images = values.tolist()
        row = dict(zip(names, means, strict=True))
        now = time.perf_counter()
        if row.pop("nonfinite", 0) > 0:
            raise NonFiniteError(f"a gradient was not finite: stage {stage.name}, by step {self.position.step}")
        row["images_per_second"] = images / max(now - self.logged, 1e-9)
        self._write(stage, row, is_told=self.bar is None or not self.bar.show(row))
        self.sums, self.counts, self.images, self.logged = {}, {}, 0, now

    def _write(self, stage: Stage, scalars: dict[str, float], is_told: bool = True) -> None:
        """To metrics.jsonl, to the trackers and, if is_told, as a line of the log."""
        at = self.position
        head = {"step": at.step, "stage": stage.name, "epoch": at.epoch, "time": time.perf_counter() - self.started}
        self.run.write_metrics({**head, **scalars})
        self.ranks.accelerator.log({f"{stage.name}/{key}": value for key, value in scalars.items()}, step=at.step)
        if self.ranks.is_main and is_told:
            text = " ".join(f"{key} {value:.5g}" for key, value in scalars.items())
            log.info("%s epoch %d/%d step %d: %s", stage.name, at.epoch, stage.epochs, at.step, text)

    def _agreed_wish(self, is_due: bool = False) -> int:
        """What one rank wishes, all do, at the same step; GPUs, which would wait, ask every 16th step, or if is_due."""
        is_late = time.perf_counter() - self.saved > max(self.config.checkpoint_seconds, 20 * self.save_seconds)
        number = signals.pending()
        wish = (_SAVE if is_late else _GO_ON) if number is None else _INTERRUPT if number == SIGINT else _STOP
        if self.ranks.world_size == 1:
            return wish
        if self.ranks.device.type != "cpu" and self.position.step % 16 and not is_due:
            return _GO_ON
        flag = torch.tensor([wish], dtype=torch.int32, device=self.ranks.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag.item())

    def _save(self, stages: Sequence[Stage]) -> None:
        started = time.perf_counter()
        if "nonfinite" in self.sums and self.sums["nonfinite"].item() > 0:
            raise NonFiniteError(f"the gradient was not finite at or before step {self.position.step}; not saved")
        states = {s.name: s.step.state_dict() for n, s in enumerate(stages) if self._is_saved(n, s, len(stages) - 1)}
        gathered: list[Any] = [(torch.get_rng_state(), device_states())]
        if self.ranks.world_size > 1:
            own, gathered = gathered[0], [None] * self.ranks.world_size
            torch.distributed.all_gather_object(gathered, own)
        random, devices = (list(states) for states in zip(*gathered, strict=True))
        problems: list[Any] = [None]
        if self.ranks.is_main:
            state = {
                "position": asdict(self.position),
                "stages": states,
                "random": random,
                "metrics_size": self.run.sync_metrics(),
                "identity": self.identity.plain(),
                **({"device_random": devices} if any(devices) else {}),
            }
            try:
                checkpoint.save(self.run.checkpoints, self.position.step, state, self.config.keep_checkpoints)
            except checkpoint.SaveError as error:
                problems = [str(error)]
        if self.ranks.world_size > 1:  # wait for it, and end together
            torch.distributed.broadcast_object_list(problems)
        if problems[0] is not None:
            raise checkpoint.SaveError(problems[0])
        self.saved = time.perf_counter()
        self.save_seconds = self.saved - started

    def _is_saved(self, number: int, stage: Stage, last: int) -> bool:
        """The current stage, once all are done the last one (a run may end before its result.json), and those kept."""
        current = min(self.position.stage, last)
        return number == current or (stage.is_kept and number < current)

    def resume(self, stages: Sequence[Stage], is_dry: bool = False) -> int:
        """Go to where the newest checkpoint stands, if there is one; the bytes of metrics.jsonl that belong to it.

        Every rank reads and checks alike, so that all of them refuse (UserError) what does not fit. is_dry: the folder
        may be another process', and stays as it is.
        """
        found: list[Path | None] = [None]
        if self.ranks.is_main:
            found = [checkpoint.newest(self.run.checkpoints, is_owner=not is_dry)]
        if self.ranks.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        (path,) = found
        metrics_size = 0
        if path is not None:
            saved = Saved.read(path, self.ranks.device)
            self.identity.follow(saved.identity, path, self.ranks.is_main)
            check_position(saved.position, [(s.epochs, s.loader.num_batches) for s in stages], path)
            self.run.check_metrics(saved.metrics_size, path)
            self.position, metrics_size = saved.position, saved.metrics_size
            for number, stage in enumerate(stages):
                if self._is_saved(number, stage, len(stages) - 1):
                    restore(stage.step, saved.stages, stage.name, path)
            saved.restore_random(self.ranks.rank, path)
            if self.ranks.is_main:
                log.info("resumed at step %d from %s", self.position.step, path)
        return metrics_size
