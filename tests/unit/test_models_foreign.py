"""Others' checkpoints: every published layout is recognised by its keys, and none can run code."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet50

from dist_defend.errors import UserError
from dist_defend.models.encoder import SimCLR, build_simclr
from dist_defend.models.foreign import import_encoder

State = dict[str, Tensor]


def same(model: SimCLR, expected: State) -> bool:
    state = model.state_dict()
    return list(state) == list(expected) and all(state[key].equal(expected[key]) for key in expected)


@pytest.fixture(scope="module")
def resnet18() -> State:
    return build_simclr("resnet18_cifar").state_dict()


@pytest.mark.parametrize(
    ("wrap", "layout"),
    [
        (lambda state: {"epoch": 1000, "state_dict": state, "optimizer": {"state": {}}}, "SimCLR, in 'state_dict'"),
        (lambda state: state, "SimCLR"),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, "SimCLR, prefix 'module.'"),
        (
            lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
            "SimCLR, in 'state_dict', prefix 'module.'",
        ),
    ],
    ids=["published", "bare", "DDP", "DDP in a wrapper"],
)
def test_simclr_layouts(tmp_path: Path, resnet18: State, wrap: Callable[[State], Any], layout: str) -> None:
    path = tmp_path / "clean_model_1000.pth"
    torch.save(wrap(resnet18), path)
    model, report = import_encoder(path)
    assert same(model, resnet18)
    assert (report.arch, report.normalization, report.image_size) == ("resnet18_cifar", "cifar10", 32)
    assert (report.layout, report.num_tensors, report.num_parameters) == (layout, 128, 11497664)
    assert report.has_projector and not report.dropped


def test_what_the_user_names_wins(tmp_path: Path, resnet18: State) -> None:
    safetensors.torch.save_file(resnet18, tmp_path / "model.safetensors")
    model, _ = import_encoder(tmp_path / "model.safetensors", "resnet18_cifar", normalization="stl10", image_size=64)
    assert same(model, resnet18) and (model.normalization, model.image_size) == ("stl10", 64)


@pytest.mark.parametrize("arch", ["resnet34_cifar", "small_cifar"])
def test_the_depth_is_read_off_the_keys_also_without_projector(tmp_path: Path, arch: str) -> None:
    model = build_simclr(arch)
    for number, state in enumerate((model.state_dict(), model.f.state_dict())):
        torch.save(state, tmp_path / "model.pth")
        found, report = import_encoder(tmp_path / "model.pth")
        assert report.arch == arch and report.has_projector is (number == 0)
        assert all(found.f.state_dict()[k].equal(v) for k, v in model.f.state_dict().items())


def test_the_imagenet_resnet50_computes_what_torchvision_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = resnet50().eval()
    state = {f"visual.{key}": value for key, value in published.state_dict().items()}
    assert len(state) == 320
    torch.save(state, tmp_path / "model_200.pth")
    model, report = import_encoder(tmp_path / "model_200.pth")
    assert (report.arch, report.normalization, report.image_size) == ("timm:resnet50", "none", 224)
    assert report.dropped == ("fc.bias", "fc.weight") and not report.has_projector
    published.fc = nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.eval().f(images), published(images), rtol=1e-5, atol=1e-6)


def clip_state() -> State:
    """CLIP's image tower in its own keys, from seeded weights."""
    torch.manual_seed(0)
    state: State = {}

    def conv(key: str, before: int, after: int, size: int) -> None:
        state[f"{key}.weight"] = torch.randn(after, before, size, size) / (before * size * size) ** 0.5

    def norm(key: str, width: int) -> None:
        state.update({f"{key}.weight": torch.rand(width) + 0.5, f"{key}.bias": 0.1 * torch.randn(width)})
        state.update({f"{key}.running_mean": 0.1 * torch.randn(width), f"{key}.running_var": torch.rand(width) + 0.5})
        state[f"{key}.num_batches_tracked"] = torch.tensor(5)

    for number, (before, after) in enumerate(((3, 32), (32, 32), (32, 64)), 1):
        conv(f"conv{number}", before, after, 3)
        norm(f"bn{number}", after)
    before = 64
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        width = 64 * 2 ** (stage - 1)
        for block in range(depth):
            key = f"layer{stage}.{block}"
            for number, (a, b, size) in enumerate(((before, width, 1), (width, width, 3), (width, 4 * width, 1)), 1):
                conv(f"{key}.conv{number}", a, b, size)
                norm(f"{key}.bn{number}", b)
            if block == 0:
                conv(f"{key}.downsample.0", before, 4 * width, 1)
                norm(f"{key}.downsample.1", 4 * width)
            before = 4 * width
    state["attnpool.positional_embedding"] = torch.randn(50, 2048) / 2048**0.5
    for name, width in (("q", 2048), ("k", 2048), ("v", 2048), ("c", 1024)):
        state[f"attnpool.{name}_proj.weight"] = torch.randn(width, 2048) / 2048**0.5
        state[f"attnpool.{name}_proj.bias"] = 0.1 * torch.randn(width)
    return state


