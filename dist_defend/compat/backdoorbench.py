"""SCLBD/BackdoorBench's class interface to its defences ``rnp`` and ``i_bau``, for scripts that were written for it.

A script runs when its import line is changed, see docs/backdoorbench.md. Everything is computed by ``dist_defend.api``
with preset backdoorbench; here are names, defaults and files alone.
"""

import argparse
import csv
import hashlib
import io
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from dist_defend import api
from dist_defend.compat.parameters import COMMON, IBAU, NOT_USED, RNP, Parameter, add_parameters, complete
from dist_defend.data.loader import DatasetConfig, select_rows
from dist_defend.data.sources import ArraySource
from dist_defend.data.store import PreparedDataset, open_dataset, write_dataset
from dist_defend.errors import UserError
from dist_defend.files import read_regular, sha256_file, write_atomic
from dist_defend.methods.defend.defender import read_index
from dist_defend.models.artifact import ModelCard, read_card
from dist_defend.models.classifier import Classifier
from dist_defend.models.export import defense_result
from dist_defend.results import read_metrics
from dist_defend.strict_json import read_json

_MOST_BYTES = 256 << 20  # of metrics.jsonl and mask_values.txt
_METRICS = ("test_acc", "test_asr", "test_ra")


class _Defense(ABC):
    """What both classes have. args: a namespace of parameters, which gets a value for each of them, as there."""

    name: ClassVar[str]  # of the folder below defense/
    method: ClassVar[str]
    parameters: ClassVar[tuple[Parameter, ...]]
    documented: ClassVar[dict[str, Any]]  # defaults that its parser leaves to the yaml file
    unused: ClassVar[set[str]]
    only: ClassVar[dict[str, tuple[Any, str]]]  # the one value that a parameter may have, and why

    def __init__(self, args: argparse.Namespace) -> None:
        values = complete(
            args, self.parameters, self.documented, f"./config/defense/{self.name}/config.yaml", self.unused
        )
        vars(args).update(values)
        self.args = args
        for name, (value, reason) in self.only.items():
            if values[name] not in (None, value):
                raise UserError(f"--{name} is {values[name]}: {reason}; leave it out")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add BackdoorBench's flags of this defence."""
        add_parameters(parser, cls.parameters)

    def defense(self, result_file: str) -> dict[str, Any]:
        """Defend the network of record/<result_file>/attack_result.pt.

        The result: ``model``, the network, which takes images normalised as BackdoorBench does; ``ACC``, ``ASR`` and
        ``RC``, fractions of the clean and of the triggered test images. record/<result_file>/defense/<name>/ gets the
        files that docs/backdoorbench.md lists. UserError, one line, for files and parameters that do not fit.
        """
        source = Path("record") / result_file / "attack_result.pt"
        if not source.is_file():
            raise UserError(f"{source} is not there: result_file names the folder below record/ that holds it")
        out = source.parent / "defense" / self.name
        suspect = out / f"suspect-{sha256_file(source)[:12]}"
        triggered = suspect / "bd_test.npz"
        if not (suspect / "model.json").is_file() or not triggered.is_file():
            shutil.rmtree(suspect, ignore_errors=True)
            api.load(source, folder=suspect, kind="classifier")
        if not triggered.is_file():
            raise UserError(f"{source} comes without the images of bd_test: put its bd_test_dataset folder beside it")
        card = read_card(suspect)
        train, test = self._data(card, source)
        given: dict[str, Any] = {
            "data": {"path": str(train.path)},
            "preset": "backdoorbench",
            "seed": self.args.random_seed,
            "loader": {"workers": max(1, self._whole("num_workers"))},
            **self._options(train, out),
        }
        given["augment"] = {"crop": "pad", "pad": 4, "flip": 0.5 if self._dataset(card) == "cifar10" else 0.0}
        named = [getattr(self.args, name, None) for name in ("index", "mask_file")]
        files = [sha256_file(Path(path)) for path in named if path is not None and Path(path).is_file()]
        told = json.dumps([suspect.name, files, given], sort_keys=True, default=str)
        digest = hashlib.sha256(told.encode()).hexdigest()
        run = out / f"run-{digest[:12]}"
        result = api.defend(
            self.method,
            suspect,
            given.pop("data"),
            test=str(test),
            attack=api.attack(images=str(triggered)),
            output=run,
            device=self._device(),
            **given,
        )
        counts = result.after
        assert counts is not None and isinstance(result.model, Classifier)
        parts = {"ACC": counts.acc, "ASR": counts.asr, "RC": counts.ra}
        rates = {name: count.correct / count.n if count.n else math.nan for name, count in parts.items()}
        logs = Path(self.args.log or out / "log")
        logs.mkdir(parents=True, exist_ok=True)
        rows = train.source_rows[self._chosen(train)]
        write_atomic(logs / "index.txt", "".join(f"{row}\n" for row in rows))
        write_atomic(out / "defense_result.pt", defense_result(result.model, read_card(run / "model"))[0])
        self._write(out, run, counts, list(rates.values()))
        return {"model": result.model.net, **rates}

    def _data(self, card: ModelCard, source: Path) -> tuple[PreparedDataset, Path]:
        """The prepared training set, and the folder of the test set."""
        for flag, fact in (("dataset", "clean_data"), ("model", "model_name")):
            own, told = getattr(self.args, flag), card.provenance.get(fact)
            if own is not None and told is not None and own != told:
                raise UserError(f"--{flag} is {own}, but {source} says {told}: give that, or leave --{flag} out")
        folder = Path(str(self.args.dataset_path)) / self._dataset(card)
        for split in ("train", "test"):
            if not (folder / split / "manifest.json").is_file():
                raise UserError(
                    f"{folder / split} is no prepared data set: `dist-defend data prepare {folder.name} --path "
                    f"DOWNLOADS --out {folder}` makes it, or give --dataset_path"
                )
        return open_dataset(folder / "train"), folder / "test"

    def _dataset(self, card: ModelCard) -> str:
        return str(self.args.dataset or card.provenance.get("clean_data"))

    def _chosen(self, train: PreparedDataset) -> np.ndarray:
        """The defender's rows (M,), ascending: those of the index file, or a random part."""
        if self.args.index is not None:
            return train.rows_of(read_index(self.args.index, train.num_source_rows, "index"))
        config = DatasetConfig(str(train.path), fraction=self.args.ratio, subset="random")
        return select_rows(train, config, self.args.random_seed)

    def _device(self) -> str | None:
        device = self.args.device
        if device is None or (device == "cuda" and not torch.cuda.is_available()):
            return None
        if "," in str(device):
            raise UserError(f"--device is {device}: give one device, or run the YAML file with dist-defend launch")
        return str(device)

    def _whole(self, name: str) -> int:
        try:
            return int(getattr(self.args, name))
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"--{name} is {getattr(self.args, name)!r}: give a number") from None

    @abstractmethod
    def _options(self, train: PreparedDataset, out: Path) -> dict[str, Any]:
        """Keys of the method's section, and ``data`` where it is not all of the training set."""

    @abstractmethod
    def _write(self, out: Path, run: Path, counts: api.Counts, rates: Sequence[float]) -> None:
        """The tables that this defence writes there. rates: of the delivered model, as _METRICS."""


