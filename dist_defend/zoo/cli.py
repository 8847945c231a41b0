"""``dist-defend zoo``: models with counts that anybody can count again and make again."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError

_ZOO = Path("zoo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="add|list|verify|rebuild")
    add = commands.add_parser("add", help="take the model of a finished run, and count what it does")
    add.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run that has a model/")
    add.add_argument("--name", help="of the model in the zoo (default: the run folder's)")
    add.add_argument(
        "--measure", type=Path, metavar="FILE", help="of an encoder: an experiment file of method probe, kind knn"
    )  # fmt: skip
    add.set_defaults(main=_add)
    listed = commands.add_parser("list", help="a line for each model")
    listed.set_defaults(main=_list)
    verify = commands.add_parser("verify", help="check digests and count again: the same integers, or status 1")
    verify.set_defaults(main=_verify)
    rebuild = commands.add_parser("rebuild", help="make a model again from its YAML and compare the weights")
    rebuild.add_argument("--out", type=Path, metavar="DIR", help="keep the run there (default: nothing is kept)")
    rebuild.set_defaults(main=_rebuild)
    for command, count in ((verify, "*"), (rebuild, "+")):
        command.add_argument("names", nargs=count, metavar="NAME", help="models of the zoo")
    for command in (add, listed, verify, rebuild):
        command.add_argument("--zoo", type=Path, default=_ZOO, metavar="DIR", help=f"the zoo (default: {_ZOO})")


def _add(args: argparse.Namespace) -> int:
    """Copy the model and its YAML, count, write zoo.json. UserError for a run that is not finished or has no model."""
    from dist_defend.config import load_experiment
    from dist_defend.files import sha256_file
    from dist_defend.models.artifact import read_card
    from dist_defend.strict_json import read_json
    from dist_defend.zoo.counting import count
    from dist_defend.zoo.entry import FILES, Entry, check_name, write_entry
    from dist_defend.zoo.rebuild import machine

    if not (args.run / "result.json").is_file() or not (args.run / "model" / "model.json").is_file():
        raise UserError(f"{args.run} is no finished run with a model: it needs result.json and model/")
    try:
        folder = args.zoo / check_name(args.name or args.run.name)
    except ValueError as error:
        raise UserError(f"{error}: give another --name") from None
    if folder.exists():
        raise UserError(f"{folder} is there already: give another --name, or delete it")
    result = read_json(args.run / "result.json", "restore it", may_be_nan=True)
    experiment, card = load_experiment(args.run / "config.yaml"), read_card(args.run / "model")
    parents = _parents(args.zoo, experiment.resolved(), result.get("inputs", {}))
    measure = _measure(card.kind, experiment.resolved()[experiment.method], args.measure)
    sources = [args.run / "model" / name for name in FILES[:2]] + [args.run / "config.yaml"]
    counts, data = count(args.run / "model", measure, args.measure or args.run / "config.yaml")
    folder.mkdir(parents=True)
    for source, name in zip(sources, FILES, strict=True):
        shutil.copyfile(source, folder / name)
    files = {name: sha256_file(folder / name) for name in FILES}
    write_entry(folder, Entry(files, measure, counts, data, parents, machine(result.get("world_size", 1))))
    print("\n".join(_lines(folder.name, counts)))
    return 0


def _measure(kind: str, section: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """How a model is counted: a classifier on its run's test set, an encoder by the given file's probe."""
    from dist_defend.strict_yaml import read_yaml

    if kind == "classifier":
        if file is not None or not isinstance(section.get("test"), dict):
            raise UserError("a classifier is counted on the test set that its run names: leave out --measure")
        return dict(section["test"])
    if file is None:
        raise UserError("an encoder is counted by a probe: give --measure FILE, an experiment of method probe")
    found = read_yaml(file).get("probe")
    if not isinstance(found, dict):
        raise UserError(f"{file}: the section 'probe:' is missing; its kind is knn, its encoders are not read")
    return {key: value for key, value in found.items() if key != "encoders"}


def _parents(zoo: Path, resolved: dict[str, Any], inputs: dict[str, str]) -> dict[str, str]:
    """Key -> the zoo's model that stands there. UserError for a model folder that the zoo has not."""
    from dist_defend.zoo.entry import models_by_card

    known, parents = dict(models_by_card(zoo)), {}
    for key, digest in inputs.items():
        value: Any = resolved
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not isinstance(value, str) or not (Path(value) / "model.json").is_file():
            continue
        if digest not in known:
            raise UserError(f"key '{key}' is {value}, which is not in {zoo}: add that model first")
        parents[key] = known[digest]
    return parents


def _list(args: argparse.Namespace) -> int:
    """Name, kind, architecture, what was done to it, counts."""
    from dist_defend.keys import table
    from dist_defend.models.artifact import read_card
    from dist_defend.screen import printable
    from dist_defend.zoo.entry import names, read_entry

    rows = []
    for name in names(args.zoo):
        entry, card = read_entry(args.zoo, name), read_card(args.zoo / name)
        state = card.defended_by or ("BACKDOORED" if card.backdoored else "clean")
        told = "; ".join(line.partition(": ")[2] for line in _lines(name, entry.counts))
        rows.append((name, printable(f"{card.kind} {card.arch}", 60), printable(state, 40), printable(told, 400)))
    print("\n".join(table(rows)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    """Count all of them, or some, again. UserError for files that were altered and data that is missing or other."""
    from dist_defend.zoo.counting import count, differences
    from dist_defend.zoo.entry import names, read_entry

    failed = 0
    for name in args.names or names(args.zoo):
        entry, where = read_entry(args.zoo, name), args.zoo / name / "zoo.json"
        counts, data = count(args.zoo / name, entry.measure, where)
        for role, digest in data.items():
            if entry.data.get(role) != digest:
                was = entry.data.get(role, "none")
                raise UserError(
                    f"{where}: data '{role}' has sha256 {digest[:12]}, not {was[:12]}: prepare it as it was"
                )
        found = differences(entry.counts, counts)
        print("\n".join([f"{name}: OTHER COUNTS", *(f"  {line}" for line in found)] if found else _lines(name, counts)))
        failed += bool(found)
    return min(failed, 1)


def _rebuild(args: argparse.Namespace) -> int:
    """Status 1 where weights differ although the machine is of the same type."""
    from dist_defend.zoo.counting import count, differences
    from dist_defend.zoo.entry import read_entry
    from dist_defend.zoo.rebuild import distance, machine, rebuild

    failed = 0
    for name in args.names:
        entry, old = read_entry(args.zoo, name), args.zoo / name
        with tempfile.TemporaryDirectory() as scratch:
            new = rebuild(args.zoo, name, entry, (args.out or Path(scratch)) / name)
            apart = distance(old, new)
            if not apart:
                print(f"{name}: the same weights, sha256 {entry.files['model.safetensors']}")
                continue
            other = differences(entry.counts, count(new, entry.measure, old / "zoo.json")[0])
            here = machine(1)
            print(
                "\n".join([f"{name}: OTHER WEIGHTS: {apart}", *(f"  {line}" for line in other or ["the same counts"])])
            )
            unlike = [f"{key} {here[key]}, not {value}" for key, value in entry.made_on.items() if here[key] != value]
            print(f"  made on another type of machine: {'; '.join(unlike) or 'no'}")
            failed += not unlike
    return min(failed, 1)


def _lines(name: str, counts: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    from dist_defend.zoo.counting import told

    return [
        f"{name}: {task}: " + ", ".join(f"{key} {told(count)}" for key, count in found.items() if count["n"])
        for task, found in counts.items()
    ]
