"""open_clip's towers as encoders, CLIP's text tower, and their weights in others' files."""

import json
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dist_defend.cli import main
from dist_defend.errors import UserError
from dist_defend.models.artifact import load_simclr
from dist_defend.models.clip import load_text_tower
from dist_defend.models.encoder import build_encoder, build_simclr
from dist_defend.models.folding import fold_frozen_norms
from dist_defend.models.foreign import import_encoder
from dist_defend.models.foreign_file import read_checkpoint
from tests.clips import clip_state, save_clip

State = dict[str, Tensor]
TOWERS = [
    ("tiny_resnet", 64, 32, [(32, 16), (64, 8), (128, 4), (256, 2)]),
    ("tiny_vit", 32, 24, [(32, 4)] * 4),
]


def reference(name: str, **changes: Any) -> nn.Module:
    """open_clip's own model with the weights of clip_state, in eval mode."""
    clip: nn.Module = open_clip.CLIP(**(open_clip.get_model_config(name) | changes))
    clip.load_state_dict(clip_state(name))
    return clip.eval()


@pytest.mark.parametrize(("name", "size", "width", "maps"), TOWERS, ids=[t[0] for t in TOWERS])
def test_a_tower_gives_clips_features_and_the_taps_of_one_pass(
    name: str, size: int, width: int, maps: list[tuple[int, int]], tmp_path: Path
) -> None:
    model, report = import_encoder(save_clip(tmp_path / "clip.pth", name), f"open_clip:{name}")
    assert (report.normalization, report.image_size, report.has_projector) == ("clip", size, False)
    encoder = model.f.eval()
    images = torch.rand(2, 3, size, size)
    clip = reference(name)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    visual: Any = clip.visual
    parts = (
        list(visual.transformer.resblocks)
        if name == "tiny_vit"
        else [visual.get_submodule(f"layer{n}") for n in "1234"]
    )
    outputs: list[Tensor] = []
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        expected = clip.encode_image((images - mean) / std)  # type: ignore[operator]
        found, features = encoder.layers(images)
        torch.testing.assert_close(encoder(images), features)
    torch.testing.assert_close(features, expected)
    assert features.shape == (2, width) and encoder.feature_dim == width
    assert [(m.shape[1], m.shape[2]) for m in found] == maps
    for tap, output in zip(found, outputs, strict=True):
        own = output[:, 1:].transpose(1, 2).unflatten(2, tap.shape[2:]) if name == "tiny_vit" else output
        torch.testing.assert_close(tap, own)


def test_a_frozen_resnet_tower_folds_and_keeps_its_features(tmp_path: Path) -> None:
    encoder = import_encoder(save_clip(tmp_path / "clip.pth", "tiny_resnet"), "open_clip:tiny_resnet")[0].f.eval()
    encoder.requires_grad_(False)
    images = torch.rand(2, 3, 64, 64)
    expected = encoder(images)
    assert fold_frozen_norms(encoder, images) == 3 + 4 * 4  # the stem's, and three and a shortcut's in each block
    torch.testing.assert_close(encoder(images), expected, rtol=1e-4, atol=1e-5)


def test_an_image_size_sets_the_grid_and_other_images_are_refused() -> None:
    for name, size in (("tiny_vit", 48), ("tiny_resnet", 96)):
        encoder = build_encoder(f"open_clip:{name}", "clip", size)
        assert encoder(torch.rand(2, 3, size, size)).shape == (2, encoder.feature_dim)
        with pytest.raises(UserError, match=rf"images of 80x80 px for a tower of {size} px: .*--image-size {size}"):
            encoder(torch.rand(2, 3, 80, 80))


def test_published_towers_are_known_by_their_names() -> None:
    with torch.device("meta"):
        vit = build_encoder("open_clip:ViT-B-32-quickgelu", "clip", 224)
        resnet = build_encoder("open_clip:RN50", "clip", 224)
    assert (vit.feature_dim, resnet.feature_dim) == (512, 1024)
    assert sum(p.numel() for p in resnet.parameters()) == 38316896  # BadEncoder's encode_image.pth
    assert len(resnet.get_submodule("f").state_dict()) == 339