class rnp(_Defense):
    """Reconstructive neuron pruning (Li et al., ICML 2023), as SCLBD/BackdoorBench runs it; see docs/methods/rnp.md."""

    name, method = "rnp", "rnp"
    parameters = (*COMMON, *RNP)
    documented: ClassVar[dict[str, Any]] = {
        "acc_ratio": 0.95,
        "ratio": 0.1,
        "dataset_path": "./data",
        "batch_size": 256,
        "num_workers": 4,
        "random_seed": 0,
    }
    unused: ClassVar[set[str]] = NOT_USED | {"lr", "wd"}
    only: ClassVar[dict[str, tuple[Any, str]]] = {
        "amp": (False, "masks that are learned in half precision are others, and are not offered"),
        "client_optimizer": ("sgd", "RNP takes SGD there and here"),
    }

    def _options(self, train: PreparedDataset, out: Path) -> dict[str, Any]:
        own = [parameter.name for parameter in RNP if parameter.name != "amp"]
        options = {name: getattr(self.args, name) for name in (*own, "batch_size", "index")}
        return options if self.args.index is not None else {**options, "ratio": self.args.ratio}

    def _write(self, out: Path, run: Path, counts: api.Counts, rates: Sequence[float]) -> None:
        write_atomic(out / "mask_values.txt", read_regular(run / "mask_values.txt", _MOST_BYTES))
        lines = (run / "mask_values.txt").read_text().splitlines()[1:]
        masks = sorted(float(line.split()[3]) for line in lines)
        stops = read_json(run / "sweep.json", f"delete {run} to run it again")
        by, rows = self.args.pruning_by, []
        for stop in stops[1:-1]:  # the first prunes nothing, the last is the delivered one
            is_threshold = by == "threshold"
            at = stop["threshold"] if is_threshold else stop["pruned"] - math.ceil(self.args.pruning_step)
            mask = masks[min(stop["pruned"], len(masks) - 1) if is_threshold else stop["pruned"] - 1]
            tested = [stop[name]["correct"] / stop[name]["n"] for name in ("acc", "asr", "ra")]
            rows.append([at, mask, *tested])
        _write_csv(out / f"{by}_df.csv", ["", by, "value", *_METRICS], ([n, *row] for n, row in enumerate(rows)))
        _write_csv(out / "rnp_df_summary.csv", ["", *_METRICS], [[0, *rates]])


