"""DDP, FSDP2 and ZeRO are the same training: equal losses, exact resumes, one kind of checkpoint and of artefact."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dist_defend import experiment
from dist_defend.batch import Batch
from dist_defend.config import load_experiment
from dist_defend.engine.dist import start
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.sharding import launched_sharding
from dist_defend.engine.step import GradientStep, Position
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_artifact
from tests.ranks import Pool
from tests.runs import make_classifier, make_data, make_experiment, metrics, options_of

ROOT = Path(__file__).parents[2]
SHARDED = ["fsdp2", "zero1", "zero2", "zero3"]
STEPS = 20
TOLERANCE = 1e-5  # relative


class Killed(BaseException):
    """Stands for kill -9, on all ranks."""


def switches(strategy: str) -> dict[str, str]:
    """What `accelerate launch` puts into the ranks' environment for launch/accelerate/<strategy>.yaml."""
    if strategy == "fsdp2":
        return {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    if strategy == "ddp":
        return {}
    file = ROOT / "launch" / "deepspeed" / f"{strategy}.json"
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}


def run(config: str, output: str, strategy: str, kill_at: int = -1, overrides: tuple[str, ...] = ()) -> str:
    """One rank's `dist-defend run`, killed before the update kill_at (counted from 0). Returns what it did not do."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's and torch's own
        for name, value in switches(strategy).items():
            patch.setenv(name, value)
        patch.setattr(Accelerator, "end_training", lambda self: None)  # the pool's process group lives on
        update = GradientStep.__call__

        def watched(self: GradientStep, batch: Any, at: Any) -> Any:
            if at.done(self.steps_per_epoch) == kill_at:
                raise Killed
            return update(self, batch, at)

        patch.setattr(GradientStep, "__call__", watched)
        try:
            experiment.run(load_experiment(config, [f"output={output}", *overrides]))
        except Killed:
            return "killed"
        except UserError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    """Ranks of their own: DeepSpeed changes torch functions for good."""
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: Pool) -> Callable[[str, str], Path]:
    """Run folder of a method under a strategy; each is run once, its file is run.parent / <method>.yaml."""
    configs: dict[str, Path] = {}
    done: dict[tuple[str, str], Path] = {}

    def get(method: str, strategy: str) -> Path:
        if method not in configs:
            configs[method] = small_experiment(tmp_path_factory.mktemp(method), method)
        if (method, strategy) not in done:
            folder = configs[method].parent / strategy
            assert ranks.run(run, str(configs[method]), str(folder), strategy, timeout=200) == ["", ""]
            done[method, strategy] = folder
        return done[method, strategy]

    return get


def small_experiment(folder: Path, method: str) -> Path:
    options = options_of(method, folder)
    epochs = STEPS // 2 if method in ("simclr", "mimic") else 2
    # Adam divides by gradients, tiny ones too, so that rounding grows by a factor each step; see the float64 test.
    lr = 1e-4 if method == "mimic" else 3e-4  # its loss is in the hundreds
    optimizer = {"name": "sgd", "lr": lr, "weight_decay": 1e-2, "schedule": "cosine", "warmup_epochs": 1}
    options["update"] = {"batch_size": 4, "epochs": epochs, "optimizer": optimizer, "max_grad_norm": 1.0}
    if method == "ood":
        del options["update"]["max_grad_norm"]  # which it does not have
        options["temperature"] = 1.0  # at 8 its loss is a thousandth: the rounding of numbers of order one
    if method == "badencoder":
        options["update"] |= {"accumulation": 2, "recompute": True}
    trainer = {"log_every": 1, "checkpoint_every": 5, "trackers": []}
    return make_experiment(folder, method, options, trainer=trainer)


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in metrics(folder) if "loss" in row], dtype=torch.float64)


def assert_same_model(found: Path, expected: Path, tolerance: float) -> None:
    """Both artefacts load in plain torch; weights within tolerance of each tensor's largest entry."""
    mine, theirs = (load_artifact(folder / "model")[0].state_dict() for folder in (found, expected))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        error = (mine[key].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(value.abs().max().item(), 1e-2), f"{key}: off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "mimic", "badencoder", "drupe", "nad_simclr", "classifier", "kd", "ood"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_every_strategy_has_the_losses_of_ddp(method: str, strategy: str, trained: Callable[[str, str], Path]) -> None:
    expected = losses(trained(method, "ddp"))
    assert len(expected) == (STEPS if method in ("simclr", "mimic") else 4)
    folder = trained(method, strategy)
    torch.testing.assert_close(losses(folder), expected, rtol=TOLERANCE, atol=0)
    assert_same_model(folder, trained(method, "ddp"), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "classifier"])
