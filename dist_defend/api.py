"""The package from Python: networks, tensors and Datasets of a program in, networks and counts out.

Everything goes through the same code as the commands: what a program holds is written to a folder as a model or a
prepared data set, and a run of the method reads it there. So results are those of ``dist-defend run``, bit for bit.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import Dataset

from dist_defend import experiment, methods, plugins
from dist_defend.attacks.attack import AttackConfig
from dist_defend.config import build_experiment, build_section
from dist_defend.counts import Count
from dist_defend.data.in_memory import Images
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.errors import UserError
from dist_defend.given import Inputs, Model, card_of, hints_of, remember
from dist_defend.importing import convert
from dist_defend.methods import defend as defences
from dist_defend.methods import find_method, method_names
from dist_defend.models import in_process
from dist_defend.models.artifact import ModelCard, check_fit, load_artifact, read_card, save_artifact
from dist_defend.models.classifier import Classifier, build_classifier
from dist_defend.models.fit import problem_with
from dist_defend.session import session
from dist_defend.trial import Trial

Data: TypeAlias = tuple[Images, Any] | Images | Dataset[Any] | str | Path | Mapping[str, Any]


@dataclass(frozen=True)
class Counts:
    """Of a test set: clean images classified right; triggered ones classified as the attacker wants; as their label.

    asr: images of other classes than the attacker's, taken for it; asr_all: of all images; ra: those of other classes
    that are classified as their label. Each has ``correct``, ``n`` and ``percent``; n is 0 where nothing was measured.
    """

    acc: Count
    asr: Count
    asr_all: Count
    ra: Count

    def __str__(self) -> str:
        return ", ".join(f"{name} {c.percent:.1f} % ({c.correct} of {c.n})" for name, c in vars(self).items() if c.n)

    @classmethod
    def of(cls, plain: Mapping[str, Mapping[str, int]]) -> "Counts":
        """From a row of result.json, or a card's."""
        return cls(**{name: Count(**plain[name]) for name in ("acc", "asr", "asr_all", "ra")})


@dataclass(frozen=True)
class Result:
    """What a run made. result: its result.json; folder: where it lies, None if nothing was to be kept."""

    method: str
    result: dict[str, Any] = field(repr=False)
    folder: Path | None
    made: Model | None = field(repr=False)

    @property
    def model(self) -> Model:
        """The network that came out, on the CPU, in eval mode; ``model.net`` of a wrapped one is the user's own class.

        UserError where the method makes none.
        """
        if self.made is None:
            raise UserError(f"method {self.method} makes no model: read the result's rows and metrics")
        return self.made

    @property
    def before(self) -> Counts | None:
        """Of the suspect, where the method is a defence that was tested."""
        return self._counts("before")

    @property
    def after(self) -> Counts | None:
        """Of the model that came out: a defence's by its card, else the one row's."""
        rows = [row for row in self.result.get("rows", []) if "acc" in row]
        return self._counts("after") or (Counts.of(rows[0]) if len(rows) == 1 else None)

    def _counts(self, when: str) -> Counts | None:
        card = None if self.made is None else card_of(self.made)
        return Counts.of(card.counts[when]) if card is not None and card.counts else None

    @cached_property
    def rows(self) -> Any:
        """The rows of result.json: a DataFrame if pandas is installed, else a list of dicts.

        A count ``acc`` gives the columns acc (percent), acc_correct and acc_n. A detector's row has a score instead.
        """
        rows = [_flat(row) for row in self.result.get("rows", [])]
        if importlib.util.find_spec("pandas") is None:
            return rows
        import pandas

        return pandas.DataFrame(rows)

    @property
    def metrics(self) -> dict[str, Any]:
        """The method's own figures."""
        found: dict[str, Any] = self.result.get("metrics", {})
        return found


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict) and value.keys() == {"correct", "n"}:
            count = Count(**value)
            flat |= {name: count.percent, f"{name}_correct": count.correct, f"{name}_n": count.n}
        else:
            flat[name] = value
    return flat


