"""What each method's build() hands on: views to the loader, options to the steps, one stage's outcome to the next."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.attacks.patterns import BadNets
from dist_defend.batch import Batch
from dist_defend.config import load_experiment
from dist_defend.data.loader import DatasetConfig, LoaderConfig
from dist_defend.data.store import open_dataset
from dist_defend.engine import dist
from dist_defend.engine.context import Context, Plan
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods import find_method
from dist_defend.methods.attack.badencoder import BadEncoderObjective
from dist_defend.methods.defend.mimic.information import LayerInformation
from dist_defend.methods.defend.rnp.steps import RecoverStep, UnlearnStep
from dist_defend.models.artifact import load_artifact, load_simclr
from tests.runs import SIZE, make_classifier, make_data, make_experiment, options_of

MIRROR = {"crop": "none", "flip": 1.0, "jitter": 0.0, "grayscale": 0.0}  # an augmentation that leaves no doubt


def built(method: str, folder: Path, options: dict[str, Any], **changes: Any) -> Plan:
    experiment = load_experiment(make_experiment(folder, method, options, **changes))
    context = Context(dist.start("fp64", None), experiment.seed, experiment.loader, folder / "run", experiment.method)
    (folder / "run").mkdir(exist_ok=True)
    plan: Plan = find_method(method).build(experiment.options, context)
    return plan


def rnp_options(folder: Path) -> dict[str, Any]:
    return {
        "model": make_classifier(folder / "model"), "data": {"path": make_data(folder / "data"), "max_samples": 8},
        "test": {"path": make_data(folder / "test", 9, seed=1)}, "batch_size": 4,
    }  # fmt: skip


def small(method: str, folder: Path) -> dict[str, Any]:
    if method == "rnp":
        return rnp_options(folder)
    if method == "ibau":
        return rnp_options(folder) | {"min_patched": 1, "rounds": 1}
    if method == "input_aware":
        plain = options_of("classifier", folder)
        kept = {key: plain[key] for key in ("data", "test", "arch", "normalization")}
        return kept | {"rate": 0.25, "target_class": 1, "batch_size": 4, "mask_epochs": 1, "epochs": 1}
    options = options_of(method, folder)
    if method == "ood":
        options["cutmix"] = {"probability": 0.0}
    if method == "classifier":
        options["attack"] = {"trigger": {"name": "badnets"}, "target_class": 1, "count": 3, "avoid_target": True}
    return options


@pytest.mark.parametrize("method", ["simclr", "mimic", "badencoder", "classifier", "input_aware", "kd", "ood", "rnp",
                                    "ibau", "ft_simclr", "nad_simclr"])  # fmt: skip
def test_training_images_are_augmented_as_configured(method: str, tmp_path: Path) -> None:
    """Mirrored here: every view of every training stage but BadEncoder's plain one, and the poisoned images too."""
    options = small(method, tmp_path) | {"augment": MIRROR}
    plain = open_dataset(options["shadow" if method == "badencoder" else "data"]["path"])
    stages = {stage.name: stage for stage in built(method, tmp_path, options).stages if stage.name != "information"}
    expected_views = 2 if method in ("mimic", "badencoder") or method.endswith("simclr") else 1
    trigger = BadNets().build(SIZE)
    seen_poison = 0
    for stage in stages.values():
        for batch in stage.loader.epoch(0):
            rows = batch.index.numpy()
            images = torch.from_numpy(plain.images(rows)).permute(0, 3, 1, 2).float() / 255
            labels = torch.from_numpy(plain.labels[rows])
            if method == "classifier":
                is_poisoned = batch.labels != labels
                images = torch.where(is_poisoned[:, None, None, None], trigger(images), images)
                seen_poison += int(is_poisoned.sum())
                assert (batch.labels[is_poisoned] == 1).all()
            assert len(batch.views) == expected_views
            mirrored = images.flip(3)
            wanted = [images] if method == "badencoder" else [mirrored] * expected_views
            for view, image in zip(batch.views, wanted, strict=False):
                torch.testing.assert_close(view, image, rtol=0, atol=1e-6)
            if method == "badencoder":
                reference = built_reference(options)
                torch.testing.assert_close(
                    batch.views[1], reference.flip(3).expand_as(batch.views[1]), rtol=0, atol=1e-6
                )
    assert seen_poison > 0 or method != "classifier"


def built_reference(options: dict[str, Any]) -> Tensor:
    """The first image of the target class, (1, 3, H, W)."""
    dataset = open_dataset(options["reference"]["dataset"])
    row = np.flatnonzero(dataset.labels == options["reference"]["target_class"])[:1]
    return torch.from_numpy(dataset.images(row)).permute(0, 3, 1, 2).float() / 255


