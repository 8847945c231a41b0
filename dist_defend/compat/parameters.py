"""The parameters of SCLBD/BackdoorBench's defences (commit f02e353): flags, types, documented defaults, and their use.

A value comes from the command line, else the parser's default, else the yaml file, else the documentation.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError
from dist_defend.screen import printable
from dist_defend.strict_yaml import read_yaml

log = logging.getLogger(__name__)


def truth(text: str) -> bool:
    """True, true, 1 or False, false, 0; anything else, which BackdoorBench takes for False, is refused."""
    if text not in ("True", "true", "1", "False", "false", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text in ("True", "true", "1")


@dataclass(frozen=True)
class Parameter:
    """A flag. default: the parser's own there. options: further arguments of argparse's."""

    name: str
    kind: Callable[[str], Any]
    help: str
    default: Any = None
    short: str | None = None
    options: Mapping[str, Any] | None = None


_UNUSED = "accepted, no meaning here"
COMMON = (
    Parameter("device", str, "cuda, cuda:N or cpu; default: a GPU where there is one"),
    Parameter("pin_memory", truth, _UNUSED, short="-pm"),
    Parameter("non_blocking", truth, _UNUSED, short="-nb"),
    Parameter("prefetch", truth, _UNUSED, short="-pf"),
    Parameter("checkpoint_load", str, _UNUSED),
    Parameter("checkpoint_save", str, _UNUSED),
    Parameter("log", str, "folder of index.txt"),
    Parameter("dataset_path", str, "folder whose subfolder of the data set's name is prepared data"),
    Parameter("dataset", str, "name of the data set; default: the one that the attack result names"),
    Parameter("result_file", str, "folder below record/ that holds attack_result.pt"),
    Parameter("epochs", int, _UNUSED),
    Parameter("batch_size", int, "images of a batch"),
    Parameter("num_workers", float, "threads that make batches"),
    Parameter("lr", float, "rate of I-BAU's outer optimizer"),
    Parameter("lr_scheduler", str, _UNUSED),
    Parameter("steplr_stepsize", int, _UNUSED),
    Parameter("steplr_gamma", float, _UNUSED),
    Parameter("steplr_milestones", str, _UNUSED),
    Parameter("model", str, "the network's name, which must be the attack result's"),
    Parameter("client_optimizer", str, "sgd for RNP, adam for I-BAU, as in their yaml files"),
    Parameter("sgd_momentum", float, _UNUSED),
    Parameter("wd", float, "weight decay of I-BAU's outer optimizer"),
    Parameter("frequency_save", int, _UNUSED),
    Parameter("random_seed", int, "seed"),
    Parameter("yaml_path", str, "file of defaults"),
    Parameter("ratio", float, "share of the clean training images that the defender has"),
    Parameter("index", str, "text file of the rows of these images"),
)
RNP = (
    Parameter("amp", truth, "half precision; must be False", False),
    Parameter("alpha", float, "weight of the loss while recovering", 0.2),
    Parameter("clean_threshold", float, "training accuracy that ends unlearning", 0.20),
    Parameter("unlearning_lr", float, "rate of unlearning", 0.01),
    Parameter("recovering_lr", float, "rate of the masks", 0.2),
    Parameter("unlearning_epochs", int, "epochs of unlearning, at most", 20),
    Parameter("recovering_epochs", int, "epochs of recovering", 20),
    Parameter("mask_file", str, "a mask_values.txt, which both phases are skipped for"),
    Parameter("pruning_by", str, "threshold or number", "threshold", options={"choices": ["number", "threshold"]}),
    Parameter("pruning_max", float, "last threshold or number of the table", 0.90),
    Parameter("pruning_step", float, "step of the table", 0.05),
    Parameter("pruning_number", float, "threshold or number of the delivered model", 0.70),
    Parameter("acc_ratio", float, "loss of accuracy that the choice by test ASR allows"),
    Parameter("schedule", int, "epochs from which on the rate is a tenth", [10, 20], options={"nargs": "+"}),
)
IBAU = (
    Parameter("amp", truth, _UNUSED),
    Parameter("optim", str, "outer optimizer; must be Adam", "Adam"),
    Parameter("n_rounds", int, "rounds"),
    Parameter("K", int, "fixed-point iterations"),
)
NOT_USED = {parameter.name for parameter in (*COMMON, *IBAU) if parameter.help == _UNUSED} - {"amp"}


def add_parameters(parser: argparse.ArgumentParser, parameters: tuple[Parameter, ...]) -> None:
    """BackdoorBench's flags."""
    for own in parameters:
        flags = [flag for flag in (own.short, f"--{own.name}") if flag]
        parser.add_argument(*flags, type=own.kind, default=own.default, help=own.help, **(own.options or {}))


def complete(
    args: argparse.Namespace,
    parameters: tuple[Parameter, ...],
    documented: Mapping[str, Any],
    yaml_path: str,
    unused: set[str],
) -> dict[str, Any]:
    """Every parameter's value. Tells once which of the given ones have no meaning here.

    yaml_path: read where it is there and ``args`` names no other file. UserError for a yaml file that cannot be read or
    has keys that are no parameters.
    """
    known = {own.name for own in parameters} | {"adam_betas"}
    own_file = getattr(args, "yaml_path", None)
    read = read_yaml(Path(own_file or yaml_path)) if own_file or Path(yaml_path).is_file() else {}
    if strange := sorted(read.keys() - known):
        raise UserError(f"{own_file or yaml_path}: key '{printable(strange[0], 80)}' is no parameter: leave it out")
    for own in parameters:
        if read.get(own.name) is not None and own.name not in unused:
            read[own.name] = _typed(own, read[own.name], own_file or yaml_path)
    given = {name: value for name, value in vars(args).items() if value is not None}
    told = {name: value for name, value in {**read, **given}.items() if value is not None}
    idle = [f"--{name}" for name in sorted(told.keys() & unused)]
    if idle:
        log.warning("%s: no meaning here, not used (docs/backdoorbench.md)", ", ".join(idle))
    defaults = {own.name: own.default for own in parameters}
    return {**dict.fromkeys(known), **defaults, **documented, **told}


def _typed(own: Parameter, value: Any, path: str) -> Any:
    """A value of a yaml file as the flag has it. UserError if it is none."""
    try:
        if isinstance(value, list) and own.options is not None and "nargs" in own.options:
            return [own.kind(str(item)) for item in value]
        if isinstance(value, list | dict):
            raise ValueError("no scalar")
        return own.kind(str(value))
    except (ValueError, argparse.ArgumentTypeError):
        told = f"key '{own.name}' is {printable(repr(value), 80)}"
        raise UserError(f"{path}: {told}; give what --{own.name} takes: {own.help}") from None
