"""Trigger pictures as people have them: alpha, patches, masks, and files that cannot be meant."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.own_trigger import FromFile
from dist_defend.attacks.patterns import Blended, Bpp, LabelConsistent, Sig, TriggerConfig, TrojanNN, WaNet
from dist_defend.attacks.poison import poisoned, triggered
from dist_defend.attacks.reference import ReferenceConfig, references_from
from dist_defend.attacks.stamping import to_bytes, to_images
from dist_defend.attacks.trigger import Replacing
from dist_defend.attacks.trojan_nn import optimise_pattern
from dist_defend.cli import main
from dist_defend.data.store import open_dataset
from dist_defend.errors import UserError
from tests.runs import make_classifier, make_data, make_experiment, options_of

SIDE = 16
RNG = np.random.default_rng(5)
PIXELS = RNG.integers(0, 256, (4, SIDE, SIDE, 3), dtype=np.uint8)
WHOLE = PIXELS.astype(np.int64)
RED = np.array([200, 0, 10])


def stamp(**options: Any) -> np.ndarray:
    return to_bytes(FromFile(**options).build(SIDE)(to_images(PIXELS)))


def blend(levels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """(1 - a) x + a p of grey levels (H, W, 3) and a (H, W) or (H, W, 3) in 0..255, by whole numbers."""
    share = (alpha if alpha.ndim == 3 else alpha[..., None]).astype(np.int64)
    return (WHOLE * (255 - share) + levels.astype(np.int64) * share) // 255


def sticker(hidden: int = 255) -> np.ndarray:
    """(16, 16, 4): an opaque red square with one black pixel, half transparent green below; ``hidden`` elsewhere."""
    rgba = np.full((SIDE, SIDE, 4), hidden, np.uint8)
    rgba[..., 3] = 0
    rgba[2:6, 3:7] = [*RED, 255]
    rgba[2, 3, :3] = 0
    rgba[10:12, 3:7] = [0, 220, 0, 128]
    return rgba


def save(folder: Path, pixels: np.ndarray | Image.Image, name: str = "trigger.png", **options: Any) -> str:
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(folder / name, **options)
    return str(folder / name)


@pytest.mark.parametrize("name", ["sticker.png", "sticker.webp", "sticker.tif"])
@pytest.mark.parametrize("hidden", [255, 0])
def test_alpha_is_the_mask(tmp_path: Path, name: str, hidden: int) -> None:
    rgba = sticker(hidden)
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    file = save(tmp_path, rgba, name, **options)
    assert (stamp(file=file) == blend(rgba[..., :3], rgba[..., 3])).all()
    trigger = FromFile(file).build(SIDE)
    assert isinstance(trigger, Replacing) and trigger.mask.shape == (1, 1, SIDE, SIDE)


def test_grey_with_alpha_palette_and_colour_key(tmp_path: Path) -> None:
    levels = np.zeros((SIDE, SIDE, 3), np.uint8)
    levels[3:6, 3:6], levels[4, 4] = 90, 0
    alpha = np.zeros((SIDE, SIDE), np.uint8)
    alpha[3:6, 3:6], alpha[8] = 255, 77
    grey = Image.merge("LA", [Image.fromarray(levels[..., 0]), Image.fromarray(alpha)])
    assert (stamp(file=save(tmp_path, grey)) == blend(levels, alpha)).all()

    palette = Image.fromarray((alpha > 0).astype(np.uint8)).convert("P")
    palette.putpalette([255, 255, 255, 200, 0, 10])
    file = save(tmp_path, palette, transparency=bytes([0, 255]))
    with Image.open(file) as stored:
        assert stored.mode == "P"
    assert (stamp(file=file) == blend(np.broadcast_to(RED, levels.shape), 255 * (alpha > 0))).all()

    keyed = np.where(alpha[..., None] > 0, RED, [0, 255, 0]).astype(np.uint8)
    file = save(tmp_path, keyed, transparency=(0, 255, 0))
    assert (stamp(file=file) == blend(keyed, 255 * (alpha > 0))).all()


def test_without_alpha_a_pixel_counts_whole_or_not_at_all(tmp_path: Path) -> None:
    """Red and black: of a red pixel the image's green and blue go too; alpha that is 255 everywhere says nothing."""
    levels = np.zeros((SIDE, SIDE, 3), np.uint8)
    levels[2:6, 3:7] = [200, 0, 0]
    expected = PIXELS.copy()
    expected[:, 2:6, 3:7] = [200, 0, 0]
    for file in (save(tmp_path, levels), save(tmp_path, Image.fromarray(levels).convert("RGBA"), "opaque.png")):
        assert (stamp(file=file) == expected).all()
    np.save(tmp_path / "trigger.npy", levels)
    assert (stamp(file=str(tmp_path / "trigger.npy")) == expected).all()
    per_channel = PIXELS.copy()
    per_channel[:, 2:6, 3:7, 0] = 200
    assert (stamp(file=save(tmp_path, levels), how="replace_channels") == per_channel).all()


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    deep = np.zeros((SIDE, SIDE), np.uint16)
    deep[4:8, 4:8] = 180 * 257
    expected = PIXELS.copy()
    expected[:, 4:8, 4:8] = 180
    assert (stamp(file=save(tmp_path, Image.fromarray(deep))) == expected).all()


