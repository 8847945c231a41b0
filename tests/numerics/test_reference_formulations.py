"""bench/published computes what the published code of the papers computed, so it may serve as oracle and baseline."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dist_defend.bench.published import badencoder, head, mimic, mimic_mi, simclr
from dist_defend.models.encoder import SimCLR, build_simclr
from tests.numerics.det import assert_fingerprint, det_images, det_init, golden


def make_model(seed: int) -> SimCLR:
    model = build_simclr("resnet18_cifar", "none").double()
    det_init(model, seed)
    return model


def check_after(model: nn.Module, case: dict[str, Any]) -> None:
    """Gradients of the last step, which the optimizers leave in place, and the state after it, where both are known."""
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    expected = case.get("grad")
    assert expected is None or gradients.keys() == expected.keys()
    for key, value in (expected or {}).items():
        assert_fingerprint(gradients[key], value, what=f"gradient of {key}")
    for key, value in (case.get("after") or {}).items():
        assert_fingerprint(model.state_dict()[key], value, what=f"{key} after the step")


@pytest.mark.parametrize(("batch", "temperature"), [(4, 0.5), (16, 0.1)])
def test_simclr(batch: int, temperature: float) -> None:
    model = make_model(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-6)
    first, second = (det_images((batch, 3, 32, 32), seed) for seed in (2, 3))
    case = golden("simclr")[f"float64_B{batch}_T{temperature}"]
    assert simclr.simclr_step(model, optimizer, first, second, temperature) == pytest.approx(case["loss"], rel=1e-9)
    check_after(model, case)


BADENCODER_CASES = {  # K, lambda1, lambda2, steps
    "generic": (2, 1.0, 1.0, 1),
    "lam": (2, 0.25, 3.0, 1),
    "three_steps": (1, 1.0, 1.0, 3),
}


@pytest.mark.parametrize("name", BADENCODER_CASES)
def test_badencoder(name: str) -> None:
    count, lambda1, lambda2, steps = BADENCODER_CASES[name]
    clean, model = make_model(11).eval(), make_model(12)
    badencoder.freeze_batch_norm(model.f)
    optimizer = torch.optim.SGD(model.f.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    images = det_images((4, 3, 32, 32), 20)
    references = [det_images((1, 3, 32, 32), 40 + k).expand(4, -1, -1, -1) for k in range(count)]
    triggered = [det_images((4, 3, 32, 32), 30 + k) for k in range(count)]
    augmented = [det_images((4, 3, 32, 32), 50 + k) for k in range(count)]
    arguments = (model.f, clean.f, optimizer, images, triggered, references, augmented, lambda1, lambda2)
    losses = [badencoder.badencoder_step(*arguments)[0] for _ in range(steps)]
    case = golden("badencoder")[f"float64_{name}"]
    assert losses == pytest.approx(case["loss"], rel=1e-9)
    check_after(model, case)


MIMIC_CASES = {  # attention weights, clone weight
    "at1": ([1000, 0, 0, 0], 0),
    "mi_like": ([3500, 3400, 3600, 3500], 1),
    "default": ([1000] * 4, 1),
}


@pytest.mark.parametrize("name", MIMIC_CASES)
def test_mimic(name: str) -> None:
    weights, clone_weight = MIMIC_CASES[name]
    student, teacher = make_model(21), make_model(22).eval()
    mimic.leak_hooks(student.get_submodule("f.f"), 2)  # they change nothing
    optimizer = torch.optim.Adam(student.parameters(), 1e-2, weight_decay=1e-6)
    first, second = (det_images((8, 3, 32, 32), seed) for seed in (2, 3))
    loss = mimic.mimic_step(student, teacher, optimizer, first, second, weights, clone_weight)
    case = golden("mimic")[f"float64_{name}"]
    assert loss == pytest.approx(case["loss"], rel=1e-9)
    check_after(student, case)
    tracked = [student.state_dict()[f"{part}.1.num_batches_tracked"].item() for part in ("f.f", "g")]
    assert tracked == golden("mimic")["nbt"]


def test_donsker_varadhan() -> None:
    critic = mimic_mi.TNet(26).double()
    det_init(critic, 5)
    expected = golden("mimic_estimators")
    permutation = torch.tensor(expected["dv_perm"])
    value = mimic_mi.donsker_varadhan(critic, det_images((12, 20), 1), det_images((12, 6), 2), permutation)
    assert value.item() == pytest.approx(expected["dv"], rel=1e-9)


class Tiny(nn.Module):
    """An eight-part encoder for images (B, 3, 32, 32), and what the MI phase expects around it."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Module()
        self.f.f = self.stages = nn.Sequential(*(nn.Identity() for _ in range(7)), nn.AvgPool2d(32), nn.Flatten())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stages(x)
        return nn.functional.normalize(h, dim=1), h

    def parameters(self, recurse: bool = True) -> Any:
        return iter([torch.zeros(1)])