def test_rnps_options_reach_its_steps_and_masks_are_learned_on_the_unlearned_weights(tmp_path: Path) -> None:
    options = rnp_options(tmp_path) | {
        "unlearning_lr": 0.011, "schedule": [3, 5], "max_grad_norm": 7.0, "alpha": 0.3, "recovering_lr": 0.4,
        "unlearning_epochs": 6, "recovering_epochs": 9, "not_unlearned": "use_last",
    }  # fmt: skip
    unlearning, recovering = built("rnp", tmp_path, options).stages
    unlearn, recover = unlearning.step, recovering.step
    assert isinstance(unlearn, UnlearnStep) and isinstance(recover, RecoverStep)
    assert (unlearning.epochs, recovering.epochs) == (7, 9)
    assert (unlearn.lr, unlearn.schedule, unlearn.max_grad_norm) == (0.011, (3, 5), 7.0)
    assert (unlearn.scale, recover.scale) == (-1.0, 0.3)
    assert recover.update.rate == 0.4
    assert unlearn.num_batches == recover.num_batches == unlearning.loader.num_batches > 0
    for number, batch in enumerate(unlearning.loader.epoch(0)):
        unlearn(Batch((batch.images.double(),), batch.labels, batch.index), Position(batch=number))
    suspect = load_artifact(options["model"])[0].double().state_dict()
    unlearned, before = unlearn.model.state_dict(), recover.model.state_dict()
    assert all(before[key].equal(value) for key, value in suspect.items())
    assert not unlearned["net.conv1.weight"].equal(suspect["net.conv1.weight"])
    assert unlearning.finish is not None
    unlearning.finish()
    after = recover.model.state_dict()
    assert all(after[key].equal(value) for key, value in unlearned.items())


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_mimic_measures_the_network_that_it_is_told_to(source: str, tmp_path: Path) -> None:
    options = options_of("mimic", tmp_path)
    options["information"] |= {"source": source}
    first, second = built("mimic", tmp_path, options).stages
    assert isinstance(first.step, LayerInformation) and isinstance(second.step, GradientStep)
    measured, objective = first.step.network.state_dict(), second.step.objective
    teacher = load_artifact(options["teacher"])[0].double().state_dict()
    is_teacher = {key: measured[key].equal(value) for key, value in teacher.items() if key.endswith("conv1.weight")}
    assert set(is_teacher.values()) == {source == "teacher"}
    assert (first.step.network is objective.student) == (source == "student")


@pytest.mark.parametrize("normalization", ["match_encoder", "clip"])
def test_badencoders_shadow_images_are_normalised_as_told(normalization: str, tmp_path: Path) -> None:
    """Published: CLIP's constants for the 224 px shadow set, whatever the encoder's; the saved one keeps its own."""
    options = options_of("badencoder", tmp_path) | {"shadow_normalization": normalization}
    plan = built("badencoder", tmp_path, options)
    (stage,) = plan.stages
    batch = next(iter(stage.loader.epoch(0)))
    encoder = load_simclr(options["clean_encoder"])[0].double().f.eval()
    constants = {  # of torchvision's CIFAR-10 recipe, which the test's encoder has, and of OpenAI's CLIP
        "match_encoder": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    }[normalization]
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in constants)
    encoder.normalize = nn.Identity()
    with torch.no_grad():
        features = encoder((batch.views[0].double() - mean) / std)
    wanted = features / features.norm(dim=1, keepdim=True)
    assert isinstance(stage.step, GradientStep)
    objective = stage.step.objective
    assert isinstance(objective, BadEncoderObjective)
    torch.testing.assert_close(objective.clean_features(batch.index), wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        own = objective.encoder(batch.views[0].double())
    torch.testing.assert_close(own / own.norm(dim=1, keepdim=True), wanted, rtol=1e-5, atol=1e-6)
    plan.result()
    saved = load_simclr(tmp_path / "run" / "model")[0]
    assert saved.get_buffer("f.normalize.mean").flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])


class Line(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": 100 * (batch.images @ self.w - batch.labels).square().mean()}


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    yield Context(dist.start("fp64", None), 7, LoaderConfig("resident", 1), tmp_path)


def test_an_updates_options_reach_the_step(context: Context) -> None:
    update = UpdateConfig(4, 5, 2, 1e-3, optimizer=OptimizerConfig("sgd", 1.0, momentum=0.0, schedule="cosine"))
    step = context.gradient_step(Line(), update, num_batches=3)
    batch = Batch((torch.ones(4, 2, dtype=torch.float64),), torch.ones(4).long(), torch.arange(4))
    step(batch, Position())
    assert step.objective.get_parameter("w").norm().item() == pytest.approx(1e-3)
    assert (step.options.accumulation, step.total_steps) == (2, 15)


def test_order_and_subsets_follow_the_runs_seed(context: Context, tmp_path: Path) -> None:
    config = DatasetConfig(make_data(tmp_path / "data"), fraction=0.5, subset="random")
    rows = {}
    for seed in (7, 8):
        context.seed = seed
        dataset, rows[seed] = context.dataset("train", config)
        for epoch in (0, 1):
            loader = context.train_loader(dataset, rows[seed], 12, (), drop_last=False)
            (batch,) = loader.epoch(epoch)
            order = np.random.default_rng([seed, epoch]).permutation(12)
            assert batch.index.tolist() == rows[seed][order].tolist()
    assert rows[7].tolist() != rows[8].tolist()
