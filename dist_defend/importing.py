"""``dist-defend import``: a checkpoint of somebody else's becomes a model folder."""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dist_defend import plugins
from dist_defend.errors import UserError
from dist_defend.files import fsync_path, sha256_file
from dist_defend.models.artifact import ModelCard, card_of, load_artifact, save_artifact
from dist_defend.models.candidates import MOST_PIXELS
from dist_defend.models.classifier import Classifier
from dist_defend.models.encoder import SimCLR
from dist_defend.models.foreign import import_encoder
from dist_defend.models.foreign_classifier import holds_classifier, import_classifier
from dist_defend.models.foreign_folder import read_weights
from dist_defend.models.foreign_images import SPLITS, MissingImages, PoisonedImages, read_poisoned
from dist_defend.models.foreign_report import ImportReport
from dist_defend.models.mappings import Choice
from dist_defend.models.pixel_space import normalization_constants, normalization_names

_MOST_NAMES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="checkpoint (.pth, .tar, .pt, .ckpt, .safetensors), a folder of weights, or the index of shards",
    )
    add("--out", type=Path, required=True, help="model folder to write")
    add("--kind", choices=("encoder", "classifier"), help="what to make of it; default: read off the keys")
    add("--arch", help="architecture, where the keys do not tell")
    add("--key", help="mapping to take, where the file holds several: its dotted path or last name (teacher, netC)")
    add("--prefix", help="what stands before the network's names, where several prefixes fit (backbone.)")
    add("--ignore", action="append", default=[], metavar="PATTERN", help="tensors to leave out (*_mask); may repeat")
    add(
        "--normalization",
        metavar="NAME",
        help=f"constants that the model was trained with: {', '.join(normalization_names())}, or numbers, mean,std or "
        "three of each; default: by layout and data set, else a guess that is marked",
    )
    add("--image-size", type=int, help="pixels; default: by layout and data set, else a guess that is marked")
    add("--by-position", action="store_true", help="tensors of other names: match them in the file's order")
    add(
        "--check",
        type=Path,
        metavar="DATA",
        help="prepared, labelled data of the model's task: measure which normalisation and size fit",
    )
    add("--backdoored", action="store_true", help="mark the model as poisoned")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Import, write, and say what was recognised. UserError for an unusable file or a folder that is taken."""
    lines, card, sha256 = _convert(args)
    print("\n".join(lines))
    print(f"wrote {args.out}, sha256 {sha256}, read back" + ("; marked BACKDOORED" if card.backdoored else ""))
    return 0


def convert(source: Path, out: Path, **options: Any) -> list[str]:
    """The command from Python, which gives the lines that it would print; options are its own. UserError as there."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    known = vars(parser.parse_args([".", "--out", "."]))
    if unknown := options.keys() - known.keys():
        raise UserError(f"unknown option '{min(unknown)}'; known: {', '.join(sorted(known.keys() - {'main', 'out'}))}")
    return _convert(argparse.Namespace(**(known | options | {"source": source, "out": out})))[0]


def _convert(args: argparse.Namespace) -> tuple[list[str], ModelCard, str]:
    """What is to be told, the card, and the sha256 of the weights."""
    plugins.allow([args.arch, args.normalization])
    if args.image_size is not None and not 1 <= args.image_size <= MOST_PIXELS:
        raise UserError(f"--image-size is {args.image_size}: it must be 1 to {MOST_PIXELS} pixels")
    if args.normalization is not None:
        normalization_constants(args.normalization)
    try:
        if (args.out / "model.json").exists():
            raise UserError(f"{args.out} already holds a model: name another folder with --out")
        lines, sha256 = _make(args)  # what was read is let go of before it is read back
        return lines, load_artifact(args.out)[1], sha256  # which checks the digest and every key
    except OSError as error:
        raise UserError(f"{args.out} cannot be written ({error.strerror}): name another folder with --out") from error


def _make(args: argparse.Namespace) -> tuple[list[str], str]:
    """Both files of the model, and the images of an attack; what is to be told, and the sha256 of the weights."""
    content, files = read_weights(args.source)
    choice = Choice(args.key, args.prefix, tuple(args.ignore))
    is_classifier = args.kind == "classifier"
    if args.kind is None:
        is_classifier = holds_classifier(content, args.source, choice, args.arch)
    make: Callable[..., tuple[Any, ImportReport]] = import_classifier if is_classifier else import_encoder
    how = {"content": content, "choice": choice, "by_position": args.by_position}
    model, report = make(args.source, args.arch, args.normalization, args.image_size, **how)
    poisoned, missing = _poisoned(content, args.source, report)
    rules = {split: images.rule(report.num_classes) for split, images in poisoned.items()}
    guessed, provenance, checked = _check(args, model, report)
    origin = _origin(args.source, files)
    facts = _without_names(report.facts, origin)
    card = card_of(
        model,
        backdoored=args.backdoored or bool(poisoned or missing),
        resize=report.resize,
        guessed=guessed,
        provenance={**origin, "layout": report.layout, **facts, **({"labels": rules} if rules else {}), **provenance},
    )
    told = [*_told(args, report, card.kind), *_guesses(guessed, report), *checked, *missing]
    told += [_images(args.out, split, images, rules[split]) for split, images in poisoned.items()]
    args.out.mkdir(parents=True, exist_ok=True)
    for split, images in poisoned.items():
        _write_npz(args.out / f"{split}.npz", images)
    return told, save_artifact(args.out, model, card)


