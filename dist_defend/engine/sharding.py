"""What `accelerate launch` was asked to shard, read from the environment that it hands to the ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from dist_defend.errors import UserError
from dist_defend.strict_json import read_json

StrategyName = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
STRATEGIES: tuple[StrategyName, ...] = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
_MOST_BYTES = 1 << 20  # of DeepSpeed's configuration
_SWITCHES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP")
_OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
         "optimizer", "scheduler", "fp16", "bf16", "torch_autocast")  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """strategy, FSDP2's one choice, and the content of DeepSpeed's configuration file."""

    strategy: StrategyName = "ddp"
    reshard_after_forward: bool = True
    deepspeed: dict[str, Any] = field(default_factory=dict)


def launched_sharding(precision: str) -> Sharding:
    """UserError for what `accelerate launch` offers and this program does not do, or cannot do at this precision."""
    wants_deepspeed, wants_fsdp = (_is_on(name) for name in _SWITCHES)
    if not (wants_deepspeed or wants_fsdp):
        return Sharding()
    sharding = _deepspeed() if wants_deepspeed else _fsdp()
    check_precision(sharding.strategy, precision)
    return sharding


def check_precision(strategy: StrategyName, precision: str) -> None:
    """UserError for a precision that the strategy does not have."""
    if strategy != "ddp" and precision == "fp16":
        raise UserError(f"key 'precision' is fp16, whose loss scale {strategy} does not share: use bf16")
    if strategy.startswith("zero") and precision == "fp64":
        raise UserError(
            "key 'precision' is fp64, but DeepSpeed's master weights are float32: use fp32, or DDP or FSDP2"
        )


def check_optimizer(strategy: StrategyName, name: str) -> None:
    """UserError for an optimizer that the strategy's flat shards cannot serve."""
    if strategy.startswith("zero") and name == "lars":
        raise UserError(
            "key 'optimizer.name' is lars, which needs the norm of each tensor, but ZeRO flattens them into one: "
            "launch with --strategy fsdp2 or ddp"
        )


@contextmanager
def unwrapped() -> Iterator[None]:
    """Within, Accelerate does not see the switches: it starts the ranks, and the strategies here do the sharding."""
    hidden = {name: os.environ.pop(name) for name in _SWITCHES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _fsdp() -> Sharding:
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launch asks for FSDP 1: set fsdp_version: 2, as launch/accelerate/fsdp2.yaml does")
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise UserError("the launch asks for fsdp_offload_params, which is not supported: say false, or use more ranks")
    return Sharding("fsdp2", reshard_after_forward=os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false")


def _deepspeed() -> Sharding:
    if find_spec("deepspeed") is None:
        raise UserError("the launch asks for DeepSpeed, which is not installed: pip install 'dist-defend[deepspeed]'")
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not Path(path).is_file():
        raise UserError(
            f"the launch's deepspeed_config_file is {path!r}, which is no file from here: start at the repository's "
            "root, or use `dist-defend launch`"
        )
    content = read_json(path, "see launch/deepspeed", most_bytes=_MOST_BYTES)
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        raise UserError(f"{path}: not a DeepSpeed configuration with zero_optimization.stage: see launch/deepspeed")
    stage = zero["stage"]
    if type(stage) is not int or stage not in (1, 2, 3):
        told = stage if type(stage) is int and abs(stage) < 1000 else f"a {type(stage).__name__}"
        raise UserError(f"{path}: zero_optimization.stage is {told}; it must be 1, 2 or 3")
    taken = [key for key in _OURS if key in content]
    if taken:
        raise UserError(f"{path}: sets '{taken[0]}', which the experiment's file decides: remove it")
    return Sharding(f"zero{stage}", deepspeed=content)  # type: ignore[arg-type]


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")