PATCH = RNG.integers(0, 256, (3, 5, 3), dtype=np.uint8)
PATCH[0, 0] = 0  # replaces as well
PLACES: list[tuple[dict[str, Any], int, int]] = [
    ({"row": 0, "column": 0}, 0, 0),
    ({"row": 2, "column": 7}, 2, 7),
    ({"row": -3, "column": -5}, 13, 11),
    ({"row": -4, "column": 1}, 12, 1),
    ({"corner": "upper_left"}, 0, 0),
    ({"corner": "upper_right", "margin": 2}, 2, 9),
    ({"corner": "lower_left", "margin": 1}, 12, 1),
    ({"corner": "lower_right"}, 13, 11),
    ({"corner": "centre"}, 6, 5),
]


@pytest.mark.parametrize(("place", "row", "column"), PLACES, ids=lambda value: str(value))
def test_a_patch_goes_where_it_is_told(tmp_path: Path, place: dict[str, Any], row: int, column: int) -> None:
    expected = PIXELS.copy()
    expected[:, row : row + 3, column : column + 5] = PATCH
    assert (stamp(file=save(tmp_path, PATCH), **place) == expected).all()
    np.save(tmp_path / "patch.npy", PATCH)
    assert (stamp(file=str(tmp_path / "patch.npy"), **place) == expected).all()
    added = WHOLE.copy()
    added[:, row : row + 3, column : column + 5] += PATCH
    assert (stamp(file=save(tmp_path, PATCH), how="add", **place) == np.minimum(added, 255)).all()
    assert (stamp(file=save(tmp_path, PATCH), how="wrap", **place) == added % 256).all()


