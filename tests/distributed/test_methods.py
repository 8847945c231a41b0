"""World size is not a hyperparameter: one rank with batch 2B is two ranks with B, for every method as it is built."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_defend import counts as counting
from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.patterns import BadNets
from dist_defend.attacks.poison import triggered
from dist_defend.data.loader import LoaderConfig, make_loader
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context
from dist_defend.methods.attack import drupe
from dist_defend.methods.measure.probe import FeatureBatches, ProbeObjective
from dist_defend.models.artifact import load_simclr
from dist_defend.models.heads import HeadStack
from dist_defend.ops import losses
from dist_defend.ops.collectives import all_gather_rows
from tests.distributed.comparison import Mutation, assert_same, none, train
from tests.ranks import Pool
from tests.runs import CLASSES, make_data, make_experiment, make_model, options_of


def negatives_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(losses, "all_gather_rows", lambda x, rows: x)
    patch.setattr(losses, "world_size", lambda: 1)
    patch.setattr(losses, "rank", lambda: 0)


def negatives_without_gradient(patch: pytest.MonkeyPatch) -> None:
    def gather(x: Tensor, rows: list[int]) -> Tensor:
        start = sum(rows[: torch.distributed.get_rank()])
        others = all_gather_rows(x.detach(), rows)
        return torch.cat([others[:start], x, others[start + len(x) :]])

    patch.setattr(losses, "all_gather_rows", gather)


def features_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drupe, "all_gather_rows", lambda x, rows: x)


def losses_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(drupe, "all_reduce_sum", lambda x: 2 * x)


def statistics_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Context, "synchronise", lambda self, model: model)


def gradients_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("accelerate.Accelerator.prepare_model", lambda self, model, **options: model)


def mean_over_own_rows(patch: pytest.MonkeyPatch) -> None:
    """No all-reduce of the count: an uneven batch then weighs the rows of the smaller share more."""

    def build(self: ProbeObjective, heads: HeadStack, ranks: dist.Ranks) -> None:
        original(self, heads, ranks)
        self.world_size = 1

    original = ProbeObjective.__init__
    patch.setattr(ProbeObjective, "__init__", build)


def dropout_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    def draw(self: FeatureBatches, seed: int, *place: int) -> Tensor:
        return original(self, seed + 1000 * self.context.ranks.rank, *place)

    original = FeatureBatches._kept
    patch.setattr(FeatureBatches, "_kept", draw)


def critics_drawn_in_turn(patch: pytest.MonkeyPatch) -> None:
    """First weights by the order in which a rank builds its critics instead of by layer."""
    patch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    patch.setattr(torch, "manual_seed", lambda seed: None)


def estimates_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    def reduce(tensor: Tensor, *operation: Any) -> Any:
        return None if tensor.shape == (4,) else original(tensor, *operation)

    original = torch.distributed.all_reduce
    patch.setattr(torch.distributed, "all_reduce", reduce)


SLOW = {"update": {  # at the usual rate an update multiplies rounding errors
    "batch_size": 4, "epochs": 2, "optimizer": {"name": "sgd", "lr": 1e-3, "momentum": 0.9},
}}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # name -> method, changes of its options
    "simclr": ("simclr", SLOW),
    "simclr_patched": ("simclr", SLOW | {
        "attack": {"trigger": {"name": "random_patch", "size": 8}, "labels": "clean_label", "count": 3},
    }),
    "simclr_accumulated": ("simclr", {"update": {"batch_size": 8, "epochs": 1, "accumulation": 2}}),
    "badencoder": ("badencoder", {}),
    "drupe": ("drupe", {  # an epoch that draws references apart, two of the whole, and costs that change
        "warm_up_epochs": 1, "spread_after": 0, "adapt_after": 0, "effective_below": 1.0, "cost": 2.0,
        "distance_cost": 0.5, "update": {"batch_size": 4, "epochs": 3, "optimizer": {
            "name": "sgd", "lr": 1e-3, "momentum": 0.9,
        }},
    }),
    "mimic": ("mimic", {}),
    "mimic_student_infonce": ("mimic", {"information": {
        "source": "student", "estimator": "infonce", "epochs": 2, "last_epochs": 2, "batch_size": 6, "hidden": 8,
    }}),
    "ft_simclr": ("ft_simclr", SLOW),
    "nad_simclr": ("nad_simclr", SLOW),
    "probe": ("probe", {}),
    "probe_linear": ("probe", {"hidden": []}),
    "probe_standardised": ("probe", {
        "hidden": [], "standardise": True, "attack": {"trigger": {"name": "random_patch", "size": 4}},
    }),
    "probe_knn": ("probe", {"kind": "knn", "knn": {"k": 3}}),
    "classifier": ("classifier", {}),
    "classifier_all_to_all": ("classifier", {"attack": {
        "trigger": {"name": "blended"}, "labels": "all_to_all", "rate": 0.5,
    }}),
}  # fmt: skip


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """An experiment file and what one rank makes of it; each is run once."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def run(name: str) -> tuple[Path, dict[str, Any]]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            method, changes = CASES[name]
            config = make_experiment(folder, method, options_of(method, folder) | changes)
            done[name] = config, train(config, folder / "one rank" / "run")
        return done[name]

    return run


