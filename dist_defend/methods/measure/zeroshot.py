"""Zero-shot classification by CLIP (Radford et al. 2021), as BadEncoder evaluates its attack on CLIP.

An image gets the class whose prompt has the text feature nearest to the image's feature: top-1 of 100 cos(f(x), t_c).
There is nothing to train. A backdoored image tower is measured against the text tower of the clean CLIP.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.bounds import at_least_one
from dist_defend.counts import warn_near_chance
from dist_defend.data.classes import check_class, check_same_classes
from dist_defend.data.loader import DatasetConfig
from dist_defend.engine.context import Context, Plan
from dist_defend.errors import UserError
from dist_defend.files import read_regular, sha256_file
from dist_defend.models.clip import TextTower, class_features, load_text_tower
from dist_defend.models.encoder import SimCLR
from dist_defend.screen import printable
from dist_defend.trial import Examination, encoders_to_measure, save_pictures

log = logging.getLogger(__name__)

TEMPLATES = {  # BadEncoder's
    "gtsrb": "A traffic sign photo of a {class}",
    "svhn": "A photo of a {class}",
    "stl10": "A photo of a {class}",
}
_MOST_BYTES = 4 << 20  # of a file of class names
_LOGIT_SCALE = 100.0


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP model, of which the text tower is used: its name in open_clip, and a file of its weights.

    Keys:
        arch: name of the CLIP model in open_clip, as open_clip:NAME
        weights: file of the CLIP model's weights
    """

    arch: str
    weights: str


@dataclass(frozen=True)
class TaskConfig:
    """A labelled test set, what its classes are called, and the class that the attacker wants.

    Keys:
        test: labelled test images
        target_class: the class that the attacker wants triggered images to get
        templates: prompts with {class}, whose text features are averaged; or a published set by name: gtsrb, svhn,
            stl10
        class_names: names of the classes for the prompts, or a file with a name per line; null: the data set's names
    """

    test: DatasetConfig
    target_class: int
    templates: str | tuple[str, ...]
    class_names: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) and self.templates not in TEMPLATES:
            raise ValueError(
                f"key 'templates' is {self.templates!r}; it must be one of {', '.join(TEMPLATES)}, or a list of prompts"
            )
        if not self.templates:
            raise ValueError("key 'templates' is empty; give at least one prompt with {class}")
        for template in self.prompts:
            if template.count("{class}") != 1:
                raise ValueError(f"key 'templates' has {template!r}; write {{class}} once, where the name goes")

    @property
    def prompts(self) -> tuple[str, ...]:
        return (TEMPLATES[self.templates],) if isinstance(self.templates, str) else self.templates


@dataclass(frozen=True)
class Config:
    """Defaults are BadEncoder's, except batch_size, which is 1 there.

    Keys:
        clip: the clean CLIP, whose text tower classifies
        encoders: kind (clean, backdoored, purified, ...) -> model folder of an image tower
        tasks: name -> a downstream task
        attack: attack whose success is measured, with the target class of each task; null: the attack in the encoders'
            cards
        batch_size: images of a forward pass, over all ranks
    """

    clip: ClipConfig
    encoders: dict[str, str]
    tasks: dict[str, TaskConfig]
    attack: AttackConfig | None = AttackConfig(BadNets(size=50, margin=1))
    batch_size: int = 512

    def __post_init__(self) -> None:
        for key in ("encoders", "tasks"):
            if not getattr(self, key):
                raise ValueError(f"key '{key}' is empty")
        at_least_one(self, "batch_size")


def logits(features: Tensor, texts: Tensor) -> Tensor:
    """100 cos of unit image features (N, D) with the classes' unit text features (C, D) -> (N, C)."""
    return _LOGIT_SCALE * features @ texts.T


def build(config: Config, context: Context) -> Plan:
    """No stage; text features now, evaluation on clean and triggered test images at the end."""
    ranks = context.ranks
    tower = load_text_tower(config.clip.arch, config.clip.weights).to(ranks.device, ranks.dtype)
    models, attack = encoders_to_measure(config.encoders, config.attack, context)
    for kind, model in models.items():
        if model.f.feature_dim != tower.feature_dim:
            raise UserError(
                f"key 'encoders.{kind}': features of {model.f.feature_dim} numbers, the text tower of "
                f"{config.clip.arch} has {tower.feature_dim}: name the CLIP that the encoder belongs to"
            )
    tasks = {name: Task(name, task, config, models, attack, tower, context) for name, task in config.tasks.items()}

    def result() -> dict[str, Any]:
        rows = [row for task in tasks.values() for row in task.evaluate()]
        save_pictures([task.examination for task in tasks.values()])
        return {
            "rows": rows,
            "targets": {task: one.class_names[config.tasks[task].target_class] for task, one in tasks.items()},
            "encoders": dict(config.encoders),
            "clip": {"arch": config.clip.arch, "weights_sha256": sha256_file(Path(config.clip.weights))},
        }

    return Plan([], result)


class Task:
    """One test set, from the classes' prompts to counts."""

    def __init__(
        self,
        name: str,
        task: TaskConfig,
        config: Config,
        models: dict[str, SimCLR],
        attack: AttackConfig | None,
        tower: TextTower,
        context: Context,
    ) -> None:
        self.models = models
        test, rows = context.dataset(f"{name}/test", task.test, is_labelled=True)
        key = f"zeroshot.tasks.{name}"
        self.class_names = _class_names(task.class_names, test.classes, key)
        if task.class_names is None and any(name.isdigit() for name in self.class_names):
            context.tell(
                f"{test.path} has numbers for class names, so prompts say numbers; give key '{key}.class_names'"
            )
        check_class(f"{key}.target_class", task.target_class, len(self.class_names), test.path)
        for kind, model in models.items():
            if test.image_shape != (model.image_size, model.image_size, 3):
                raise UserError(
                    f"{test.path} does not hold images of {model.image_size} px, as key 'encoders.{kind}' needs "
                    f"them: prepare it with --image-size {model.image_size}"
                )
        if attack is not None:
            attack = replace(attack, target_class=task.target_class)
        self.examination = Examination(test, rows, attack, test.num_classes, context, config.batch_size, name)
        with torch.no_grad():
            self.texts = class_features(tower, self.class_names, task.prompts)
        log.info("%s: prompts '%s', ...", name, task.prompts[0].replace("{class}", self.class_names[0]))

    def evaluate(self) -> list[dict[str, Any]]:
        """One row of counts per encoder."""
        rows, examination = [], self.examination
        for kind, model in self.models.items():
            features = examination.features(kind, model.f)
            counts = examination.counts(*(logits(part, self.texts).argmax(1) for part in features))
            warn_near_chance(kind, examination.task, counts["acc"], len(self.class_names))
            rows.append(examination.row(kind, counts))
        return rows


def _class_names(named: str | tuple[str, ...] | None, stored: tuple[str, ...], key: str) -> tuple[str, ...]:
    """The classes' names. UserError for a file that cannot be read and a number of names other than the data set's."""
    if isinstance(named, str):
        try:
            lines = read_regular(named, _MOST_BYTES).decode("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"key '{key}.class_names': cannot read {named}: {reason}") from error
        names = tuple(line.strip() for line in lines if line.strip())
    else:
        names = stored if named is None else named
    if len(names) != len(stored):
        raise UserError(f"key '{key}.class_names' has {len(names)} names; the data set has {len(stored)} classes")
    if set(names) == set(stored):
        check_same_classes(names, f"key '{key}.class_names'", stored, "the data set")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"key '{key}.class_names' has '{printable(twice, 80)}' twice; give each class a name of its own"
        )
    return names
