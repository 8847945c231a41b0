"""One and three whole training steps of each encoder method against the published code's float64 numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dist_defend.batch import Batch
from dist_defend.engine import dist
from dist_defend.engine.objective import Objective
from dist_defend.engine.optim import OptimizerConfig, UpdateConfig
from dist_defend.engine.step import GradientStep, Position
from dist_defend.methods.attack.badencoder import BadEncoderObjective, freeze_norms
from dist_defend.methods.defend.mimic import MimicObjective
from dist_defend.methods.pretrain.simclr import SimCLRObjective
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.folding import fold_frozen_norms
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden


def make_model(seed: int) -> SimCLR:
    model = build_simclr("resnet18_cifar", "none").double()
    det_init(model, seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def run_steps(
    objective: Objective, optimizer: OptimizerConfig, batch: Batch, steps: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each step and the last step's gradients by parameter name."""
    gradients: dict[str, Tensor] = {}
    replay = objective.after_backward

    def record() -> None:
        gradients.update({k: p.grad.clone() for k, p in objective.named_parameters() if p.grad is not None})
        replay()

    objective.after_backward = record  # type: ignore[method-assign]
    update = UpdateConfig(epochs=1, optimizer=optimizer)
    step = GradientStep(objective, update, dist.start("fp64", None), steps_per_epoch=1)
    return [step(batch, Position())["loss"].item() for _ in range(steps)], gradients


def batch_of(*views: Tensor) -> Batch:
    return Batch(views, torch.zeros(len(views[0])).long(), torch.arange(len(views[0])))


def check(case: dict[str, Any], losses: list[float], gradients: dict[str, Tensor], prefix: str, model: SimCLR) -> None:
    expected = case["loss"] if isinstance(case["loss"], list) else [case["loss"]]
    assert losses == pytest.approx(expected, rel=1e-9)
    for key, value in (case.get("grad") or {}).items():
        assert_fingerprint(gradients[prefix + key], value, what=f"gradient of {key}")
    state = model.state_dict()
    for key, value in (case.get("after") or {}).items():
        assert_fingerprint(state[key], value, what=f"{key} after the step")


@pytest.mark.parametrize(("batch", "temperature"), [(4, 0.5), (4, 0.1), (16, 0.5), (16, 0.1)])
def test_simclr_step(batch: int, temperature: float) -> None:
    model = make_model(1)
    views = batch_of(det_images((batch, 3, 32, 32), 2), det_images((batch, 3, 32, 32), 3))
    losses, gradients = run_steps(SimCLRObjective(model, temperature), OptimizerConfig("adam", 1e-3, 1e-6), views)
    check(golden("simclr")[f"float64_B{batch}_T{temperature}"], losses, gradients, "model.", model)


def test_simclr_step_in_float32() -> None:
    model = make_model(1).float()
    views = batch_of(det_images((4, 3, 32, 32), 2).float(), det_images((4, 3, 32, 32), 3).float())
    case = golden("simclr")["float32_B4_T0.5"]
    assert SimCLRObjective(model, 0.5)(views)["loss"].item() == pytest.approx(case["loss"], rel=1e-5)


@dataclass(frozen=True)
class Fixed:
    """Stands for a trigger: the golden inputs name the triggered images themselves."""

    images: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Fixed":
        return self

    def __call__(self, images: Tensor) -> Tensor:
        return self.images


def badencoder_parts(count: int, clean_seed: int = 11, is_identical: bool = False) -> dict[str, Any]:
    clean, model = make_model(clean_seed).f.eval(), make_model(11 if is_identical else 12)
    freeze_norms(model.f, "bn")
    x = det_images((4, 3, 32, 32), 20)
    references = torch.cat([det_images((1, 3, 32, 32), 40 + k) for k in range(count)])
    stamped = [det_images((4, 3, 32, 32), 30 + k) for k in range(count)]
    augmented = [det_images((4, 3, 32, 32), 50 + k) for k in range(count)]
    if is_identical:
        stamped = augmented = [references.expand(4, -1, -1, -1)]
    with torch.no_grad():
        features, reference_features = functional.normalize(clean(x), dim=1), clean(references)
    arguments = (model.f, [Fixed(s) for s in stamped], references, reference_features, features.__getitem__)
    return {"model": model, "arguments": arguments, "batch": batch_of(x, *augmented)}