def test_rn50_of_open_clip_is_the_one_of_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    visual = build_simclr("open_clip:RN50", "clip", 64, projector=False).eval()
    for parameter in visual.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.0)
    torch.save({"state_dict": visual.get_submodule("f.f").state_dict()}, tmp_path / "encode_image.pth")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for arch in (None, "open_clip:RN50"):
            model, report = import_encoder(tmp_path / "encode_image.pth", arch, image_size=64)
            assert report.arch == (arch or "clip_resnet50")
            torch.testing.assert_close(model.eval().f(images), visual.f(images), rtol=1e-4, atol=1e-4)


def scripted(_: State, path: Path) -> None:
    """As OpenAI hands CLIP out: traced, in half precision."""
    clip = reference("tiny_vit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is going out of use
        inputs = torch.rand(1, 3, 32, 32), torch.ones(1, 16, dtype=torch.long)
        torch.jit.save(torch.jit.trace(clip, inputs, check_trace=False).half(), path)


LAYOUTS: dict[str, Callable[[State, Path], None]] = {
    "whole.pth": torch.save,
    "half.pt": lambda state, path: torch.save({k: v.half() for k, v in state.items()}, path),
    "training.pt": lambda state, path: torch.save(
        {"epoch": 3, "name": "x", "state_dict": {f"module.{k}": v for k, v in state.items()}}, path
    ),
    "open_clip.safetensors": safetensors.torch.save_file,
    "facts.pt": lambda state, path: torch.save({**state, "input_resolution": torch.tensor(32)}, path),
    "archive.pt": scripted,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_both_towers_come_out_of_every_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / name, tmp_path / "model"
    LAYOUTS[name](clip_state("tiny_vit"), path)
    assert main(["import", str(path), "--arch", "open_clip:tiny_vit", "--out", str(out)]) == 0
    assert "CLIP image tower" in capsys.readouterr().out
    is_rounded = name in ("half.pt", "archive.pt")
    tolerance: dict[str, Any] = {"rtol": 2e-2, "atol": 2e-2} if is_rounded else {}
    texts, images = ["a cat", "A photo of a dog"], torch.rand(2, 3, 32, 32)
    clip: Any = reference("tiny_vit")
    with torch.no_grad():
        model, card = load_simclr(out)
        features = clip.encode_image(model.f.normalize(images))
        torch.testing.assert_close(model.eval().f(images), features, **tolerance)
        found = load_text_tower("open_clip:tiny_vit", path)(texts)
        tokens = open_clip.SimpleTokenizer(context_length=16)(texts)
        torch.testing.assert_close(found, clip.encode_text(tokens, normalize=True), **tolerance)
    assert (card.kind, card.feature_dim, card.image_size) == ("encoder", 24, 32)


def test_an_image_tower_alone_comes_with_and_without_its_prefix(tmp_path: Path) -> None:
    state = {k: v for k, v in clip_state("tiny_resnet").items() if k.startswith("visual.")}
    for number, prefix in enumerate(("visual.", "")):
        named = {prefix + key.removeprefix("visual."): value for key, value in state.items()}
        torch.save({"state_dict": named}, tmp_path / f"{number}.pth")
        model, report = import_encoder(tmp_path / f"{number}.pth", "open_clip:tiny_resnet")
        tower = model.get_submodule("f.f").state_dict()
        assert all(tower[k.removeprefix("visual.")].equal(v) for k, v in state.items())
        assert report.dropped == ()


def test_the_tokenizer_is_clips(tmp_path: Path) -> None:
    tower = load_text_tower("open_clip:tiny_vit", save_clip(tmp_path / "clip.pth"))
    assert tower.tokenize(["a photo of a cat"])[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    with pytest.raises(UserError, match=r"'cat cat .*' has 17 tokens; open_clip:tiny_vit reads 16"):
        tower([" ".join(["cat"] * 15)])


def test_a_scripts_program_is_not_run(tmp_path: Path) -> None:
    scripted(clip_state("tiny_vit"), tmp_path / "clip.pt")
    with zipfile.ZipFile(tmp_path / "clip.pt") as archive, zipfile.ZipFile(tmp_path / "evil.pt", "w") as evil:
        for entry in archive.namelist():
            content = archive.read(entry)
            if "/code/" in entry:
                content = b"raise SystemExit('ran')" * 50
            evil.writestr(entry, content, zipfile.ZIP_DEFLATED if "/code/" in entry else zipfile.ZIP_STORED)
    plain, odd = read_checkpoint(tmp_path / "clip.pt"), read_checkpoint(tmp_path / "evil.pt")
    assert plain.keys() - {"attn_mask"} == clip_state("tiny_vit").keys()
    assert all(value.equal(odd[key]) for key, value in plain.items())
    with zipfile.ZipFile(tmp_path / "worse.pt", "w") as worse:
        worse.writestr("clip/data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
        worse.writestr("clip/constants.pkl", b"")
    with pytest.raises(UserError, match=r"pickles more than tensors \('os.system'\)"):
        read_checkpoint(tmp_path / "worse.pt")
    with zipfile.ZipFile(tmp_path / "none.pt", "w") as none:
        none.writestr("clip/data.pkl", b"\x80\x02}.")
        none.writestr("clip/constants.pkl", b"")
    with pytest.raises(UserError, match="a TorchScript archive of no module"):
        read_checkpoint(tmp_path / "none.pt")


def test_without_open_clip_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for start in (lambda: build_encoder("open_clip:RN50"), lambda: load_text_tower("open_clip:RN50", "x")):
        with pytest.raises(
            UserError, match=r"needs open_clip, which is not installed; pip install 'dist-defend\[clip\]'"
        ):
            start()


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("open_clip:RN-50", r"open_clip has no model 'RN-50': did you mean RN50"),
        ("open_clip:hf-hub:someone/model", "open_clip has no model 'hf-hub:someone/model'"),
        ("open_clip:convnext_base", "has an image tower of timm: write timm:convnext_base"),
        ("open_clip:ViT-B-32", "needs images of 32 px or more, not 16"),
        ("open_clp:RN50", "did you mean 'open_clip:NAME'"),
    ],
)
def test_what_cannot_be_an_encoder_is_a_user_error(arch: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_encoder(arch, "clip", 16)


def test_a_configuration_that_does_not_fit_is_a_user_error(tmp_path: Path) -> None:
    config = open_clip.get_model_config("tiny_vit")
    odd = {**config, "vision_cfg": {**config["vision_cfg"], "layers": 3}, "text_cfg": {"vocab_size": 100}}
    (tmp_path / "odd_clip.json").write_text(json.dumps(odd))
    open_clip.add_model_config(tmp_path)
    with pytest.raises(UserError, match=r"open_clip:odd_clip needs .* 4 blocks to tap"):
        build_encoder("open_clip:odd_clip", "clip", 32)
    with pytest.raises(UserError, match="open_clip:odd_clip knows 100 tokens, CLIP's tokenizer 49408"):
        load_text_tower("open_clip:odd_clip", tmp_path / "none.pth")


def test_what_holds_no_tower_is_a_user_error(tmp_path: Path) -> None:
    state = clip_state("tiny_vit")
    torch.save(state, tmp_path / "clip.pth")
    torch.save({k: v for k, v in state.items() if k.startswith("visual.")}, tmp_path / "visual.pth")
    torch.save({k: v for k, v in state.items() if k != "ln_final.bias"}, tmp_path / "cut.pth")
    for action, told in (
        (lambda: load_text_tower("open_clip:tiny_vit", tmp_path / "visual.pth"), "visual.pth holds no text tower"),
        (lambda: load_text_tower("open_clip:tiny_vit", tmp_path / "cut.pth"), r"1 missing \(ln_final.bias\)"),
        (lambda: load_text_tower("open_clip:tiny_vit", tmp_path / "none.pth"), "none.pth does not exist"),
        (lambda: load_text_tower("open_clip:roberta-ViT-B-32", tmp_path / "clip.pth"), "not CLIP's own"),
        (lambda: load_text_tower("open_clip:coca_ViT-B-32", tmp_path / "clip.pth"), "not CLIP's own"),
        (lambda: import_encoder(tmp_path / "clip.pth"), "a ViT of CLIP: name it, --arch open_clip:ViT-B-32-quickgelu"),
        (lambda: import_encoder(tmp_path / "clip.pth", "open_clip:tiny_resnet"), "does not fit the model"),
    ):
        with pytest.raises(UserError, match=told):
            action()
