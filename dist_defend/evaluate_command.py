"""``dist-defend evaluate``: what a classifier scores on a test set, clean and triggered, as a run would count it."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_defend.errors import UserError
from dist_defend.strict_json import read_json

if TYPE_CHECKING:  # they take seconds to import, which --help does not need
    from dist_defend.attacks.attack import AttackConfig
    from dist_defend.engine.identity import Identity
    from dist_defend.trial import Examination, Trial

_FOLDER = Path("runs/evaluate")
_SHOWN_CLASSES = 20  # of the table by class; of more, the worst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("model", metavar="MODEL", help="model folder of a classifier")
    parser.add_argument("--data", required=True, metavar="DIR", help="prepared test set, clean and labelled")
    attack = parser.add_mutually_exclusive_group()
    attack.add_argument(
        "--attack", type=Path, metavar="FILE", help="YAML with the keys of an attack section (trigger, target_class, "
        "labels, ...), an experiment file that has one, or a model.json that names one; default: the model's own"
    )  # fmt: skip
    attack.add_argument(
        "--triggered", metavar="IMAGES", help="triggered test images of others: an npz (bd_test.npz) or a prepared set"
    )
    parser.add_argument("--target-class", type=int, metavar="N", help="what the attacker wants of --triggered images")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="resize the test images when they are read")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write (default: one in {_FOLDER})")
    parser.add_argument("--seed", type=int, default=100, help="written in the row, as a run's (default: 100)")
    parser.add_argument("--batch-size", type=int, default=512, help="images at once (default: 512)")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Count, print a table, write result.json, examples and trigger.png. UserError for what does not fit."""
    from dist_defend.data.loader import DatasetConfig, LoaderConfig
    from dist_defend.engine import dist
    from dist_defend.engine.context import Context
    from dist_defend.engine.identity import Identity, digests_of
    from dist_defend.experiment import log_to_terminal
    from dist_defend.trial import Trial

    for name in ("batch_size", "resize"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}; it must not be negative")
    attack = _attack(args)
    try:
        ranks = dist.start("fp32", None)
        log_to_terminal(ranks.is_main)
        named = {"model": args.model, "data": args.data, "attack": None if attack is None else asdict(attack)}
        identity = Identity(digests_of(named, "evaluate"), ranks.world_size)
        context = Context(ranks, args.seed, LoaderConfig(), args.out or _FOLDER)
        trial = Trial(args.model, context)
        data = DatasetConfig(args.data, resize=args.resize)
        examination = trial.test_on(data, attack, batch_size=args.batch_size)
        entries = _evaluate(trial, examination, args, identity)
    finally:
        dist.stop()
    _print(trial, examination, entries)
    return 0