@pytest.mark.parametrize("name", [n for n in CASES if n != "simclr_accumulated"])
def test_two_ranks_are_one_rank(name: str, cases: Any, two_ranks: Pool, tmp_path: Path) -> None:
    config, alone = cases(name)
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    assert_same({**second, "rows": alone["rows"]}, alone)


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("simclr", negatives_of_one_rank),
        ("simclr", negatives_without_gradient),
        ("simclr", statistics_of_one_rank),
        ("badencoder", gradients_of_one_rank),
        ("drupe", features_of_one_rank),
        ("drupe", losses_of_one_rank),
        ("mimic", negatives_of_one_rank),
        ("mimic", statistics_of_one_rank),
        ("mimic", critics_drawn_in_turn),
        ("mimic", estimates_of_one_rank),
        ("ft_simclr", negatives_of_one_rank),
        ("nad_simclr", statistics_of_one_rank),
        ("classifier", statistics_of_one_rank),
        ("classifier", gradients_of_one_rank),
        ("probe", mean_over_own_rows),
        ("probe", dropout_of_one_rank),
    ],
)
def test_the_comparison_catches(name: str, mutate: Mutation, cases: Any, two_ranks: Pool, tmp_path: Path) -> None:
    config, alone = cases(name)
    first, _ = two_ranks.run(train, config, tmp_path / "two ranks" / "run", mutate)
    with pytest.raises(AssertionError, match="off by"):
        assert_same(first, alone)


def test_a_fresh_projector_is_that_of_one_rank(two_ranks: Pool, tmp_path: Path) -> None:
    bare = {"model": make_model(tmp_path / "bare", projector=False), "projector": SLOW["update"]}
    config = make_experiment(tmp_path, "ft_simclr", options_of("ft_simclr", tmp_path) | SLOW | bare)
    alone = train(config, tmp_path / "one rank" / "run")
    assert alone["states"].keys() == {"projector", "ft_simclr"}
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert_same(first, alone)
    assert_same({**second, "rows": alone["rows"]}, alone)


def test_accumulation_splits_each_ranks_share(cases: Any, two_ranks: Pool, tmp_path: Path) -> None:
    """Micro-batches of 2 on two ranks against micro-batches of 4 on one: both see 4 images at once."""
    config, alone = cases("simclr_accumulated")
    first, second = two_ranks.run(train, config, tmp_path / "two ranks" / "run")
    assert first["rows"][0]["step"] == alone["rows"][0]["step"] == 1
    assert_same(second["states"], first["states"])


def ranks_one_after_the_other(patch: pytest.MonkeyPatch) -> None:
    """Rows in the order of ranks instead of the data's."""

    def gather(parts: list[Any], total: int, batch_size: int, ranks: dist.Ranks) -> tuple[Tensor, ...]:
        gathered: list[Any] = [None] * ranks.world_size
        torch.distributed.all_gather_object(gathered, parts)
        ordered = [part for own in gathered for part in own]
        return tuple(torch.cat(column) for column in zip(*ordered, strict=True))

    patch.setattr(counting, "gather_in_order", gather)


def measure(data: str, model_folder: str, batch_size: int, mutate: Mutation = none) -> dict[str, Any]:
    """Features, rows, backdoor counts and kNN count of a data set."""
    with pytest.MonkeyPatch.context() as patch:
        mutate(patch)
        ranks = dist.start("fp64", None)
        dataset = open_dataset(data)
        attacked = triggered(dataset, AttackConfig(BadNets(size=8, margin=1)))
        loader, stamped_loader = (
            make_loader(
                each,
                config=LoaderConfig("resident", 1),
                batch_size=batch_size,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
            for each in (dataset, attacked)
        )
        encoder = load_simclr(model_folder)[0].f.to(ranks.dtype)
        clean, labels, rows = counting.extract_features(encoder, loader, ranks)
        stamped, _, _ = counting.extract_features(encoder, stamped_loader, ranks)
        head = HeadStack(encoder.feature_dim, CLASSES, seeds=[3]).to(ranks.dtype)
        predicted = head.predict(0, clean), head.predict(0, stamped)
        counts = counting.backdoor_counts(*predicted, labels, target=int(predicted[1].mode().values))
        knn = counting.knn_count(clean, labels, clean, labels, k=5, temperature=0.5)
        return {
            "features": clean,
            "labels": labels.tolist(),
            "rows": rows.tolist(),
            "counts": {name: count.plain() for name, count in counts.items()},
            "knn": knn.plain(),
        }


@pytest.mark.parametrize("batch_size", [4, 5, 512])  # last batches of 1 (none for rank 1), 3 and 13 images
def test_evaluation_counts_each_image_once(batch_size: int, two_ranks: Pool, tmp_path: Path) -> None:
    data, model = make_data(tmp_path / "data", 13), make_model(tmp_path / "model")
    alone = measure(data, model, batch_size)
    assert alone["rows"] == list(range(13))
    assert alone["counts"]["acc"]["n"] == alone["counts"]["asr_all"]["n"] == 13
    assert alone["counts"]["asr_all"]["correct"] > 0
    for found in two_ranks.run(measure, data, model, batch_size):
        assert_same(found, alone)


@pytest.mark.parametrize("mutate", [ranks_one_after_the_other])
def test_the_evaluation_check_catches(mutate: Mutation, two_ranks: Pool, tmp_path: Path) -> None:
    data, model = make_data(tmp_path / "data", 13), make_model(tmp_path / "model")
    found, _ = two_ranks.run(measure, data, model, 4, mutate)
    with pytest.raises(AssertionError):
        assert_same(found, measure(data, model, 4))