@pytest.mark.parametrize("leaks", [True, False])
def test_information_phase_leaks_hooks_as_published(leaks: bool) -> None:
    network = Tiny()
    batches = [torch.rand(8, 3, 32, 32) for _ in range(3)]
    values = mimic_mi.estimate_information(network, batches, epochs=3, last_epochs=2, leaks=leaks)
    assert len(values) == 4 and min(values) >= 0
    left = [len(network.stages[layer]._forward_hooks) for layer in mimic.LAYERS]
    assert left == (list(golden("mimic_estimate_mi")["hooks"].values()) if leaks else [0] * 4)


def test_attention_weights_from_nothing_are_nan_as_published() -> None:
    assert np.isnan(mimic_mi.attention_weights([0.0] * 4)).all()
    assert mimic_mi.attention_weights([1.0] * 4).tolist() == [3500.0] * 4
    assert mimic_mi.attention_weights([1.0, 0, 0, 0]).tolist() == [11000.0, 1000.0, 1000.0, 1000.0]


def test_head() -> None:
    net = head.NeuralNet(512, 43).double().eval()
    det_init(net, 5)
    features, expected = det_images((3, 512), 6), golden("head_and_knn")
    logits = net(features)
    assert logits.sum(1).tolist() == pytest.approx(expected["mlp_logits_sum"], rel=1e-9)
    assert nn.functional.cross_entropy(logits, torch.arange(3)).item() == pytest.approx(expected["mlp_ce"], rel=1e-9)


def test_stamping() -> None:
    images = np.random.RandomState(0).randint(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    mask = np.ones((1, 32, 32, 3), np.int64)
    mask[:, 21:31, 21:31] = 0
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    dataset = badencoder.ShadowDataset(images, 255.0 * (1 - mask), mask, images[:1], mean, std)
    plain, (stamped,), (reference,), (augmented,) = dataset[0]
    expected = golden("head_and_knn")
    assert stamped[:, 25, 25].tolist() == pytest.approx(expected["stamped0_patch"], rel=1e-6)
    assert stamped.sum().item() == pytest.approx(expected["stamped0_sum"], rel=1e-6)
    assert torch.equal(reference, plain) and augmented.shape == plain.shape
    assert torch.equal(stamped[:, :21], plain[:, :21])


def test_loaders_give_batches() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    mean, std = (0.5,) * 3, (0.5,) * 3
    first, second = next(iter(simclr.pair_loader(images, mean, std, 4)))
    assert first.shape == second.shape == (4, 3, 32, 32) and not torch.equal(first, second)
    sizes = [len(batch) for batch in mimic_mi.memory_loader(images, mean, std, 4)]
    assert sizes == [4, 4, 2]


def test_head_epoch_evaluates_both_sets() -> None:
    torch.manual_seed(0)
    net = head.NeuralNet(4, 2)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    features = np.repeat(np.eye(4, dtype=np.float32)[:2], 20, axis=0)
    labels = np.repeat(np.arange(2), 20)
    train, clean = (head.feature_loader(features, labels, 8) for _ in range(2))
    flipped = head.feature_loader(features, 1 - labels, 8)
    for _ in range(8):
        _, acc, asr = head.head_epoch(net, optimizer, train, clean, flipped, torch.device("cpu"))
    assert (acc, asr) == (100.0, 0.0)