def _poisoned(content: Any, source: Path, report: ImportReport) -> tuple[dict[str, PoisonedImages], list[str]]:
    """The images of an attack_result of BackdoorBench by split, and what is to be told of those that are not there."""
    poisoned: dict[str, PoisonedImages] = {}
    missing: list[str] = []
    is_attack = "clean_data" in report.facts and report.layout.startswith("BackdoorBench")
    for split in SPLITS if is_attack else ():
        size = report.facts.get("img_size")
        try:
            found = read_poisoned(content.get(split), split, source, size, report.num_classes)
        except MissingImages as error:
            missing.append(str(error))
            continue
        if found is not None:
            poisoned[split] = found
    return poisoned, missing


def _origin(source: Path, files: tuple[Path, ...]) -> dict[str, Any]:
    """Name and digest; of several files the digest of theirs, in the order of their names."""
    digests = [sha256_file(file) for file in sorted(files)]
    whole = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return {"method": "import", "file": source.name, "file_sha256": whole}


def _check(
    args: argparse.Namespace, model: SimCLR | Classifier, report: ImportReport
) -> tuple[tuple[str, ...], dict[str, Any], list[str]]:
    """What stays guessed, what goes to the card, and the lines of --check. Constants that fit are no longer guesses."""
    if args.check is None:
        return report.guessed, {}, []
    from dist_defend import import_check  # and with it the loaders
    from dist_defend.data.store import open_dataset

    data = open_dataset(args.check)
    trials = import_check.measure(model, data)
    used = next(trial for trial in trials if trial.is_used)
    fits = not import_check.differ(trials[0], used)
    provenance = {"check": {"data": str(args.check), "digest": data.digest, "trials": [t.plain() for t in trials]}}
    return () if fits else report.guessed, provenance, import_check.lines(trials, model, data)


def _told(args: argparse.Namespace, report: ImportReport, kind: str) -> list[str]:
    """What was recognised, line by line."""
    resized = f", brought to {report.resize} px by the model" if report.resize else ""
    matched = f", {len(report.renamed)} matched by order:" if report.renamed else ", matched by name"
    classes = f", {report.num_classes} classes" if report.num_classes else ""
    lines = [
        f"{args.source}: {report.layout}; {report.arch}{classes}",
        f"{report.num_tensors} tensors, {report.num_parameters} parameters{matched}",
        *(f"  {theirs} -> {ours}" for theirs, ours in report.renamed),
        f"normalization {report.normalization}, images of {report.image_size} px{resized}, {kind}",
    ]
    rest = {
        "left out": _grouped(report.dropped),
        "also in the file, with --key or --prefix": "; ".join(report.others),
        "objects beside the weights, not made and not called": _some(report.objects),
        "set to 0, as the file has none": _some(report.filled),
        "it says": ", ".join(f"{key} {json.dumps(value)}" for key, value in report.facts.items()),
    }
    return lines + [f"{what}: {names}" for what, names in rest.items() if names]


def _guesses(guessed: tuple[str, ...], report: ImportReport) -> list[str]:
    options = {"normalization": "--normalization", "image_size": "--image-size"}
    return [
        f"{key} {getattr(report, key)}: GUESSED, give {options[key]}, or measure it with import --check DATA"
        for key in guessed
    ]


def _grouped(names: tuple[str, ...]) -> str:
    """Names of tensors by what they begin with: "projector (projector.0.weight, ...; 6 tensors)"."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(name.split(".")[0], []).append(name)
    told = [
        f"{group} ({', '.join(members[:2])}{', ...; ' + str(len(members)) + ' tensors' if len(members) > 2 else ''})"
        if members != [group]
        else group
        for group, members in groups.items()
    ]
    return ", ".join(told[:_MOST_NAMES]) + (f", ... ({len(names)} tensors in all)" if len(told) > _MOST_NAMES else "")


def _without_names(facts: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """The file's figures, but for those that are called as what is kept of the file itself."""
    return {key: value for key, value in facts.items() if key not in (*names, "layout", "labels", "check")}


def _images(out: Path, split: str, images: PoisonedImages, rule: str) -> str:
    height, width = images.x.shape[1:3]
    return f"{split}: {len(images.x)} images of {height}x{width} px, {rule}, in {out / f'{split}.npz'}"


def _write_npz(path: Path, images: PoisonedImages) -> None:
    """Aside, then renamed; never a second time in memory."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.savez(file, x=images.x, y=images.y, y_bd=images.y_bd, index=images.index, flag=images.flag)
    fsync_path(aside)
    aside.replace(path)
    fsync_path(path.parent)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