def test_bf16_is_the_same_training_too(method: str, trained: Callable[[str, str], Path], ranks: Pool) -> None:
    """bfloat16 has three digits: the strategies agree far below what it costs against float32."""
    config = trained(method, "ddp").parent / f"{method}.yaml"
    found = {}
    for strategy in ("ddp", "fsdp2", "zero2", "zero3"):
        folder = config.with_name(f"{strategy}_bf16")
        assert ranks.run(run, str(config), str(folder), strategy, -1, ("precision=bf16",), timeout=200) == ["", ""]
        found[strategy] = losses(folder)
        assert {value.dtype for value in load_artifact(folder / "model")[0].parameters()} == {torch.float32}
    cost = (found["ddp"] - losses(trained(method, "ddp"))).abs().max().item()
    assert cost > 0
    for strategy in ("fsdp2", "zero2", "zero3"):
        assert (found[strategy] - found["ddp"]).abs().max().item() < cost


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_fsdp2_is_ddp_in_float64(optimizer: str, trained: Callable[[str, str], Path], ranks: Pool) -> None:
    """Adam's divisions and LARS' norms, which are of whole tensors, of shards."""
    config = trained("simclr", "ddp").parent / "simclr.yaml"
    changes = ("precision=fp64", f"simclr.update.optimizer={{name: {optimizer}, lr: 0.01, weight_decay: 0.1}}")
    folders = [config.with_name(f"{strategy}_{optimizer}") for strategy in ("ddp", "fsdp2")]
    for folder, strategy in zip(folders, ("ddp", "fsdp2"), strict=True):
        assert ranks.run(run, str(config), str(folder), strategy, -1, changes, timeout=200) == ["", ""]
    torch.testing.assert_close(losses(folders[1]), losses(folders[0]), rtol=1e-8, atol=0)
    assert losses(folders[0])[-1] != losses(folders[0])[-2]


def test_lars_is_refused_where_tensors_are_flattened(tmp_path: Path, ranks: Pool) -> None:
    config = small_experiment(tmp_path, "simclr")
    changes = ("simclr.update.optimizer={name: lars, lr: 0.1}",)
    told = ranks.run(run, str(config), str(tmp_path / "run"), "zero1", -1, changes)
    assert all("needs the norm of each tensor" in line for line in told)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["simclr", "mimic"])
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_resume_is_exact(strategy: str, method: str, trained: Callable[[str, str], Path], ranks: Pool) -> None:
    whole = trained(method, strategy)
    config, folder = whole.parent / f"{method}.yaml", whole.with_name(f"{strategy}_killed")
    assert ranks.run(run, str(config), str(folder), strategy, 13) == ["killed", "killed"]
    if method == "simclr":  # mimic has stages before
        assert sorted(p.name for p in (folder / "checkpoints").iterdir())[-1] == "step_000000010"
    assert ranks.run(run, str(config), str(folder), strategy) == ["", ""]
    assert losses(folder).equal(losses(whole))
    assert_same_model(folder, whole, 0.0)