@pytest.mark.parametrize(
    ("name", "count", "lambda1", "lambda2", "steps"),
    [
        ("generic", 2, 1.0, 1.0, 1),
        ("lam", 2, 0.25, 3.0, 1),
        ("only0", 2, 0.0, 0.0, 1),
        ("only1", 2, 1.0, 0.0, 1),
        ("only2", 2, 0.0, 1.0, 1),
        ("three_steps", 1, 1.0, 1.0, 3),
    ],
)
def test_badencoder_step(name: str, count: int, lambda1: float, lambda2: float, steps: int) -> None:
    parts = badencoder_parts(count)
    encoder, whole = parts["model"].f, copy.deepcopy(parts["model"])
    assert fold_frozen_norms(encoder, parts["batch"].images[:1]) == 20
    objective = BadEncoderObjective(*(*parts["arguments"], lambda1, lambda2))
    optimizer = OptimizerConfig("sgd", lr=1e-3, momentum=0.9, weight_decay=5e-4)
    losses, gradients = run_steps(objective, optimizer, parts["batch"], steps)
    named = {key.replace("encoder.", "f.", 1): value for key, value in gradients.items()}
    whole.f.load_state_dict({**whole.f.state_dict(), **encoder.state_dict()})
    check(golden("badencoder")[f"float64_{name}"], losses, named, "", whole)


def test_badencoder_at_its_optimum_has_no_gradient() -> None:
    parts = badencoder_parts(1, is_identical=True)
    objective = BadEncoderObjective(*parts["arguments"])
    losses, gradients = run_steps(objective, OptimizerConfig("sgd", lr=1e-3), parts["batch"])
    assert losses[0] == pytest.approx(-3.0, abs=1e-12)
    assert max(g.abs().max().item() for g in gradients.values()) < 1e-12
    assert len(gradients) == 20  # convolutions only: batch norm is frozen


def test_badencoder_golden_catches_a_reference_without_gradient() -> None:
    """Mutation: cut the gradient through f'(r_k); the loss stays, the gradient must not pass."""
    parts = badencoder_parts(2)
    encoder, *rest = parts["arguments"]
    objective = BadEncoderObjective(encoder, *rest)
    inner = encoder.forward

    def cut(images: Tensor) -> Tensor:
        features = inner(images)
        return torch.cat([features[:-2], features[-2:].detach()])

    encoder.forward = cut
    losses, gradients = run_steps(objective, OptimizerConfig("sgd", lr=1e-3, weight_decay=5e-4), parts["batch"])
    case = golden("badencoder")["float64_generic"]
    assert losses == pytest.approx(case["loss"], rel=1e-9)
    with pytest.raises(AssertionError):
        for key, value in case["grad"].items():
            assert_fingerprint(gradients["encoder." + key.removeprefix("f.")], value)


MIMIC_CASES: dict[str, tuple[list[float], float, int]] = {
    "con_only": ([0, 0, 0, 0], 0, 1),
    "at1": ([1000, 0, 0, 0], 0, 1),
    "at2": ([0, 1000, 0, 0], 0, 1),
    "at3": ([0, 0, 1000, 0], 0, 1),
    "at4": ([0, 0, 0, 1000], 0, 1),
    "clone": ([0, 0, 0, 0], 1, 1),
    "default": ([1000] * 4, 1, 1),
    "mi_like": ([3500, 3400, 3600, 3500], 1, 1),
    "three_steps": ([1000] * 4, 1, 3),
}


def mimic_step(name: str, change: Callable[[MimicObjective], None] = lambda objective: None) -> tuple[Any, ...]:
    weights, clone, steps = MIMIC_CASES[name]
    student, teacher = make_model(21), make_model(22)
    objective = MimicObjective(student, teacher, 0.5, weights, clone)
    change(objective)
    views = batch_of(det_images((8, 3, 32, 32), 2), det_images((8, 3, 32, 32), 3))
    losses, gradients = run_steps(objective, OptimizerConfig("adam", 1e-2, 1e-6), views, steps)
    return student, teacher, losses, gradients


@pytest.mark.parametrize("name", MIMIC_CASES)
def test_mimic_step(name: str) -> None:
    student, teacher, losses, gradients = mimic_step(name)
    check(golden("mimic")[f"float64_{name}"], losses, gradients, "student.", student)
    assert all(p.grad is None for p in teacher.parameters())
    state, steps = student.state_dict(), MIMIC_CASES[name][2]
    tracked = [state[f"{part}.1.num_batches_tracked"].item() for part in ("f.f", "g")]
    assert tracked == [n * steps for n in golden("mimic")["nbt"]]


def test_mimic_golden_catches_a_missing_third_statistics_update() -> None:
    def forget(objective: MimicObjective) -> None:
        objective.after_backward = objective._first_updates.clear  # type: ignore[method-assign]

    student, _, losses, _ = mimic_step("default", forget)
    case = golden("mimic")["float64_default"]
    assert losses == pytest.approx([case["loss"]] if isinstance(case["loss"], float) else case["loss"], rel=1e-9)
    with pytest.raises(AssertionError):
        for key, value in case["after"].items():
            assert_fingerprint(student.state_dict()[key], value)


def test_mimic_golden_catches_a_clone_term_of_the_wrong_sign() -> None:
    def flip(objective: MimicObjective) -> None:
        objective.clone_weight = -objective.clone_weight

    _, _, losses, _ = mimic_step("default", flip)
    assert losses[0] != pytest.approx(golden("mimic")["float64_default"]["loss"], rel=1e-6)