class i_bau(_Defense):
    """Unlearning by implicit hypergradients (Zeng et al., ICLR 2022), as SCLBD/BackdoorBench runs it.

    See docs/methods/ibau.md.
    """

    name, method = "i-bau", "ibau"
    parameters = (*COMMON, *IBAU)
    documented: ClassVar[dict[str, Any]] = {
        "n_rounds": 10,
        "K": 10,
        "ratio": 0.05,
        "dataset_path": "./data",
        "batch_size": 256,
        "num_workers": 4,
        "lr": 1e-4,
        "wd": 0.0,
        "adam_betas": [0.9, 0.999],
        "random_seed": 0,
    }
    unused: ClassVar[set[str]] = NOT_USED | {"amp"}
    only: ClassVar[dict[str, tuple[Any, str]]] = {
        "optim": ("Adam", "BackdoorBench reads it and takes Adam all the same"),
        "client_optimizer": ("adam", "its published yaml files take Adam, and nothing else is offered here"),
    }

    def _options(self, train: PreparedDataset, out: Path) -> dict[str, Any]:
        args = self.args
        adam = {"name": "adam", "lr": args.lr, "weight_decay": args.wd, "betas": args.adam_betas, "amsgrad": True}
        options = {"rounds": args.n_rounds, "K": args.K, "batch_size": args.batch_size, "optimizer": adam}
        if args.index is None:
            return {**options, "data": {"path": str(train.path), "fraction": args.ratio, "subset": "random"}}
        rows = self._chosen(train)
        folder = out / f"images-{hashlib.sha256(rows.tobytes()).hexdigest()[:12]}"
        if not (folder / "manifest.json").is_file():
            images = ArraySource(train.images(rows), train.labels[rows], list(train.classes))
            write_dataset(images, folder, name=train.manifest.name, split="train", storage="npy")
        return {**options, "data": {"path": str(folder)}}

    def _write(self, out: Path, run: Path, counts: api.Counts, rates: Sequence[float]) -> None:
        path = run / "metrics.jsonl"
        found = [row for row in read_metrics(read_regular(path, _MOST_BYTES), str(path), "")[0] if "acc" in row]
        sizes = {"acc": counts.acc.n, "asr": counts.asr.n, "ra": counts.ra.n}
        table = [[round(row[name] * n / 100) / n for name, n in sizes.items() if n] for row in found]
        _write_csv(out / "i-bau_df.csv", ["", "epoch", *_METRICS], ([n, n, *row] for n, row in enumerate(table)))
        columns = list(zip(*table, strict=True))
        summary = [["last", len(table) - 1, *table[-1]], ["valid_max", len(table) - 1, *map(max, columns)]]
        finite = ["exist_nan_value", *[False] * (1 + len(columns))]
        _write_csv(out / "i-bau_df_summary.csv", ["", "epoch", *_METRICS], [*summary, finite])


def _write_csv(path: Path, head: list[str], rows: Iterable[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    write_atomic(path, text.getvalue())