def wrap(
    net: nn.Module,
    num_classes: int,
    image_size: int,
    normalization: str | tuple[float | Sequence[float], float | Sequence[float]],
    *,
    arch: str | None = None,
    classes: Sequence[str] | None = None,
) -> Classifier:
    """A classifier of images (B, 3, image_size, image_size) in [0, 1] around any network; its ``net`` is yours.

    net: takes normalised images, gives logits (B, num_classes). normalization: (mean, std) of its training, each one
    number or three; or a name as in configurations, "none" for a network that takes images in [0, 1] themselves.
    arch: "module:function" that makes this network of (num_classes, image_size); a saved folder then says how to build
    it. classes: their names. UserError for a network that does not give such logits, or that arch does not make.
    """
    _check_network(net)
    plugins.allow([arch, normalization])
    name = normalization if isinstance(normalization, str) else _constants(normalization)
    model = Classifier(net, arch or in_process.copies_of(net)[0], num_classes, name, image_size)
    names = None if classes is None else tuple(classes)
    try:
        card = ModelCard("classifier", model.arch, name, image_size, num_classes=num_classes, classes=names)
    except ValueError as error:
        raise UserError(f"wrap: {error}") from error
    problem = problem_with(model, image_size, image_size)
    if problem is not None:
        raise UserError(
            f"wrap: {type(net).__name__} does not give logits (B, {num_classes}) for images (B, 3, {image_size}, "
            f"{image_size}): {problem}"
        )
    if arch is not None:
        own = build_classifier(arch, num_classes, name, image_size).net.state_dict()
        check_fit(own, dict(net.state_dict()), f"wrap: the network ({arch})")
    return remember(model, card)


def _check_network(net: object) -> None:
    if not isinstance(net, nn.Module):
        raise UserError(f"wrap: a {type(net).__name__} is no torch.nn.Module: build the network first")
    if not any(True for _ in net.parameters()):
        raise UserError(f"wrap: {type(net).__name__} has no parameters")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in net.parameters()):
        raise UserError(f"wrap: {type(net).__name__} has lazy parameters: call it once on a batch of images first")
    others = [key for key, value in net.state_dict().items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"wrap: '{others[0]}' in the state dict is no tensor: make it a plain attribute or a buffer")


def _constants(normalization: tuple[float | Sequence[float], float | Sequence[float]]) -> str:
    """The name of numbers: three means and three stds with commas between."""
    try:
        parts = [[float(part)] * 3 if isinstance(part, int | float) else [*map(float, part)] for part in normalization]
    except TypeError:
        parts = []
    if [len(part) for part in parts] != [3, 3]:
        raise UserError(f"wrap: normalization is {normalization!r}; give (mean, std), each one number or three")
    return ",".join(repr(number) for part in parts for number in part)


def load(path: str | Path, *, net: nn.Module | None = None, folder: str | Path | None = None, **options: Any) -> Model:
    """A model from a model folder, from a run folder, or from a checkpoint of others, without unpickling it.

    net: the network that the folder's weights belong to, where its card cannot name it (see wrap). folder: where the
    model folder that a checkpoint becomes is kept, with the triggered images that an attack_result.pt holds; None:
    nowhere. options: of a checkpoint, those of ``dist-defend import``: arch, normalization, image_size, kind, key, ...
    On the CPU, in eval mode. UserError for a file that is missing, damaged or not recognised.
    """
    path = Path(path)
    inside = path / "model" if (path / "model" / "model.json").is_file() else path
    if (inside / "model.json").is_file():
        if folder is not None or options:
            name = min(options, default="folder")
            raise UserError(
                f"load: '{name}' is for checkpoints of others, and {inside} is a model folder: leave it out"
            )
        return _load(inside, net)
    if net is not None:
        raise UserError(f"load: 'net' is for model folders, and {path} is none: leave it out, or wrap the network")
    with tempfile.TemporaryDirectory(prefix="dist_defend_") as place:
        out = Path(place) / "model" if folder is None else Path(folder)
        for line in convert(path, out, **options):
            experiment.log.info("%s", line)
        return _load(out)


def _load(folder: Path, net: nn.Module | None = None) -> Model:
    with in_process.scope():
        if net is not None:
            _check_network(net)
            card = read_card(folder)
            in_process.make_known(card.arch, in_process.copies_of(net)[1])
        model, card = load_artifact(folder)
    return remember(model, card).eval()


def save(model: Model, folder: str | Path) -> None:
    """Write a model folder: model.safetensors and model.json, its card. UserError if it cannot be written."""
    card = card_of(model)
    if card.arch.startswith(in_process.PREFIX):
        experiment.log.warning(
            "%s: its network is known to this program alone; load it with dist_defend.load(..., net=NETWORK), or wrap "
            "it with arch='module:function'",
            folder,
        )
    try:
        save_artifact(folder, model, card)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error


def attack(name: str | None = None, **options: Any) -> AttackConfig:
    """An attack: a trigger by its name, the class that the attacker wants, which images are poisoned.

    options: target_class, labels, rate and the other keys of AttackConfig; all others are the trigger's. images: the
    file of others' triggered images, instead of a name. UserError for unknown names, keys and values.
    """
    plugins.allow(name)
    own = AttackConfig.__dataclass_fields__.keys() - {"trigger"}
    section = {key: value for key, value in options.items() if key in own}
    rest = {key: value for key, value in options.items() if key not in own}
    if name is not None or rest:
        section["trigger"] = {"name": name, **rest}
    plain = Inputs(None).section(section, hints_of(AttackConfig), "attack")
    built: AttackConfig = build_section(AttackConfig, plain, Path("attack"))
    return built


