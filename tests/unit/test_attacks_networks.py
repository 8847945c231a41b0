"""Triggers that networks make: Input-aware's generators and TrojanNN's optimisation; the attacks command."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.input_aware import Generator, Generators, InputAwareTrigger, load_generators, save_generators
from dist_defend.attacks.patterns import InputAware, TrojanNN
from dist_defend.attacks.poison import triggered
from dist_defend.attacks.stamping import to_images
from dist_defend.attacks.trojan_nn import last_linear, optimise_pattern, strongest_inputs
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from dist_defend.models.artifact import ModelCard, save_artifact
from dist_defend.models.classifier import build_classifier
from tests.runs import make_data


def generators_of(size: int = 16, normalization: str = "cifar10") -> Generators:
    torch.manual_seed(0)
    return Generators(size, normalization).eval().requires_grad_(False)


def test_the_generators_layers() -> None:
    """Convolutions in order, channels in and out; 3 x 3, so this is the published network whole."""
    convolutions = [m for m in Generator(1, 32).modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        *[(3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)],
        (128, 128),
        *[(128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 1)],
    ]
    assert {(c.kernel_size, c.padding, c.bias is not None) for c in convolutions} == {((3, 3), (1, 1), True)}
    norms = [m for m in Generator(3, 32).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 13 and {norm.momentum for norm in norms} == {0.05}
    blocks = [name for name, _ in Generator(3, 32).named_children()]
    assert blocks[:3] == ["convblock_down_0", "convblock_down_1", "downsample_0"] and blocks[9] == "convblock_middle"
    assert blocks[-3:] == ["upsample_2", "convblock_up_4", "convblock_up_5"]
    assert not hasattr(Generator(3, 32).convblock_up_5, "relu") and hasattr(Generator(3, 32).convblock_up_4, "relu")
    assert Generator(3, 28)(torch.rand(2, 3, 28, 28)).shape == (2, 3, 28, 28)
    with pytest.raises(UserError, match="need images of a multiple of 4 px; these have 30"):
        Generator(3, 30)


def plain(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def test_the_trigger_is_the_papers_formula() -> None:
    generators = generators_of().double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    normalised = generators.normalize(images)
    raw = plain(generators.net_m, normalised)
    mask = ((raw.tanh() / (2 + 1e-7) + 0.5) * 20 - 10).tanh() / (2 + 1e-7) + 0.5
    pattern = plain(generators.net_g, normalised).tanh() / (2 + 1e-7) + 0.5
    stamp = InputAwareTrigger(generators)
    torch.testing.assert_close(stamp(images), images * (1 - mask) + pattern * mask)
    other = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        stamp.cross(images, images[other], other), images * (1 - mask[other]) + pattern[other] * mask[other]
    )
    assert stamp.image_size == (16, 16)
    moved = stamp.to("cpu")
    assert moved(images.float()).dtype is torch.float32 and stamp(images).dtype is torch.float64


def test_generators_are_read_back_and_stamp_a_data_set(tmp_path: Path) -> None:
    generators = generators_of()
    save_generators(tmp_path / "g.safetensors", generators)
    config = InputAware(str(tmp_path / "g.safetensors"), normalization="cifar10")
    dataset = open_dataset(make_data(tmp_path / "data", 6))
    made = triggered(dataset, AttackConfig(config)).images(np.arange(6))
    expected = InputAwareTrigger(generators)(to_images(dataset.images(np.arange(6)))) * 255
    assert (abs(made - expected.permute(0, 2, 3, 1).numpy()) <= 1).all()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"PK\x03\x04", "are pickled and are not read"),
        (b"hello", "not a safetensors file"),
        (safetensors.torch.save({"net_m.x": torch.zeros(1)}), "does not fit the model: .* missing"),
    ],
)
def test_bad_generators_are_one_line(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "g.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_generators(path, 16, "none")


class Net(nn.Module):
    """One hidden layer whose activations are known linear functions of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3 * 16, 4, bias=False)
        self.linear = nn.Linear(4, 2)
        nn.init.constant_(self.first.weight, 1.0)
        self.first.weight.data[1] *= -1
        self.linear.weight.data = torch.tensor([[0.1, 5.0, 0.0, -3.0], [0.1, -4.0, 0.0, 3.0]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(self.first(x.flatten(1)))
        return logits


def test_neurons_with_the_largest_weights_are_chosen() -> None:
    assert strongest_inputs(Net().linear, 2).tolist() == [1, 3]
    convolution = nn.Conv2d(3, 2, 3)
    convolution.weight.data = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 3, 3).clone() * -1
    assert strongest_inputs(convolution, 3).tolist() == [2, 1, 0]
    assert last_linear(Net()) == "linear"


def test_the_trigger_is_found_by_signed_steps_in_a_box() -> None:
    """Neuron 1 is minus the sum of the seen pixels, neuron 3 plus it: for a goal of 100 on neuron 3, pixels rise."""
    net = Net()
    net.linear.weight.data[:, 1] = 0
    start = torch.zeros(1, 3, 4, 4)
    start[..., 2:] = 0.5
    trigger, cost = optimise_pattern(net, "linear", start, num_neurons=1, iterations=2)
    expected = start.clone()
    expected[..., 2:] = 0.6
    assert cost == pytest.approx((24 * 0.6 - 100) ** 2, rel=1e-5)
    trigger, _ = optimise_pattern(net, "linear", start, num_neurons=1, iterations=1)
    torch.testing.assert_close(trigger, expected)
    far, _ = optimise_pattern(net, "linear", start, num_neurons=1, iterations=20)
    expected[..., 2:] = 0.8
    torch.testing.assert_close(far, expected)
    wide, _ = optimise_pattern(net, "linear", start, num_neurons=1, iterations=20, radius=2.0)
    assert wide.max() == 1 and (wide[..., :2] == 0).all() and start.max() == 0.5


def test_the_optimisation_stops_when_it_is_there_and_leaves_the_model_alone() -> None:
    net = Net()
    start = torch.full((1, 3, 4, 4), 0.5)
    trigger, cost = optimise_pattern(net, "linear", start, num_neurons=1, target_value=-24.0, tolerance=1e-3)
    assert cost < 1e-3 and (trigger - start).abs().max() <= 0.1 + 1e-6
    assert net.training and not net.linear._forward_pre_hooks and net.first.weight.grad is None
    with pytest.raises(UserError, match="no linear or convolutional layer 'fc'; its last is 'linear'"):
        optimise_pattern(net, "fc", start)


def save_classifier(folder: Path, backdoored: bool = False) -> str:
    torch.manual_seed(0)
    model = build_classifier("small_resnet", 3, "none", 16)
    card = ModelCard("classifier", "small_resnet", "none", 16, num_classes=3, backdoored=backdoored)
    save_artifact(folder, model, card)
    return str(folder)


def test_trojan_nn_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, out = save_classifier(tmp_path / "clean"), tmp_path / "trigger.png"
    command = ["attacks", "trojan-nn", "--classifier", clean, "--out", str(out), "--iterations", "5"]
    assert main(command) == 0 and "strongest inputs of net." in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.size == (16, 16) and np.asarray(picture).any()
    assert TrojanNN(str(out)).build(16).image_size == (16, 16)
    poisoned = save_classifier(tmp_path / "poisoned", backdoored=True)
    for wrong, told in (
        (["--classifier", poisoned], "is backdoored: TrojanNN starts from a clean classifier"),
        (["--layer", "net.conv9"], "no linear or convolutional layer 'net.conv9'"),
        (["--neurons", "0"], "--neurons and --iterations must be at least 1"),
        (["--start", str(tmp_path / "none.png")], "does not exist"),
        (["--out", str(tmp_path / "none" / "t.png")], "cannot write the picture"),
    ):
        assert main([*command, *wrong]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1


@pytest.mark.parametrize("size", [None, 16, 30])
def test_the_gallery_shows_every_trigger(tmp_path: Path, size: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gallery.png"
    data: list[Any] = [] if size is None else ["--data", make_data(tmp_path / "data", 6, size=size)]
    assert main(["attacks", "gallery", "--out", str(out), *data]) == 0
    number = int(capsys.readouterr().out.split(":")[1].split()[0])
    assert number == 24 - (size == 30)
    with Image.open(out) as picture:
        pixels = np.asarray(picture).astype(int)
    for line in range(number):
        tiles = pixels[4 + line * 76 :][:72, 190:].reshape(72, -1, 3)
        clean, stamped, change = tiles[:, :72], tiles[:, 76:148], tiles[:, 6 * 76 :][:, :72]
        assert (clean != stamped).any() and change.std() > 0, f"line {line} shows no trigger"


def test_a_gallery_without_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attacks", "gallery", "--out", str(tmp_path / "g.png"), "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "g.png").exists()
