"""Files of triggers, references, generators, masks, rows, prompts and DeepSpeed's options: read, or one line."""

import functools
import io
import json
import os
import random
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
from PIL import Image
from torch import nn

from dist_defend.attacks.attack import AttackConfig
from dist_defend.attacks.given import NpzImages, triggered_images
from dist_defend.attacks.input_aware import Generators, load_generators
from dist_defend.attacks.own_trigger import Corner, FromFile
from dist_defend.attacks.pattern_file import open_images, read_mask
from dist_defend.attacks.patterns import Blended, TrojanNN
from dist_defend.attacks.reference import ReferenceConfig, references_from
from dist_defend.engine.sharding import launched_sharding
from dist_defend.methods.defend.defender import read_index
from dist_defend.methods.defend.pruning.masks import check_neurons, neuron_table, read_mask_values, write_mask_values
from dist_defend.methods.measure.zeroshot import _class_names
from dist_defend.models.classifier import build_classifier
from dist_defend.models.masked_norm import norm_names
from tests.fuzz.harness import bad_outcomes
from tests.fuzz.mutate import mutate_bytes, mutate_tree

Read = Callable[[], object]
SURFACES = (
    *("trigger_npz", "reference_npz", "pattern_array", "picture", "given_npz", "generators", "mask_values"),
    *("row_numbers", "class_names", "deepspeed"),
)
SIDE = 16
SHAPES = (
    *("()", "(0,)", "(2**40,)", "(16, 16)", "(16, 16, 3)", "(1, 16, 16, 3)", "(3, 16, 16)", "(-1, 16)", "(16, 16, 4)"),
    *("(1000000000, 1000000000)", "(0, 9223372036854775807, 3)", f"({'1, ' * 30})", "[16, 16, 3]", "'x'", "(1e3,)"),
    *("(True, 16, 16, 3)", "((16,), 16)", "(" * 200 + ")" * 200),
)
DTYPES = (
    *("|u1", "<f8", ">f4", "|b1", "<i8", "|O", "<U9", "|S0", "<c16", "|V100", "<M8[s]", "f2", "x", "<u8", "<f16"),
    *("|V2147483647", "a\x1b[2J"),
)


def test_attack_files(count: int) -> None:
    assert bad_outcomes(f"tests.fuzz.test_attack_files:{','.join(SURFACES)}", count) == []


def trigger_npz(rng: random.Random, folder: Path) -> Read:
    t, tm = np.zeros((2, SIDE, SIDE, 3)), np.ones((2, SIDE, SIDE, 3))
    t[:, 3:5, 3:5], tm[:, 3:5, 3:5] = 255, 0
    path = write(folder / "t.npz", npz(rng, {"t": t, "tm": tm}))
    if rng.random() < 0.5:
        return lambda: FromFile(path).build(SIDE)
    return lambda: FromFile(path).build_each(SIDE)


def reference_npz(rng: random.Random, folder: Path) -> Read:
    path = write(folder / "r.npz", npz(rng, {"x": np.zeros((2, SIDE, SIDE, 3), np.uint8), "y": np.arange(2)}))
    return lambda: references_from(ReferenceConfig(file=path), SIDE)


def pattern_array(rng: random.Random, folder: Path) -> Read:
    levels = np.zeros((SIDE, SIDE, 3), rng.choice((np.uint8, np.float32, np.float64, np.int16)))
    levels[2:5, 2:5] = 1
    is_single = rng.random() < 0.5
    data = npy(rng, levels) if is_single else npz(rng, {rng.choice(("x", "pattern", "z")): levels})
    path = write(folder / ("p.npy" if is_single else "p.npz"), data)
    return using(rng, path)


def picture(rng: random.Random, folder: Path) -> Read:
    kind = rng.choice(("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM"))
    file = io.BytesIO()
    alpha = kind in ("PNG", "WEBP", "TIFF") and rng.random() < 0.5
    mode = "RGBA" if alpha else "RGB"
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, len(mode)), np.uint8)
    Image.fromarray(pixels, mode).save(file, kind)
    data = file.getvalue()
    if kind == "PNG" and rng.random() < 0.2:  # a size that the pixels do not have, with a checksum that is right
        size = struct.pack(">II", *(rng.choice((0, 1, 16, 4000, 5000, 2**16, 2**31 - 1)) for _ in range(2)))
        chunk = b"IHDR" + size + data[24:29]
        data = data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    else:
        data = mutate_bytes(rng, data)
    path = write(folder / f"p.{rng.choice((kind.lower(), 'png', 'jpg'))}", data)
    if rng.random() < 0.2:
        return lambda: references_from(ReferenceConfig(file=path), SIDE)
    return using(rng, path)


