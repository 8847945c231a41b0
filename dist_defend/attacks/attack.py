"""An attack: a trigger, the images that get it, and their labels. One schema for configurations and model cards."""

from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import dacite
import numpy as np
from torch import Tensor

from dist_defend.attacks.added import find_options, with_added
from dist_defend.attacks.patterns import TriggerConfig
from dist_defend.bounds import share
from dist_defend.errors import UserError

Labels = TypeVar("Labels", np.ndarray, Tensor)


@dataclass(frozen=True)
class AttackConfig:
    """A trigger, the class that the attacker wants, and which training images are poisoned.

    Defaults are BackdoorBench's. The section ``attack:`` of every method and ``attack`` of every model card have these
    keys. Only training reads rate, count, avoid_target and choose; measuring reads the others.

    Keys:
        trigger: trigger that is stamped; null: ``images`` are given instead
        labels: all_to_one: images of any class become the target class; all_to_all: class y becomes y + shift;
            clean_label: only images of the target class are stamped and keep their label
        target_class: the class that the attacker wants, counted from 0; null: 0, or that of given images
        rate: share of all training images that are poisoned
        count: number of poisoned images, instead of ``rate``
        shift: shift of all_to_all
        avoid_target: all_to_one: poisoned images are chosen among the other classes, as in I-BAU
        choose: which images are poisoned: random ones, by the run's seed, or the first in the prepared order. ABD's
            teachers have the first in the published order, which is the prepared one after `data prepare --keep-order`
        images: triggered test images made elsewhere, instead of a trigger: an npz or a prepared data set; for
            measurement only
    """

    trigger: TriggerConfig | None = None
    labels: Literal["all_to_one", "all_to_all", "clean_label"] = "all_to_one"
    target_class: int | None = None
    rate: float = 0.1
    count: int | None = None
    shift: int = 1
    avoid_target: bool = False
    choose: Literal["random", "first"] = "random"
    images: str | None = None

    def __post_init__(self) -> None:
        if self.trigger is None and self.images is None:
            raise ValueError("key 'trigger' is missing: name one, or give others' triggered test images as 'images'")
        if self.trigger is not None and self.images is not None:
            raise ValueError("key 'images' is set, but 'trigger' says what is stamped: leave one out, or make it null")
        if self.target_class is None and self.trigger is not None:
            object.__setattr__(self, "target_class", 0)
        share(self, "rate")
        if self.count is not None and self.count < 0:
            raise ValueError(f"key 'count' is {self.count}; it cannot be negative")
        if self.target_class is not None and self.target_class < 0:
            raise ValueError(f"key 'target_class' is {self.target_class}; it cannot be negative")
        if self.avoid_target and self.labels != "all_to_one":
            raise ValueError(f"key 'avoid_target' is true, but labels is {self.labels!r}; it needs all_to_one")


def attack_from(plain: dict[str, Any]) -> AttackConfig:
    """The attack that ``dataclasses.asdict`` wrote into a model card. UserError for anything else."""
    options = plain.get("trigger")
    if isinstance(options, dict) and isinstance(options.get("name"), str):
        find_options(options["name"])  # which says what is wrong with a plug-in
    try:
        return dacite.from_dict(AttackConfig, plain, with_added(dacite.Config(strict=True, cast=[tuple])))
    except (dacite.DaciteError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the model card's attack is none that this version has: {error}") from error


def backdoor_labels(labels: Labels, config: AttackConfig, num_classes: int) -> Labels:
    """What a successful attack predicts on stamped images with these labels (N,)."""
    if config.labels == "all_to_all":
        return (labels + config.shift) % num_classes
    assert config.target_class is not None
    return labels * 0 + config.target_class


def trigger_of(config: AttackConfig) -> TriggerConfig:
    """The attack's trigger. UserError for an attack of given images, which has none."""
    if config.trigger is None:
        raise UserError(
            f"key 'images' is {config.images}: given images are measured, nothing is trained on them; name a 'trigger'"
        )
    return config.trigger


def check_classes(config: AttackConfig, num_classes: int, prefix: str = "") -> None:
    """UserError unless target_class is below num_classes and all_to_all's shift changes the class."""
    if config.target_class is not None and config.target_class >= num_classes:
        told = f"key '{prefix}target_class' is {config.target_class}"
        raise UserError(f"{told}; the classes are 0 to {num_classes - 1}")
    if config.labels == "all_to_all" and config.shift % num_classes == 0:
        told = f"key '{prefix}shift' is {config.shift}"
        raise UserError(f"{told}, which maps each of the {num_classes} classes to itself")


def check_only_trigger(config: AttackConfig, why: str) -> None:
    """ValueError for keys other than the trigger, for methods that read no other. why: for the message."""
    for own in fields(config):
        value, default = getattr(config, own.name), 0 if own.name == "target_class" else own.default
        if own.name != "trigger" and value != default:
            raise ValueError(f"key 'attack.{own.name}' is {value!r}; {why}: leave it out")
