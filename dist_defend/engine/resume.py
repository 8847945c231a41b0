"""A checkpoint's content, checked: what another run, version or hand has put there is told in one line.

Nothing is trained before all of it fits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_defend.engine import checkpoint
from dist_defend.engine.identity import Past
from dist_defend.engine.optim import is_optimizer_state
from dist_defend.engine.step import Position, Step
from dist_defend.errors import UserError
from dist_defend.screen import printable
from dist_defend.strict_json import build


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds. metrics_size: bytes of metrics.jsonl that belong to it.

    random: by rank, the state of the CPU's generator. device_random: by rank, those of the CUDA devices that it sees.
    """

    position: Position
    stages: dict[str, Any]
    random: list[Tensor]
    metrics_size: int
    device_random: list[list[Tensor]]
    identity: Past | None  # None: of an earlier version, which kept none

    @classmethod
    def read(cls, path: Path, device: torch.device | str = "cpu") -> "Saved":
        """UserError for anything that the trainer does not write."""
        state = checkpoint.load(path, device)
        where = path / "state.json"
        known = {"position", "stages", "random", "metrics_size"}
        optional = {"identity", "device_random"}
        if not known <= state.keys() <= known | optional:
            odd = ", ".join(sorted(map(str, known ^ (state.keys() - optional))))
            raise misfit(where, f"has not the keys of a checkpoint ({odd})")
        position = build(Position, state["position"], f"{where}, key 'position',", "delete this checkpoint")
        if checkpoint.path_of(path.parent, position.step) != path:
            raise misfit(where, f"key 'position.step' is {position.step}, in another step's folder")
        stages, random, size = state["stages"], state["random"], state["metrics_size"]
        if not isinstance(stages, dict):
            raise misfit(where, "key 'stages' holds no stages by name")
        if not isinstance(random, list) or not random or not all(map(_is_random_state, random)):
            raise misfit(where, "key 'random' holds no states of the random generator")
        devices = state.get("device_random", [])
        if not isinstance(devices, list) or not all(map(_are_device_states, devices)):
            raise misfit(where, "key 'device_random' holds no states of the devices' generators")
        if type(size) is not int or size < 0:
            raise misfit(where, f"key 'metrics_size' is {size!r}, no number of bytes")
        identity = None if "identity" not in state else Past.read(state["identity"], where)
        return cls(position, stages, random, size, devices, identity)

    def restore_random(self, rank: int, path: Path) -> None:
        """This rank's random states, if the run had so many ranks.

        Those of CUDA devices only if the run had them: other devices draw from the run's seed on.
        """
        if rank >= len(self.random):
            return
        devices = self.device_random[rank] if rank < len(self.device_random) else []
        try:
            torch.set_rng_state(self.random[rank].cpu())
            for device, state in zip(range(torch.cuda.device_count()), devices, strict=False):
                torch.cuda.set_rng_state(state.cpu(), device)
        except RuntimeError as error:
            told = f"key 'random' or 'device_random' is no state of the generators ({error})"
            raise misfit(path / "state.json", told) from error


def device_states() -> list[Tensor]:
    """The states of the CUDA devices' generators, from which dropout draws there."""
    return [torch.cuda.get_rng_state(device) for device in range(torch.cuda.device_count())]


def _is_random_state(value: Any) -> bool:
    own = torch.get_rng_state()
    return isinstance(value, Tensor) and value.dtype == own.dtype and value.shape == own.shape


def _are_device_states(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, Tensor) and v.dtype == torch.uint8 for v in values)


def check_position(at: Position, stages: Sequence[tuple[int, int]], path: Path) -> None:
    """UserError unless a run of these stages (epochs, batches of an epoch) can stand there."""
    where = path / "state.json"
    if at.stage > len(stages):
        raise misfit(where, f"key 'position.stage' is {at.stage}, but the run has {len(stages)} stages")
    epochs, num_batches = stages[at.stage] if at.stage < len(stages) else (0, 0)
    for key, value, most in (("epoch", at.epoch, epochs), ("batch", at.batch, num_batches)):
        if value > most:
            raise misfit(where, f"key 'position.{key}' is {value}, but stage {at.stage} has {most}")
    within = at.epoch * num_batches + at.batch  # earlier stages may have stopped early
    if not within <= at.step <= within + sum(a * b for a, b in stages[: at.stage]):
        raise misfit(where, f"key 'position.step' is {at.step}, which is not where the other keys are")


def restore(step: Step, states: dict[str, Any], name: str, path: Path) -> None:
    """Give a step its state of the checkpoint. UserError, naming the key, for one that does not fit."""
    key = f"stages.{name}"
    where = path / "state.json"
    if name not in states:
        raise misfit(where, f"key '{key}' is missing")
    _check_like(step.state_dict(), states[name], key, where)
    try:
        step.load_state_dict(states[name])
    except Exception as error:  # whatever a step and torch make of foreign values
        first = str(error).strip().partition("\n")
        told = f"{first[0]} {first[2].strip()}".strip()
        raise misfit(where, f"key '{key}' does not fit: {type(error).__name__}: {told}") from error


def _check_like(own: Any, saved: Any, key: str, where: Path) -> None:
    """UserError unless the values are of the step's own kinds; free is what a fresh step has not yet."""
    if isinstance(own, dict):
        if saved is None:
            return  # a sharded optimizer's, before its first update
        if not isinstance(saved, dict):
            raise misfit(where, f"key '{key}' holds a {type(saved).__name__}, not values by name")
        if is_optimizer_state(own):
            return  # see load_optimizer
        for name in own:
            if name not in saved:
                raise misfit(where, f"key '{key}.{name}' is missing")
            _check_like(own[name], saved[name], f"{key}.{name}", where)
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple):
            raise misfit(where, f"key '{key}' holds a {type(saved).__name__}, not a list")
        for number, (mine, other) in enumerate(zip(own, saved, strict=False)):
            _check_like(mine, other, f"{key}.{number}", where)
    elif isinstance(own, Tensor):
        if not isinstance(saved, Tensor):
            raise misfit(where, f"key '{key}' holds a {type(saved).__name__}, not a tensor")
        # The first axis may have grown, as of images kept.
        is_like = saved.dtype == own.dtype and saved.ndim == own.ndim and saved.shape[1:] == own.shape[1:]
        if not is_like:
            raise misfit(
                where,
                f"key '{key}' is {saved.dtype} {tuple(saved.shape)}, but the run has {own.dtype} {tuple(own.shape)}",
            )
    elif own is not None:
        is_number = isinstance(own, float) and type(saved) is int
        if type(saved) is not type(own) and not is_number:
            raise misfit(where, f"key '{key}' holds a {type(saved).__name__}, not a {type(own).__name__}")
        if type(own) is int and saved < 0 <= own:
            raise misfit(where, f"key '{key}' is {saved}; it cannot be negative")


def misfit(where: Path, what: str) -> UserError:
    """The one line about a checkpoint that this run cannot go on from."""
    return UserError(
        f"{where} is no checkpoint of this run: {printable(what, 300)}; delete its folder to go on from the one "
        "before, or choose another 'output'"
    )