def clip_features(state: State, x: Tensor) -> Tensor:
    """The image tower as CLIP's paper and weights define it, in eval mode."""

    def block(conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{conv}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        return functional.batch_norm(x, mean, var, state[f"{norm}.weight"], state[f"{norm}.bias"])

    for number, stride in ((1, 2), (2, 1), (3, 1)):
        x = block(f"conv{number}", f"bn{number}", x, stride).relu()
    x = functional.avg_pool2d(x, 2)
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for number in range(depth):
            key, halves = f"layer{stage}.{number}", stage > 1 and number == 0
            y = block(f"{key}.conv1", f"{key}.bn1", x).relu()
            y = block(f"{key}.conv2", f"{key}.bn2", y).relu()
            y, x = (functional.avg_pool2d(t, 2) if halves else t for t in (y, x))
            shortcut = block(f"{key}.downsample.0", f"{key}.downsample.1", x) if number == 0 else x
            x = (block(f"{key}.conv3", f"{key}.bn3", y) + shortcut).relu()
    tokens = x.flatten(2).permute(2, 0, 1)  # (49, B, 2048)
    tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + state["attnpool.positional_embedding"][:, None]
    weights = {name: state[f"attnpool.{name}_proj.weight"] for name in "qkvc"}
    pooled, _ = functional.multi_head_attention_forward(
        tokens[:1], tokens, tokens, 2048, 32, None,
        torch.cat([state[f"attnpool.{name}_proj.bias"] for name in "qkv"]), None, None, False, 0.0,
        weights["c"], state["attnpool.c_proj.bias"], training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=weights["q"], k_proj_weight=weights["k"], v_proj_weight=weights["v"],
    )  # fmt: skip
    return pooled[0]


def test_clips_image_tower_computes_what_clip_does(tmp_path: Path) -> None:
    state = clip_state()
    assert len(state) == 339
    torch.save({"state_dict": state}, tmp_path / "encode_image.pth")
    model, report = import_encoder(tmp_path / "encode_image.pth")
    assert (report.arch, report.normalization, report.image_size) == ("clip_resnet50", "clip", 224)
    assert (report.num_tensors, report.num_parameters, report.dropped) == (339, 38316896, ())
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = clip_features(state, model.f.normalize(images))
        torch.testing.assert_close(model.eval().f(images), expected, rtol=1e-4, atol=1e-4)


def test_a_whole_clip_leaves_its_text_tower_behind(tmp_path: Path) -> None:
    state = {f"visual.{key}": value for key, value in clip_state().items()}
    torch.save({**state, "logit_scale": torch.tensor(4.6), "text_projection": torch.rand(2, 2)}, tmp_path / "clip.pth")
    assert import_encoder(tmp_path / "clip.pth")[1].dropped == ("logit_scale", "text_projection")


def test_a_timm_encoder_comes_in_by_name_without_its_classifier(tmp_path: Path) -> None:
    import timm

    published: Any = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7).eval()
    torch.save(published.state_dict(), tmp_path / "vit.pth")
    model, report = import_encoder(tmp_path / "vit.pth", "timm:vit_tiny_patch16_224", "imagenet", image_size=32)
    assert report.dropped == ("head.bias", "head.weight")
    images = torch.rand(2, 3, 32, 32)
    expected = published.forward_head(published.forward_features(model.f.normalize(images)), pre_logits=True)
    torch.testing.assert_close(model.eval().f(images), expected)


def refused(path: Path, arch: str | None = None) -> str:
    with pytest.raises(UserError) as error:
        import_encoder(path, arch)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_misfits_are_listed_with_counts(tmp_path: Path, resnet18: State) -> None:
    path = tmp_path / "model.pth"
    state = dict(resnet18)
    del state["f.f.1.weight"], state["g.3.bias"]
    state["f.extra"] = torch.zeros(1)
    state["f.f.0.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(state, path)
    told = refused(path)
    for arch, count in (("timm:resnet18", "99 of 100"), ("resnet18_cifar", "98 of 100")):  # its stem is ImageNet's now
        assert f"{arch} ({count} tensors agree by name and shape, {arch[0] == 'r':d} misshapen, prefix 'f.f.')" in told
    assert "the first has 1 missing (f.f.1.weight)" in told
    assert "1 missing (f.f.1.weight); 1 misshapen (f.f.0.weight (64, 3, 7, 7)" in refused(path, "resnet18_cifar")
    assert "--arch" in told and "--key" in told and "--prefix" in told and "cannot be imported yet" in told
    torch.save(resnet18, path)
    assert "missing (f.f.3.2.conv1.weight, " in refused(path, "resnet34_cifar")


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    bomb = Bomb(tmp_path / "exploded")
    torch.save({"state_dict": {"f.f.0.weight": bomb}}, tmp_path / "zip.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    for protocol in (2, 5):
        (tmp_path / f"raw{protocol}.pth").write_bytes(pickle.dumps(bomb, protocol=protocol))
    for name in ("zip", "raw2", "raw5", "module"):
        assert "pickles more than tensors" in refused(tmp_path / f"{name}.pth")
    assert not (tmp_path / "exploded").exists()
    pickle.loads((tmp_path / "raw2.pth").read_bytes())
    assert (tmp_path / "exploded").exists()  # so the bomb was live


def test_what_is_no_checkpoint_is_a_user_error(tmp_path: Path, resnet18: State) -> None:
    assert "does not exist" in refused(tmp_path / "none.pth")
    assert "does not exist, is not a file, or may not be read" in refused(tmp_path)
    torch.save(resnet18, tmp_path / "whole.pth")
    for name, content in {
        "empty.pth": b"",
        "text.pth": b"hello" * 100,
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:-5000],
        "junk.safetensors": b"hello" * 100,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "damaged or not a checkpoint" in refused(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    assert "holds no state dict of named tensors" in refused(tmp_path / "numbers.pth")
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "other.pth")
    assert "layout that is not known (keys encoder.weight, ...)" in refused(tmp_path / "other.pth")