def evaluate(
    model: Model | str | Path,
    data: Data,
    attack: AttackConfig | None = None,
    *,
    batch_size: int = 512,
    device: str | torch.device | None = None,
) -> Counts:
    """Count what a classifier makes of a labelled test set, clean and triggered, as ``dist-defend evaluate`` does.

    attack: None takes the one that the model's card names, if any; without one only acc is counted. UserError for data
    that do not fit the model.
    """
    with session(device), in_process.scope(), _place("evaluate", None) as (place, folder):
        plain = Inputs(place).section({"model": model, "data": data}, {"data": DatasetConfig}, "evaluate")
        context = Context(dist.start("fp32", None), 0, LoaderConfig(), folder)
        trial = Trial(plain["model"], context)
        dataset = build_section(DatasetConfig, plain["data"], Path("evaluate"), "data.")
        examination = trial.test_on(dataset, attack, batch_size=batch_size)
        counts = examination.measure(trial.model)
        trial.judge(counts["acc"], examination.test.path)
        return Counts(**counts)


def defend(
    method: str,
    model: Model | str | Path,
    clean: Data | None = None,
    *,
    test: Data | None = None,
    attack: AttackConfig | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Result:
    """Defend a suspect with what the defender has, and measure before and after. The suspect stays as it is.

    clean: the defender's images, for methods that have such. attack: what test images are triggered with; None takes
    the one that the model's card names. output: the run folder, which a second call goes on from; None: a temporary
    one. options: keys of the method's section in a configuration, nested ones as dicts; and seed, precision, trainer,
    loader, device. UserError for a wrong option, one line that names it.
    """
    if _is_defence(method) is False:
        raise UserError(f"defend: method '{method}' is no defence: dist_defend.train runs it")
    given = {"model": model, "data": clean, "test": test, "attack": attack}
    return _run("defend", method, given, output, options)


def train(
    method: str,
    data: Data | None = None,
    *,
    test: Data | None = None,
    attack: AttackConfig | None = None,
    output: str | Path | None = None,
    **options: Any,
) -> Result:
    """Run a method that is no defence: simclr, classifier, badencoder, input_aware, probe, ... As defend otherwise.

    arch: also a function of (num_classes, image_size) that gives a network.
    """
    if _is_defence(method):
        raise UserError(f"train: method '{method}' is a defence: dist_defend.defend runs it")
    return _run("train", method, {"data": data, "test": test, "attack": attack}, output, options)


_AROUND = ("seed", "precision", "trainer", "loader")  # keys beside the method's section
_NAMES = {"model": ("model", "teacher"), "data": ("data",), "test": ("test",), "attack": ("attack",)}


def _is_defence(method: str) -> bool | None:
    """By the folder that the method is in; None for a plug-in, which may be either, and for an unknown name."""
    name = find_method(method).__name__ if method in method_names() else ""
    return name.startswith(f"{defences.__name__}.") if name.startswith(f"{methods.__name__}.") else None


def _run(who: str, method: str, given: dict[str, Any], output: str | Path | None, options: dict[str, Any]) -> Result:
    device = options.pop("device", None)
    raw: dict[str, Any] = {"method": method}
    raw |= {key: options.pop(key) for key in _AROUND if key in options}
    section = {**_named(who, method, given, options), **options}
    with session(device), in_process.scope(), _place(method, output) as (place, folder):
        if output is None:
            raw["trainer"] = {"trackers": [], **raw.get("trainer", {})}
        hints = hints_of(find_method(method).Config) if method in method_names() else {}
        raw["output"] = str(folder)
        raw[method] = Inputs(place).section(section, hints, method)
        finished = experiment.run(build_experiment(raw, Path(who)))
        assert finished is not None
        has_model = (finished.folder / "model").is_dir()
        made = _load(finished.folder / "model") if has_model else None
        return Result(method, finished.result, None if output is None else folder, made)


def _named(who: str, method: str, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were given, by the method's own names for them."""
    fields = find_method(method).Config.__dataclass_fields__ if method in method_names() else {}
    named = {}
    for argument, value in given.items():
        if value is None:
            continue
        own = next((name for name in _NAMES[argument] if name in fields), None)
        if own is None and fields:
            told = "clean" if (who, argument) == ("defend", "data") else argument
            raise UserError(f"{who}: method '{method}' takes no {told}: leave it out")
        if own in options:
            raise UserError(f"{who}: '{own}' is given twice")
        named[own or argument] = value
    return named


@contextlib.contextmanager
def _place(method: str, output: str | Path | None) -> Iterator[tuple[Path, Path]]:
    """Where inputs lie, and the run folder."""
    if output is not None:
        yield Path(output) / "inputs", Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="dist_defend_") as place:
        yield Path(place), Path(place) / method
