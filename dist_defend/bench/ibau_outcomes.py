"""How far I-BAU's outcome is luck: one round from each of many seeds, here and as published, on the same images.

    python -m dist_defend.bench.ibau_outcomes MODEL DATA --out rows.csv

A seed gives the order of the defender's images and the choice of those that carry the perturbation. Each arm is one
change; all arms take the same seeds, so they are pairs. Rows are written as they come, and the summary compares the
arms `ours` and `published` if both were run.
"""

import argparse
import csv
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dist_defend.attacks.poison import triggered
from dist_defend.bench import runner
from dist_defend.bench.published import ibau as reference
from dist_defend.counts import Count, evaluate_classifier
from dist_defend.data.loader import DatasetConfig, Loader, LoaderConfig, make_loader
from dist_defend.data.store import PreparedDataset, open_dataset
from dist_defend.engine import dist
from dist_defend.engine.dist import Ranks
from dist_defend.engine.optim import OptimizerConfig
from dist_defend.engine.step import Position
from dist_defend.evaluate_command import read_attack
from dist_defend.methods.defend.ibau.options import Config
from dist_defend.methods.defend.ibau.rounds import Rounds
from dist_defend.methods.defend.ibau.step import UnlearningStep
from dist_defend.models.artifact import load_classifier, read_card
from dist_defend.models.classifier import Classifier
from dist_defend.ops.streams import Stream, draws

SIGNIFICANT = 0.05
COUNTED = [f"{name}_{key}" for name in ("acc", "asr", "asr_all", "ra") for key in ("correct", "n")]
SEEN = ["own_acc", "moved_before", "moved_after", "moved_again", "old", "again"]
COLUMNS = ["arm", "seed", *COUNTED, "delta_norm", "delta_norm_min", "outer_loss", *SEEN, "cpu_seconds"]


@dataclass(frozen=True)
class Arm:
    """One way to run a round. ``varies``: what follows the seed; the rest is as of seed 0."""

    side: Literal["ours", "published"] = "ours"
    drawn_by: Literal["ours", "published"] = "ours"  # what chooses the images that carry delta
    varies: tuple[str, ...] = ("order", "patched")
    K: int = 5
    is_projected: bool = False  # the notebooks' line that defense.py leaves out
    times_patched: int = 1
    times_lr: float = 1.0
    unlearns: bool = True
    orders: int | None = None  # the order that varies is the first one


ARMS = {
    "ours": Arm(),
    "published": Arm(side="published", drawn_by="published"),
    "published_our_draws": Arm(side="published"),
    "order_alone": Arm(varies=("order",)),
    "patched_alone": Arm(varies=("patched",)),
    "K_1": Arm(K=1),
    "K_10": Arm(K=10),
    "projected": Arm(is_projected=True),
    "patched_times_5": Arm(times_patched=5),
    "half_rate": Arm(times_lr=0.5),
    "inner_pass": Arm(unlearns=False),
    "orders_8": Arm(orders=8),
}


class Outcome(NamedTuple):
    """Of a round: the model, delta and its norm, the mean outer loss, and the smallest norm of several orders."""

    model: Classifier
    delta: Tensor
    norm: float
    loss: float
    least: float | None = None