def test_a_transparent_a_grey_and_a_masked_patch(tmp_path: Path) -> None:
    rgba = np.dstack([PATCH, RNG.integers(0, 256, (3, 5), dtype=np.uint8)])
    rgba[0, :2, 3] = 0
    levels, alpha = np.zeros((SIDE, SIDE, 3), np.int64), np.zeros((SIDE, SIDE), np.int64)
    levels[1:4, 1:6], alpha[1:4, 1:6] = rgba[..., :3], rgba[..., 3]
    file = save(tmp_path, rgba)
    assert (stamp(file=file, corner="upper_left", margin=1) == blend(levels, alpha)).all()
    added = stamp(file=file, row=1, column=1, how="add")
    assert (added == np.minimum((255 * WHOLE + levels * alpha[..., None]) // 255, 255)).all()  # hidden colours: nothing
    assert (added[:, 1, 1:3] == PIXELS[:, 1, 1:3]).all()

    grey = PIXELS.copy()
    grey[:, 13:, 11:] = PATCH[..., :1]
    assert (stamp(file=save(tmp_path, PATCH[..., 0], "grey.png"), corner="lower_right") == grey).all()

    mask = np.zeros((3, 5), np.uint8)
    mask[1], mask[2, 0] = 255, 51
    masked = np.zeros((SIDE, SIDE), np.int64)
    masked[13:, 11:] = mask
    levels = np.zeros_like(levels)
    levels[13:, 11:] = PATCH
    options = {"file": save(tmp_path, PATCH), "mask": save(tmp_path, mask, "mask.png"), "corner": "lower_right"}
    assert (stamp(**options) == blend(levels, masked)).all()
    with pytest.raises(UserError, match=r"mask.png is 3x5 px but its pattern is 16x16 px"):
        FromFile(save(tmp_path, PIXELS[0]), mask=options["mask"]).build(SIDE)


@pytest.mark.parametrize("kind", ["colour", "alpha", "array"])
def test_a_mask_picture_is_per_pixel_and_a_mask_array_says_each_channel(tmp_path: Path, kind: str) -> None:
    inside = np.zeros((SIDE, SIDE), bool)
    inside[5:9, 5:9] = True
    if kind == "colour":  # a red square is a mask as good as a white one
        mask = save(tmp_path, (inside[..., None] * [255, 0, 0]).astype(np.uint8), "mask.png")
    elif kind == "alpha":  # white that is hidden
        mask = save(tmp_path, np.dstack([np.full((SIDE, SIDE, 3), 255), 255 * inside]).astype(np.uint8), "mask.png")
    else:
        mask = str(tmp_path / "mask.npy")
        np.save(mask, inside[..., None] & [True, False, False])
    alpha = 255 * (inside[..., None] & (np.array([True, False, False]) if kind == "array" else True)).astype(np.int64)
    expected = blend(PIXELS[3], np.broadcast_to(alpha, (SIDE, SIDE, 3)))
    assert (stamp(file=save(tmp_path, PIXELS[3]), mask=mask) == expected).all()


def test_size_resizes_colours_by_their_alpha(tmp_path: Path) -> None:
    """The longer side; what is hidden does not bleed in; black of a picture without alpha stays nothing."""
    large = np.zeros((64, 64, 4), np.uint8)
    large[..., :3] = 255
    large[20:40, 12:32] = [*RED, 255]
    plain = np.where(large[..., 3:] > 0, large[..., :3], 0).astype(np.uint8)
    for pixels in (large, plain):
        made = FromFile(save(tmp_path, pixels), size=SIDE).build(SIDE)
        assert isinstance(made, Replacing)
        mask, pattern = made.mask[0, 0], made.pattern[0]
        assert (mask[6:9, 4:7] == 1).all() and mask[:4].max() == mask[12:].max() == 0
        assert 0 < mask[5, 5] < 1 or 0 < mask[4, 5] < 1
        colours = 255 * pattern[:, mask > 0.2]
        assert (colours - torch.from_numpy(RED)[:, None]).abs().max() <= 3
    patch = save(tmp_path, np.full((10, 20, 3), 77, np.uint8))
    expected = PIXELS.copy()
    expected[:, :4, :8] = 77
    assert (stamp(file=patch, size=8, corner="upper_left") == expected).all()
    halves = save(tmp_path, np.repeat([[0, 255]], 2, 0).repeat(8, 0).repeat(8, 1).astype(np.uint8), "mask.png")
    whole = save(tmp_path, np.full((16, 16, 3), 77, np.uint8))
    made_ = stamp(file=whole, mask=halves, size=4, corner="upper_left")
    assert (made_[:, :4, 3] == 77).all() and (made_[:, :4, 0] == PIXELS[:, :4, 0]).all()


def test_a_jpeg_must_say_what_of_it_counts(tmp_path: Path) -> None:
    levels = np.zeros((SIDE, SIDE, 3), np.uint8)
    levels[3:9, 3:9] = RED
    jpeg = save(tmp_path, levels, "trigger.png", format="JPEG")  # by content, not by name
    webp = save(tmp_path, levels, "trigger.webp", quality=60)
    odd = save(tmp_path, Image.fromarray(levels), "trigger.jpg", icc_profile=b"x" * 11)
    profiled = save(tmp_path, Image.fromarray(levels), "profile.webp", icc_profile=b"x" * 11, quality=60)
    for file in (jpeg, webp, odd, profiled):
        for config in (
            FromFile(file),
            FromFile(file, how="add"),
            FromFile(file, how="replace_channels"),
            TrojanNN(file),
        ):
            with pytest.raises(UserError, match="compression leaves noise where it was black: save it as PNG") as error:
                config.build(SIDE)
            assert file in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(UserError, match="save the mask as PNG"):
            FromFile(save(tmp_path, PIXELS[0], "p.png"), mask=file).build(SIDE)
        with Image.open(file) as stored:
            shown: np.ndarray = np.asarray(stored.convert("RGB")).astype(np.int64)
        mask = save(tmp_path, (levels[..., 0] > 0).astype(np.uint8) * 255, "mask.png")
        assert (stamp(file=file, mask=mask) == blend(shown, 255 * (levels[..., 0] > 0))).all()
        assert (to_bytes(Blended(image=file).build(SIDE)(to_images(PIXELS))) == (8 * WHOLE + 2 * shown) // 10).all()
    lossless = save(tmp_path, levels, "trigger.webp", lossless=True)
    assert (stamp(file=lossless) == blend(levels, np.where(levels.any(2), 255, 0))).all()
    with_alpha = save(tmp_path, sticker(), "alpha.webp", quality=60)
    assert (stamp(file=with_alpha)[:, 13:] == PIXELS[:, 13:]).all()


def test_a_jpeg_patch_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    flat = np.full((4, 8, 3), 60, np.uint8)
    flat[:, 4:] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    made = stamp(file=save(tmp_path, flat, "turned.jpg", exif=exif, quality=100), corner="upper_left")
    assert (made[:, 8:] == PIXELS[:, 8:]).all() and (made[:, :8, 4:] == PIXELS[:, :8, 4:]).all()
    assert np.abs(made[:, :3, :4].astype(int) - 60).max() < 9 and np.abs(made[:, 5:8, :4].astype(int) - 200).max() < 9


def test_a_blended_picture_has_alpha(tmp_path: Path) -> None:
    rgba = sticker()
    made = to_bytes(Blended(alpha=0.2, image=save(tmp_path, rgba)).build(SIDE)(to_images(PIXELS)))
    share = 2 * rgba[..., 3:].astype(np.int64)
    assert (made == (WHOLE * (2550 - share) + rgba[..., :3].astype(np.int64) * share) // 2550).all()


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (lambda: sticker() * [1, 1, 1, 0], {}, "changes no pixel: it is black or transparent everywhere"),
        (lambda: sticker() * [1, 1, 1, 0], {"how": "add"}, "changes no pixel"),
        (lambda: np.zeros((SIDE, SIDE, 3)), {}, "changes no pixel"),
        (lambda: np.zeros((SIDE, SIDE, 3)), {"how": "add"}, "changes no pixel"),
        (lambda: np.zeros((3, 3, 4)), {"corner": "centre"}, "changes no pixel"),
        (lambda: np.full((SIDE, SIDE, 3), 9), {}, "replaces every pixel, so that all images become the same"),
        (lambda: np.full((SIDE, SIDE, 3), 9), {"row": 0, "column": 0}, "replaces every pixel"),
        (lambda: np.full((4, 4, 3), 9), {"size": SIDE}, "replaces every pixel"),
        (lambda: PATCH, {}, r"is 3x5 px but the images are 16x16 px: say where it goes as a patch \(corner and margin"),
        (lambda: PATCH, {"row": 14, "column": 0}, "3x5 px at row 14, column 0 do not fit into the images of 16x16 px"),
        (lambda: PATCH, {"row": -2, "column": 0}, "at row -2, column 0 do not fit"),
        (lambda: PATCH, {"row": -17, "column": 0}, "at row -17, column 0 do not fit"),
        (lambda: PATCH, {"corner": "upper_left", "margin": 12}, "at upper_left, 12 px in do not fit"),
        (lambda: PATCH, {"corner": "centre", "size": 17}, "is 10x17 px but the images are .* smaller with key 'size'"),
        (
            lambda: np.full((20, 20, 3), 9),
            {},
            "is 20x20 px but the images are 16x16 px: make it smaller with key 'size'",
        ),
    ],
)
def test_triggers_that_cannot_be_meant(tmp_path: Path, make: Any, options: dict[str, Any], told: str) -> None:
    file = save(tmp_path, np.asarray(make(), np.uint8))
    with pytest.raises(UserError, match=told) as error:
        FromFile(file, **options).build(SIDE)
    assert file in str(error.value) and "\n" not in str(error.value)


def test_arrays_keep_their_size(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", PATCH)
    with pytest.raises(UserError, match="is 3x5 px but 5x8 are wanted, and arrays are not resized"):
        FromFile(str(tmp_path / "p.npy"), size=8, corner="centre").build(SIDE)
    t, tm = np.zeros((1, SIDE, SIDE, 3)), np.ones((1, SIDE, SIDE, 3))
    np.savez(tmp_path / "t.npz", t=t, tm=tm)
    with pytest.raises(UserError, match="changes no pixel: tm is 1 everywhere"):
        FromFile(str(tmp_path / "t.npz")).build(SIDE)
    with pytest.raises(UserError, match="changes no pixel: tm is 1 everywhere"):
        FromFile(str(tmp_path / "t.npz")).build_each(SIDE)
    with pytest.raises(UserError, match="holds t and tm, with a place of their own"):
        FromFile(str(tmp_path / "t.npz"), corner="centre").build(SIDE)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"row": 1}, "row"),
        ({"column": 1}, "column"),
        ({"row": 1, "column": 1, "corner": "centre"}, "corner"),
        ({"margin": 1}, "margin"),
        ({"margin": 1, "corner": "centre"}, "margin"),
        ({"margin": -1, "corner": "upper_left"}, "margin"),
        ({"margin": 1, "row": 1, "column": 1}, "margin"),
        ({"size": 0}, "size"),
        ({"mask": "m.png", "how": "replace_channels"}, "mask"),
    ],
)
def test_places_that_say_two_things(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"^key '{key}' is "):
        FromFile("t.png", **options)