class Odd(Objective):
    """Mean of (w x + sum b - 1)^2 with five and three numbers, which two ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.arange(5.0) / 5), nn.Parameter(torch.zeros(3))

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": (batch.images @ self.w + self.b @ torch.arange(1.0, 4.0) - 1).square().mean()}


def state_and_loaded(strategy: str) -> list[dict[str, Any]]:
    """Of a step after two updates of Adam, and of a fresh one that loaded it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in switches(strategy).items():
            patch.setenv(name, value)
        steps = []
        for _ in range(2):
            update = UpdateConfig(epochs=1, optimizer=OptimizerConfig("adam", lr=0.01))
            steps.append(GradientStep(Odd(), update, start("fp32", None), steps_per_epoch=2))
        for seed in (1, 2):
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
            steps[0](Batch((x,), torch.zeros(4).long(), torch.arange(4)), Position())
        steps[1].load_state_dict(steps[0].state_dict())
        return [step.state_dict()["optimizer"]["state"] for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", SHARDED)
def test_a_state_that_ranks_cannot_share_evenly_comes_back_in_its_place(strategy: str, ranks: Pool) -> None:
    for saved, loaded in ranks.run(state_and_loaded, strategy, timeout=200):
        assert [saved[number]["exp_avg"].numel() for number in (0, 1)] == [5, 3]
        assert all((saved[number]["exp_avg_sq"] > 0).all() for number in (0, 1))
        for number, moments in saved.items():
            for key, value in moments.items():
                assert value.equal(loaded[number][key]), (number, key)


@pytest.mark.slow
def test_a_run_goes_on_under_another_strategy(trained: Callable[[str, str], Path], ranks: Pool) -> None:
    whole = trained("simclr", "ddp")
    config, folder = str(whole.parent / "simclr.yaml"), whole.with_name("wandering")
    for strategy, kill_at in (("zero3", 6), ("fsdp2", 11), ("zero1", 16), ("ddp", -1)):
        assert set(ranks.run(run, config, str(folder), strategy, kill_at)) == {"killed" if kill_at > 0 else ""}
    torch.testing.assert_close(losses(folder), losses(whole), rtol=TOLERANCE, atol=0)


@pytest.mark.slow
def test_a_different_loss_is_seen(trained: Callable[[str, str], Path], ranks: Pool) -> None:
    """What the comparison would say of a strategy that updates with another rate."""
    whole = trained("simclr", "ddp")
    folder = whole.with_name("other")
    changed = ("simclr.update.optimizer.lr=1.01e-3",)
    assert ranks.run(run, str(whole.parent / "simclr.yaml"), str(folder), "fsdp2", -1, changed) == ["", ""]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(losses(folder), losses(whole), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(("strategy", "method"), [("fsdp2", "ibau"), ("zero3", "ibau"), ("fsdp2", "zskt")])
def test_a_step_that_needs_whole_weights_is_refused(strategy: str, method: str, tmp_path: Path, ranks: Pool) -> None:
    attack = {"trigger": {"name": "badnets"}, "target_class": 1}
    options: dict[str, Any] = {"test": {"path": make_data(tmp_path / "test", 13, seed=1)}, "attack": attack}
    model = make_classifier(tmp_path / "model")
    if method == "ibau":
        options |= {"model": model, "data": {"path": make_data(tmp_path / "data", 11)}, "batch_size": 5}
    else:
        options |= {"teacher": model, "student": "small_resnet", "attention": 0, "pseudo_batches": 1, "batch_size": 4}
    config = make_experiment(tmp_path, method, options)
    told = ranks.run(run, str(config), str(tmp_path / "run"), strategy)
    assert all(f"cannot run under {strategy}" in line and "--strategy ddp" in line for line in told), told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "precision", "told"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fp32", "fsdp_version: 2"),
        (switches("fsdp2") | {"FSDP_OFFLOAD_PARAMS": "true"}, "fp32", "fsdp_offload_params"),
        (switches("fsdp2"), "fp16", "use bf16"),
        (switches("zero2"), "fp64", "master weights are float32"),
        (switches("zero2") | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, "fp32", "no file from here"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    environment: dict[str, str], precision: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        launched_sharding(precision)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            '{"zero_optimization": {"stage": 2}, "optimizer": {}}',
            "sets 'optimizer', which the experiment's file decides",
        ),
        ('{"zero_optimization": {"stage": 0}}', "stage is 0; it must be 1, 2 or 3"),
        ("{}", "not a DeepSpeed configuration"),
    ],
)
def test_deepspeed_files_say_how_to_shard_and_nothing_else(
    content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(content)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match=told):
        launched_sharding("fp32")


def test_one_rank_shards_nothing_and_the_switches_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launched_sharding("fp32").strategy == "fsdp2"
    assert start("fp32", None).sharding.strategy == "ddp"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