def using(rng: random.Random, path: str) -> Read:
    """One of the ways in which a pattern's file is read."""
    size = rng.choice((None, 4, SIDE, 10**9))
    corner: Corner | None = rng.choice((None, "centre", "upper_left"))
    ways: list[Read] = [
        lambda: FromFile(path, how="replace", size=size, corner=corner).build(SIDE),
        lambda: FromFile(path, how="add").build(SIDE),
        lambda: FromFile(path, how="wrap").build(SIDE),
        lambda: FromFile(path, how="replace_channels").build(SIDE),
        lambda: TrojanNN(path).build(SIDE),
        lambda: Blended(image=path).build(SIDE),
        lambda: read_mask(path, SIDE),
        lambda: open_images(path, 16, SIDE),
    ]
    return rng.choice(ways)


def given_npz(rng: random.Random, folder: Path) -> Read:
    x, y = np.zeros((3, SIDE, SIDE, 3), np.uint8), np.arange(3)
    arrays: dict[str, np.ndarray] = {"x": x, "y": y, "y_bd": np.zeros(3, np.int64), "flag": np.ones(3, bool)}
    path = write(folder / "bd_test.npz", npz(rng, arrays))
    test = NpzImages(folder / "test", x, y, ("0", "1", "2"), None)
    target = rng.choice((None, 0, 2))
    return lambda: triggered_images(test, y, AttackConfig(images=path, target_class=target), 3)


def generators(rng: random.Random, folder: Path) -> Read:
    data = trained()
    if rng.random() < 0.3:
        path = write(folder / "g.safetensors", mutate_bytes(rng, data))
    else:
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_tree(rng, json.loads(data[8 : 8 + length]))).encode()
        path = write(folder / "g.safetensors", len(header).to_bytes(8, "little") + header + data[8 + length :])
    return lambda: load_generators(path, SIDE, "none")


def mask_values(rng: random.Random, folder: Path) -> Read:
    path = write(folder / "mask_values.txt", mutate_bytes(rng, masks()))
    return lambda: check_neurons(read_mask_values(path), network(), norm_names(network()), path)


def row_numbers(rng: random.Random, folder: Path) -> Read:
    data = b"\n".join(b"%d" % rng.choice((0, 1, 5, 99, 10**19, -1)) for _ in range(rng.randrange(50)))
    path = write(folder / "index.txt", mutate_bytes(rng, data))
    return lambda: read_index(path, 100, "rnp.index")


def class_names(rng: random.Random, folder: Path) -> Read:
    names = "stop\nyield\nBüro 1\nbird\n".encode()
    path = write(folder / "names.txt", mutate_bytes(rng, names))
    return lambda: _class_names(path, ("a", "b", "c", "d"), "zeroshot.tasks.x")


def deepspeed(rng: random.Random, folder: Path) -> Read:
    tree = {"zero_optimization": {"stage": 2, "overlap_comm": False, "x": [1, 2.5, None]}, "zero_allow_untested": True}
    data = json.dumps(mutate_tree(rng, tree)).encode()
    path = write(folder / "zero.json", mutate_bytes(rng, data) if rng.random() < 0.5 else data)

    def read() -> None:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": path}
        launched_sharding("fp32")

    return read


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def npy(rng: random.Random, array: np.ndarray) -> bytes:
    """An npy file with something wrong in its header or its bytes, or nothing."""
    file = io.BytesIO()
    np.save(file, array)
    data = file.getvalue()
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    if rng.random() < 0.2:
        return data
    shape = rng.choice(SHAPES) if rng.random() < 0.6 else str(array.shape)
    dtype = rng.choice(DTYPES) if rng.random() < 0.4 else array.dtype.str
    header = f"{{'descr': {dtype!r}, 'fortran_order': {rng.choice((True, False, 3))}, 'shape': {shape}, }}\n".encode()
    version = rng.choice((1, 1, 2, 3, 9))
    head = b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header))
    return head + header + array.tobytes() * rng.choice((1, 1, 2))


def npz(rng: random.Random, arrays: dict[str, np.ndarray]) -> bytes:
    """An archive of such; some are packed tightly."""
    file = io.BytesIO()
    compression = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(file, "w", compression, compresslevel=1) as archive:
        for name, array in arrays.items():
            is_hit = rng.random() < 1 / len(arrays)
            plain = io.BytesIO()
            np.save(plain, array)
            data = npy(rng, array) if is_hit else plain.getvalue()
            if compression == zipfile.ZIP_DEFLATED and rng.random() < 0.01:
                data += bytes(10**8)  # which deflates to a thousandth
            archive.writestr(f"{name}.npy", data)
    return mutate_bytes(rng, file.getvalue()) if rng.random() < 0.2 else file.getvalue()


@functools.cache
def trained() -> bytes:
    return safetensors.torch.save(Generators(SIDE, "none").state_dict())


@functools.cache
def network() -> nn.Module:
    return build_classifier("wrn_10_1", 3).net


@functools.cache
def masks() -> bytes:

    layers = {name: network().get_parameter(f"{name}.weight").detach().clamp(0, 1) for name in norm_names(network())}
    with tempfile.TemporaryDirectory() as folder:
        write_mask_values(Path(folder) / "m.txt", neuron_table(layers))
        return (Path(folder) / "m.txt").read_bytes()