class Study:
    """The suspect, the defender's images and the test set, with which every arm begins."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.model
        self.ranks: Ranks = dist.start(args.precision, world_size=1)
        self.data: PreparedDataset = open_dataset(args.data, args.resize)
        is_named = args.attack is not None or read_card(args.model).attack is not None
        self.attack = read_attack(args.attack or args.model) if is_named else None
        rows = np.arange(args.num_images, args.num_images + args.num_test)
        self.clean = self._loader(self.data, rows, 128)
        self.triggered = self._loader(triggered(self.data, self.attack), rows, 128) if self.attack else None
        self.lr = Config("", DatasetConfig(""), DatasetConfig("")).optimizer.lr

    def suspect(self) -> Classifier:
        """As it was imported, in eval mode."""
        return load_classifier(self.folder)[0].eval().to(self.ranks.device, self.ranks.dtype)

    def row(self, name: str, seed: int) -> dict[str, Any]:
        """One run of an arm: counts, and what the defender sees of it without the trigger."""
        arm, started = ARMS[name], time.process_time()
        order, patched = (seed if what in arm.varies else 0 for what in ("order", "patched"))
        rows = order_of(self.args.num_images, order)
        batches = self.batches(rows)
        if not arm.unlearns:
            return {"arm": name, "seed": seed, **self.found(batches)}
        run = self.ours if arm.side == "ours" else self.published
        model, delta, norm, loss, least = run(arm, rows, batches, patched)
        seconds = time.process_time() - started
        counts = self.measure(model)
        return {
            "arm": name,
            "seed": seed,
            **columns(counts),
            "delta_norm": f"{norm:.6g}",
            "delta_norm_min": "" if least is None else f"{least:.6g}",
            "outer_loss": f"{loss:.6g}",
            **self.seen(model, delta, batches),
            "cpu_seconds": f"{seconds:.1f}",
        }

    def ours(self, arm: Arm, rows: np.ndarray, batches: Sequence[reference.Batch], seed: int) -> Outcome:
        """The method's own step."""
        model, args = self.suspect(), self.args
        config = Config(
            "",
            DatasetConfig(""),
            DatasetConfig(""),
            batch_size=args.batch_size,
            project_radius=args.radius if arm.is_projected else None,
            orders=arm.orders,
            K=arm.K,
            optimizer=OptimizerConfig("adam", lr=self.lr * arm.times_lr),
            patched_fraction=0.0,
            min_patched=args.num_patched * arm.times_patched,
        )
        loader = self._loader(self.data, rows, args.batch_size)
        rounds = Rounds(loader, model.image_size, self.ranks, orders=config.num_orders)
        step = UnlearningStep(model, config, rounds, seed)
        norm, least, losses = 0.0, None, []
        for number, batch in enumerate(rounds.epoch(0)):
            scalars = step(runner.on_device(batch, self.ranks), Position(epoch=0, batch=number))
            norm = scalars["delta_norm"].item() if "delta_norm" in scalars else norm
            least = scalars["delta_norm_min"].item() if "delta_norm_min" in scalars else least
            losses += [scalars["outer_loss"].item()] if "outer_loss" in scalars else []
        return Outcome(model, step.delta.detach().clone(), norm, statistics.fmean(losses), least)

    def published(self, arm: Arm, rows: np.ndarray, batches: Sequence[reference.Batch], seed: int) -> Outcome:
        """YiZeng623/I-BAU's loop; Python's generator chooses, unless it shall have our draws."""
        model, count = self.suspect(), self.args.num_patched * arm.times_patched
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr * arm.times_lr)
        delta = reference.inner_pass(model, batches, self.ranks.device)
        norm = delta.norm().item()
        delta = delta * min(1.0, self.args.radius / norm) if arm.is_projected else delta
        generator, losses = random.Random(seed), []
        for number, batch in enumerate(batches):
            size = len(batch[1])
            if arm.drawn_by == "published":
                chosen = generator.sample(list(range(size)), count)
            else:
                chosen = draws(seed, Stream.PATCHED, 0, number).choice(size, count, replace=False).tolist()
            losses.append(reference.outer_step(model, optimizer, delta, batches[0], batch, chosen, arm.K))
        return Outcome(model, delta, norm, statistics.fmean(losses))

    def measure(self, model: Classifier) -> dict[str, Count]:
        """ACC, ASR, ASR-all and RA on test images that are not the defender's."""
        return evaluate_classifier(model, self.clean, self.triggered, self.ranks, self.attack)

    def found(self, batches: Sequence[reference.Batch]) -> dict[str, Any]:
        """The perturbation alone: its norm, the class that it moves images to, and how many of the defender's."""
        started, model = time.process_time(), self.suspect()
        delta = reference.inner_pass(model, batches, self.ranks.device)
        with torch.no_grad():
            share, place = moved(model, torch.cat([batch[0] for batch in batches]).to(delta.device), delta)
        seconds = f"{time.process_time() - started:.1f}"
        return {
            "delta_norm": f"{delta.norm():.6g}",
            "moved_before": f"{share:.1f}",
            "old": place,
            "cpu_seconds": seconds,
        }

    @torch.no_grad()
    def seen(self, model: Classifier, delta: Tensor, batches: Sequence[reference.Batch]) -> dict[str, Any]:
        """Of the defender's own images, in percent: how many delta moves to one class, in the suspect and afterwards.

        again: by a perturbation that is sought anew in the purified network. old and again are the class's number.
        """
        images = torch.cat([batch[0] for batch in batches]).to(self.ranks.device)
        with torch.enable_grad():
            again = reference.inner_pass(model, batches, self.ranks.device)
        again = again * (delta.norm() / again.norm()).clamp(max=1)
        before, suspect_class = moved(self.suspect(), images, delta)
        after, _ = moved(model, images, delta)
        anew, class_anew = moved(model, images, again)
        labels = torch.cat([batch[1] for batch in batches]).to(images.device)
        own = 100 * (logits(model, images).argmax(1) == labels).double().mean().item()
        values = {"own_acc": own, "moved_before": before, "moved_after": after, "moved_again": anew}
        return {**{k: f"{v:.1f}" for k, v in values.items()}, "old": suspect_class, "again": class_anew}

    def batches(self, rows: np.ndarray) -> list[reference.Batch]:
        """(images, labels) of these rows, in their order, in host memory."""
        pixels = runner.to_pixels(self.data.images(rows), torch.device("cpu")).to(self.ranks.dtype).contiguous()
        labels = torch.from_numpy(self.data.labels[rows])
        return list(zip(pixels.split(self.args.batch_size), labels.split(self.args.batch_size), strict=True))

    def _loader(self, data: PreparedDataset, rows: np.ndarray, batch_size: int) -> Loader:
        config = LoaderConfig("torch", 1)
        return make_loader(data, config=config, batch_size=batch_size, rows=rows, device=self.ranks.device)


