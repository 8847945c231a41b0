"""Experiment files, overrides and sweep files with things wrong: each is read, or refused by one line."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import yaml

from dist_defend.config import dump, load_experiment
from dist_defend.methods import find_method, method_names
from dist_defend.sweep.grid import load_sweep
from tests.fuzz.harness import ROOT, bad_outcomes
from tests.fuzz.mutate import SCALARS, mutate_bytes, mutate_tree

for _name in method_names():  # now, not while an input's time is taken
    find_method(_name)

SURFACES = ("experiment_bytes", "experiment_tree", "overrides", "sweep_bytes", "sweep_tree")
TEXTS = (
    b"&a ", b"*a", b"<<: *a\n", b"!!int ", b"!!binary ", b"!!python/name:os.system ", b"? ", b": ", b"- ", b"\t",
    b"|\n", b'"\\e[2J"', b'"\\0"', b'"\\uD800"', b"0x" + b"f" * 6000, b"9" * 5000, b".nan", b"-.inf", b"1e999",
    b"[" * 500, b"{a: " * 300, b"\xef\xbb\xbf", b"%YAML 9.9\n---\n", b"...\n---\n", b"~: 1\n", b"true", b"0100",
    b"1:30", b"=",
)  # fmt: skip


def laughs(text: str) -> str:
    """The text, then lines each of which stands for four times the one before."""
    lines = (f"\na{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 30))
    return "".join([text, "\na0: &a0 [x, x, x, x]", *lines])


@cache
def shipped() -> tuple[str, ...]:
    """The experiment files of the tree."""
    return tuple(
        p.read_text()
        for p in sorted((ROOT / "configs").rglob("*.yaml"))
        if p.parent.name not in ("sweeps", "reproduce")
    )


def broken(rng: random.Random, text: str) -> bytes:
    match rng.randrange(4):
        case 0:
            return laughs(text).encode()[: -rng.randint(1, 1000)]
        case 1:
            out = bytearray(text.encode())
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(len(out) + 1)
                out[at:at] = rng.choice(TEXTS)
            return bytes(out)
        case _:
            return mutate_bytes(rng, text.encode())


def tree_text(rng: random.Random, text: str) -> str:
    return str(yaml.dump(mutate_tree(rng, yaml.safe_load(text)), allow_unicode=rng.random() < 0.5, sort_keys=False))


def read_experiment(path: Path, overrides: list[str]) -> Callable[[], object]:
    def read() -> object:
        experiment = load_experiment(path, overrides)
        text = dump(experiment)
        assert load_again(path, text) == experiment
        return experiment

    return read


def load_again(path: Path, text: str) -> object:
    again = path.with_name("again.yaml")
    again.write_text(text)
    return load_experiment(again)


def experiment_bytes(rng: random.Random, folder: Path) -> Callable[[], object]:
    path = folder / "x.yaml"
    path.write_bytes(broken(rng, rng.choice(shipped())))
    return read_experiment(path, [])


def experiment_tree(rng: random.Random, folder: Path) -> Callable[[], object]:
    path = folder / "x.yaml"
    path.write_text(tree_text(rng, rng.choice(shipped())), errors="surrogatepass")
    return read_experiment(path, [])


def overrides(rng: random.Random, folder: Path) -> Callable[[], object]:
    text = rng.choice(shipped())
    tree = yaml.safe_load(text)
    keys = [
        "seed",
        "output",
        "trainer.trackers",
        "method",
        *(f"{tree['method']}.{key}" for key in tree[tree["method"]]),
    ]
    changes = []
    for _ in range(rng.randint(1, 3)):
        value = rng.choice((json.dumps(rng.choice(SCALARS)), rng.choice(TEXTS).decode(errors="replace")))
        change = f"{rng.choice(keys)}{rng.choice(('', '.x', '.name', '..'))}={value}"
        if rng.random() < 0.3:
            change = mutate_bytes(rng, change.encode()).decode(errors="surrogateescape")
        changes.append(change)
    path = folder / "x.yaml"
    path.write_text(text)
    return read_experiment(path, changes)


def sweep(rng: random.Random, folder: Path, content: Callable[[random.Random, str], bytes]) -> Callable[[], object]:
    """Sweep files name experiment files by their place in the tree, which is the working folder."""
    path = folder / "sweep.yaml"
    path.write_bytes(content(rng, rng.choice(small_sweeps())))
    return lambda: load_sweep(path)


@cache
def small_sweeps() -> tuple[str, ...]:
    """Two stages, every kind of list, Slurm's values; a shipped sweep has hundreds of points."""
    first = """
output: runs/sweep
throttle: 4
slurm: {time: 24:00:00, mem: 8G, cpus-per-task: 2, exclude: [n1, n2], requeue: true}
setup: [module load cuda]
stages:
  teacher:
    config: configs/defend/kd_cifar10.yaml
    set: {kd.teacher: runs/t/model, loader.workers: 1}
    product: {kd.temperature: [1, 4.5], kd.update.optimizer.lr: {low: 1e-3, high: 0.1}}
    seeds: [1, 2]
  student:
    after: teacher
    config: configs/defend/kd_cifar10.yaml
    set: {kd.teacher: "${teacher.output}/model"}
    zip: {kd.alpha: [0.5, 0.9], kd.evaluate_every: [1, 2]}
    explicit: {plain: {}, other: {kd.temperature: 2}}
    slurm: {time: 30}
"""
    config = "configs/pretrain/simclr_cifar10.yaml"
    return first, f"output: runs/one\nconfig: {config}\nproduct: {{simclr.temperature: [0.1, 0.5]}}\nseeds: [0]\n"


def sweep_bytes(rng: random.Random, folder: Path) -> Callable[[], object]:
    return sweep(rng, folder, broken)


def sweep_tree(rng: random.Random, folder: Path) -> Callable[[], object]:
    return sweep(rng, folder, lambda rng, text: tree_text(rng, text).encode(errors="surrogatepass"))


def test_what_is_broken_here_was_whole(tmp_path: Path) -> None:
    for number, text in enumerate(small_sweeps()):
        (tmp_path / f"{number}.yaml").write_text(text)
    assert [len(load_sweep(tmp_path / f"{number}.yaml").points) for number in (0, 1)] == [8 + 8 * 4, 2]
    assert len(shipped()) > 30


def test_read_or_refused(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_yaml:{','.join(SURFACES)}", count) == []