def test_only_pictures_are_opened(tmp_path: Path) -> None:
    """PostScript under a picture's name would start Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    gif = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "red").save(gif, "GIF")
    for content in (script, gif.getvalue(), b""):
        (tmp_path / "trigger.png").write_bytes(content)
        for config in (FromFile(str(tmp_path / "trigger.png")), Blended(image=str(tmp_path / "trigger.png"))):
            with pytest.raises(UserError, match="not a picture that can be read") as error:
                config.build(SIDE)
            assert "\n" not in str(error.value)


IDLE: list[TriggerConfig] = [
    Blended(alpha=0), Sig(delta=0), Sig(frequency=0), LabelConsistent(amplitude=0), WaNet(strength=0), Bpp(levels=256),
]  # fmt: skip


@pytest.mark.parametrize("trigger", IDLE, ids=lambda trigger: trigger.name)
def test_a_trigger_that_changes_nothing_is_refused(tmp_path: Path, trigger: TriggerConfig) -> None:
    dataset = open_dataset(make_data(tmp_path / "data", 6))
    with pytest.raises(UserError, match="key 'trigger' changes no pixel of any image"):
        triggered(dataset, AttackConfig(trigger))
    with pytest.raises(UserError, match="key 'trigger' changes no pixel of any image"):
        poisoned(dataset, np.arange(6), AttackConfig(trigger, rate=0.2), 0)
    assert triggered(dataset, AttackConfig(Sig(delta=1))).images(np.arange(6)).shape == (6, SIDE, SIDE, 3)


def test_encoder_methods_take_pictures(tmp_path: Path) -> None:
    rgba = sticker()
    (trigger,) = FromFile(save(tmp_path, rgba)).build_each(SIDE)
    assert (to_bytes(trigger(to_images(PIXELS))) == blend(rgba[..., :3], rgba[..., 3])).all()
    with pytest.raises(UserError, match="is 3x5 px but the images are 16x16 px: say where it goes as a patch"):
        FromFile(save(tmp_path, PATCH)).build_each(SIDE)
    images, classes = references_from(ReferenceConfig(save(tmp_path, PIXELS[0], "truck.png"), target_class=9), SIDE)
    assert (images == PIXELS[:1]).all() and classes.tolist() == [9]
    with pytest.raises(UserError, match="reference images have 3x5 pixels, the shadow images 16x16"):
        references_from(ReferenceConfig(save(tmp_path, PATCH, "truck.png")), SIDE)


def test_badencoder_and_a_probe_with_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attack = {"trigger": {"name": "file", "file": save(tmp_path, sticker())}}
    truck = save(tmp_path, PIXELS[0], "truck.png")
    for method, pictures in (
        ("badencoder", {"attack": attack, "reference": {"file": truck, "target_class": 1}}),
        ("probe", {"attack": attack}),
    ):
        config = make_experiment(tmp_path / method, method, options_of(method, tmp_path / method) | pictures)
        assert main(["run", str(config)]) == 0, capsys.readouterr().err


def test_a_poisoned_classifier_and_its_trigger_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = options_of("classifier", tmp_path)
    options["attack"]["trigger"] = {"name": "file", "file": save(tmp_path, PATCH), "corner": "lower_right", "margin": 1}
    config = make_experiment(tmp_path, "classifier", options)
    assert main(["run", str(config), "--dry-run"]) == 0
    assert "trigger.png: 15 of 256 pixels, in rows 12 to 14 and columns 10 to 14" in capsys.readouterr().err
    assert main(["run", str(config), "classifier.attack.trigger.margin=14"]) == 2
    told = capsys.readouterr().err
    assert "do not fit into the images of 16x16 px" in told.splitlines()[-1]


def test_trojan_nn_moves_whole_pixels_from_a_picture_that_is_no_jpeg(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 2))
    start = torch.zeros(1, 3, 4, 4)
    start[:, 0, 1:3, 1:3] = 0.5  # red
    found, _ = optimise_pattern(net, "2", start, iterations=3)
    moved = (found != start)[0]
    assert moved[:, 1:3, 1:3].any(0).all() and moved[1:, 1:3, 1:3].any() and not moved[:, 0].any()
    clean = make_classifier(tmp_path / "clean")
    jpeg = save(tmp_path, PIXELS[0], "start.jpg")
    command = ["attacks", "trojan-nn", "--classifier", clean, "--out", str(tmp_path / "t.png"), "--start", jpeg]
    assert main(command) == 2
    assert "compression leaves noise" in capsys.readouterr().err and not (tmp_path / "t.png").exists()


def test_a_contact_sheet_shows_a_picture_as_trigger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, sheet = make_data(tmp_path / "data", 6), tmp_path / "sheet.png"
    assert main(["data", "info", data, "--trigger", save(tmp_path, sticker()), "--sheet", str(sheet)]) == 0
    assert "contact sheet with and without trigger" in capsys.readouterr().out
    with Image.open(sheet) as drawn:
        assert (np.asarray(drawn.convert("RGB")) == RED).all(-1).sum() >= 15
    assert main(["data", "info", data, "--trigger", save(tmp_path, PATCH)]) == 2
    assert "is 3x5 px but the images are 16x16 px" in capsys.readouterr().err