def order_of(count: int, seed: int) -> np.ndarray:
    """The defender's rows (count,) in the order of a seed."""
    return np.random.default_rng([seed, 1]).permutation(count)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(N, classes) of images (N, 3, H, W), some at a time."""
    return torch.cat([model(some) for some in images.split(100)])


def moved(model: nn.Module, images: Tensor, delta: Tensor) -> tuple[float, int]:
    """The class that delta moves most images to, and how many, in percent of those that are not of it without delta."""
    plain, changed = logits(model, images), logits(model, images + delta)
    classes = plain.shape[1]
    own, found = plain.argmax(1), changed.argmax(1)
    outside = len(images) - torch.bincount(own, minlength=classes)
    arrived = torch.bincount(found[found != own], minlength=classes)
    shares = 100 * arrived / outside.clamp(min=1)
    return shares.max().item(), int(shares.argmax())


def columns(counts: dict[str, Count]) -> dict[str, int]:
    """name_correct and name_n of each count."""
    return {f"{name}_{key}": value for name, count in counts.items() for key, value in count.plain().items()}


def rows_of(study: Study, arms: Sequence[str], seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Seed by seed, so that a run that is cut short has all arms with as many seeds. First: the suspect itself."""
    counts = study.measure(study.suspect())
    yield {"arm": "suspect", "seed": "", **columns(counts)}
    for seed in seeds:
        for arm in arms:
            yield study.row(arm, seed)


def percent(row: dict[str, Any], name: str) -> float:
    """A rate of a row."""
    return 100 * int(row[f"{name}_correct"]) / int(row[f"{name}_n"])


def compared(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """p values of Kolmogorov and Smirnov's test and of a permutation test of the difference of means, two-sided."""
    from scipy.stats import ks_2samp, permutation_test

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
        return x.mean(axis=axis) - y.mean(axis=axis)

    samples = np.asarray(first, float), np.asarray(second, float)
    means = permutation_test(samples, difference, vectorized=True, n_resamples=9999, rng=np.random.default_rng(0))
    return float(ks_2samp(*samples).pvalue), float(means.pvalue)


def summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines: each arm's mean, deviation, median and range of ACC and ASR, and the tests of ours against published."""
    lines: list[str] = []
    values: dict[tuple[str, str], list[float]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for name in ("acc", "asr"):
            x = [percent(row, name) for row in rows if row["arm"] == arm and row.get(f"{name}_n")]
            if not x:
                continue
            values[arm, name] = x
            spread = f" ± {statistics.stdev(x):.1f}" if len(x) > 1 else ""
            middle = f"median {statistics.median(x):.1f}, {min(x):.1f} to {max(x):.1f}, n = {len(x)}"
            lines.append(f"{arm}: {name} {statistics.fmean(x):.1f}{spread}, {middle}")
    for other in ("published", "published_our_draws"):
        for name in ("acc", "asr"):
            pair = [values.get((arm, name), []) for arm in ("ours", other)]
            if min(map(len, pair)) > 1:
                ks, means = compared(*pair)
                word = "differ" if min(ks, means) < SIGNIFICANT else "no difference seen"
                lines.append(f"ours against {other}, {name}: KS p = {ks:.2f}, means p = {means:.2f}: {word}")
    return lines


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    command = argparse.ArgumentParser(prog="python -m dist_defend.bench.ibau_outcomes", description=__doc__)
    command.add_argument("model", type=Path, help="model folder of the suspect")
    command.add_argument("data", help="a prepared split; its first rows are the defender's, the next ones the test")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV file of the rows")
    command.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:3])
    command.add_argument("--seeds", type=int, default=10, metavar="N", help="0 to N - 1")
    command.add_argument("--attack", type=Path, help="as dist-defend evaluate has it; default: the card's, if any")
    command.add_argument("--resize", type=int, metavar="PIXELS", help="side of the images; default: as they are")
    command.add_argument("--radius", type=float, default=10.0, help="of the ball of the arm projected")
    command.add_argument("--num-images", type=int, default=5000, help="the defender's images")
    command.add_argument("--num-test", type=int, default=5000, help="test images, clean and triggered")
    command.add_argument("--batch-size", type=int, default=100)
    command.add_argument("--num-patched", type=int, default=1, help="images of a batch that carry delta")
    command.add_argument("--precision", choices=("fp32", "fp64"), default="fp32")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the arms, print and write each row, print the summary."""
    args = parser().parse_args(arguments)
    study, rows = Study(args), []
    with args.out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for row in rows_of(study, args.arms, range(args.seeds)):
            rows.append(row)
            table.writerow(row)
            file.flush()  # a run that is ended leaves what there is
            print(*(f"{key} {value}" for key, value in row.items()), flush=True)
    print(*summary(rows), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