def _evaluate(
    trial: "Trial", examination: "Examination", args: argparse.Namespace, identity: "Identity"
) -> dict[str, Any]:
    """Count and write the folder; what result.json says."""
    import yaml

    from dist_defend.engine.run import RunFolder
    from dist_defend.experiment import provenance
    from dist_defend.terminal import release_log

    context, attack = trial.context, examination.attack
    settings = {
        "method": "evaluate",
        "seed": args.seed,
        "evaluate": {
            "model": args.model,
            "data": args.data,
            "resize": args.resize,
            "attack": None if attack is None else json.loads(json.dumps(asdict(attack))),
            "batch_size": args.batch_size,
        },
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if args.out is None:
        context.folder = _FOLDER / f"{_name(args.model)}-{digest[:8]}"
    folder = RunFolder(context.folder, is_main=True)
    folder.check(settings)
    release_log()
    on_clean, on_triggered = examination.predict(trial.model)
    counts = examination.counts(on_clean, on_triggered)
    trial.judge(counts["acc"], examination.test.path)
    card = trial.card
    kind = card.defended_by or ("backdoored" if card.backdoored else "suspect")
    entries = {
        "model_sha256": trial.sha256,
        "rows": [examination.row(kind, counts)],
        **examination.names(),
        "suspect": trial.suspect,
        "metrics": {"per_class_accuracy": examination.per_class(on_clean)},
    }
    try:
        folder.open(settings, yaml.safe_dump(settings, sort_keys=False))
        examination.save_examples()
        _draw(examination)
        result = provenance("evaluate", digest, context, identity) | entries
        folder.finish(result)
    except OSError as error:
        raise UserError(f"{context.folder}: cannot be written ({error.strerror}); choose another --out") from error
    finally:
        folder.close()
    return result


def _attack(args: argparse.Namespace) -> "AttackConfig | None":
    """The attack that the command line names. UserError for a file without one."""
    from dist_defend.attacks.attack import AttackConfig

    if args.target_class is not None and (args.triggered is None or args.target_class < 0):
        raise UserError("--target-class is a class number, 0 or more, and goes with --triggered")
    if args.triggered is not None:
        return AttackConfig(images=args.triggered, target_class=args.target_class)
    return None if args.attack is None else read_attack(args.attack)


def read_attack(path: Path) -> "AttackConfig":
    """The attack in a model folder, a model.json, an experiment file or a YAML file of AttackConfig's keys."""
    from dist_defend import plugins
    from dist_defend.attacks.attack import AttackConfig, attack_from
    from dist_defend.config import build_section
    from dist_defend.models.artifact import upgrade_card
    from dist_defend.strict_yaml import read_yaml

    path = path / "model.json" if path.is_dir() else path
    if path.suffix == ".json":
        raw = _card(path)
        if raw.get("format") == 1:
            upgrade_card(raw, path)
        if not raw.get("attack"):
            raise UserError(f"{path} names no attack: give another --attack, or --triggered images")
        return attack_from(raw["attack"])
    raw = read_yaml(path)
    own = raw.get(str(raw.get("method")))
    places = {"": raw, "attack.": raw.get("attack")}
    if isinstance(own, dict):
        places[f"{raw['method']}.attack."] = own.get("attack")
    for prefix, section in places.items():
        if isinstance(section, dict) and (prefix or {"trigger", "images"} & section.keys()):
            plugins.allow(section)  # the user's own file, unlike a model's card
            return build_section(AttackConfig, section, path, prefix)
    raise UserError(f"{path} has no attack: give the keys trigger (or images), target_class, labels, as in 'attack:'")


def _card(path: Path) -> dict[str, Any]:
    remedy = "name a model.json, or a YAML file with the keys of an attack section"
    try:
        raw = read_json(path, remedy)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {remedy}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} is no model card: {remedy}")
    return raw


def _name(model: str) -> str:
    """Of the run whose model it is, or of the model's folder."""
    folder = Path(model).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def _draw(examination: "Examination") -> None:
    """trigger.png: a line per image: as it is, triggered, and the difference."""
    from dist_defend.attacks.gallery import draw_pairs

    pairs, made, classes = examination.pairs(), examination.made, examination.test.classes
    if pairs is None or made is None:
        return
    rows = made.rows[: len(pairs[0])]
    labels = zip(made.dataset.labels[rows], made.wanted[rows], strict=True)
    names = [f"{classes[label][:14]} > {classes[wanted][:14]}" for label, wanted in labels]
    lines = [(name, clean[None], stamped[None]) for name, clean, stamped in zip(names, *pairs, strict=True)]
    draw_pairs(lines).save(examination.context.folder / "trigger.png", format="PNG")


def _print(trial: "Trial", examination: "Examination", result: dict[str, Any]) -> None:
    from dist_defend.counts import Count

    card, attack, folder = trial.card, examination.attack, examination.context.folder
    print(f"{trial.folder}: {card.arch}, {card.num_classes} classes, {card.image_size} px, {card.normalization}")
    if attack is None:
        print("no attack: the card names none; give --attack FILE or --triggered IMAGES")
    else:
        what = f"images {attack.images}" if attack.trigger is None else f"trigger {attack.trigger.name}"
        print(f"attack: {what}, wanted class: {examination.names()['targets'][examination.task]}")
    counts = {key: Count(**result["rows"][0][key]) for key in ("acc", "asr", "asr_all", "ra")}
    for name, count in counts.items():
        if count.n:
            print(f"  {name:<8}{count.percent:6.1f} %  {count.correct:7d} of {count.n}")
    by_class = {key: Count(**value) for key, value in result["metrics"]["per_class_accuracy"].items()}
    present = [(name, count) for name, count in by_class.items() if count.n]
    is_cut = len(present) > _SHOWN_CLASSES
    print(f"accuracy by class{f', the worst {_SHOWN_CLASSES} of {len(present)}' if is_cut else ''}:")
    for name, count in sorted(present, key=lambda pair: pair[1].percent)[:_SHOWN_CLASSES] if is_cut else present:
        print(f"  {count.percent:6.1f} %  {count.correct:7d} of {count.n:<7d} {name}")
    pictured = "" if attack is None else f"; {folder / 'trigger.png'} shows the trigger as measured"
    print(f"written: {folder / 'result.json'}{pictured}")
