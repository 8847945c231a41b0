"""There is one place where a trigger meets images: attacks/stamping.py. A second one is found here.

Outside of it no file calls a trigger, hands one to a function that might, blends by a mask, or turns the output of
arithmetic into uint8. The exceptions are listed with what they do instead of stamping.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAMPING = "dist_defend/attacks/stamping.py"
FILES = sorted(file for part in ("dist_defend", "examples") for file in (ROOT / part).rglob("*.py"))
TRIGGER = re.compile(r"(^|_)(trigger|stamp)$")
MASK = re.compile(r"mask|keep")
# Functions that take a trigger: they stamp by the one place, keep it, or look at it.
TAKERS = {
    "stamp_images",
    "stamp_pixels",
    "cross_pixels",
    "PoisonedDataset",
    "not_idle",
    "check_size",
    "AttackConfig",
    "_triggers",
}
CHECKS = {"check_only_trigger"}
BLENDING = {
    "dist_defend/attacks/trigger.py",  # what a mask means
    "dist_defend/bench/badencoder.py",  # the white pattern that the published loader takes
}
TO_BYTES = {
    "dist_defend/attacks/drawn.py",  # draws patterns
    "dist_defend/attacks/gallery.py",  # draws the difference of two images
    "dist_defend/attacks/own_trigger.py",  # a file's opacity
    "dist_defend/attacks/cli.py",  # a start picture, of whole grey levels
    "dist_defend/inside.py",  # lays a heat map over a picture
    "dist_defend/methods/defend/cmi/memory.py",  # keeps what a generator made
}


def name_of(node: ast.expr) -> str:
    """The last name of ``a.b.c`` or ``c``; nothing for other expressions."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def is_trigger(node: ast.expr) -> bool:
    """A trigger by its name, or what ``.build(...)`` or a trigger's ``.to(...)`` returns."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr == "build" or (node.func.attr == "to" and is_trigger(node.func.value))
    return name_of(node) not in CHECKS and bool(TRIGGER.search(name_of(node)))


def has_mask(node: ast.expr) -> bool:
    """Something like ``1 - mask``."""
    is_rest = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and isinstance(node.left, ast.Constant)
    return is_rest and bool(MASK.search(ast.unparse(node.right)))  # type: ignore[attr-defined]


def is_uint8(call: ast.Call) -> bool:
    is_cast = isinstance(call.func, ast.Attribute) and call.func.attr in ("to", "astype", "type")
    return is_cast and any("uint8" in ast.unparse(argument) for argument in call.args)


def stampings(source: str, file: str) -> list[str]:
    """file:line of what stamps, or might."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            is_call = is_trigger(node.func) or name_of(node.func) == "cross"
            is_given = name_of(node.func) not in TAKERS and any(map(is_trigger, arguments))
            hit = is_call or is_given or (is_uint8(node) and file not in TO_BYTES)
        else:
            is_product = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
            hit = is_product and file not in BLENDING and (has_mask(node.left) or has_mask(node.right))  # type: ignore[attr-defined]
        if hit:
            found.append(f"{file}:{node.lineno}: {ast.unparse(node)[:80]}")  # type: ignore[attr-defined]
    return found


def is_looked_at(file: str) -> bool:
    """Not the one place, and not what only reads and augments images, which knows of no trigger."""
    return file != STAMPING and not re.match(r"dist_defend/(data/(?!cli|sheet)|models|ops|report)", file)


def test_images_are_stamped_in_one_place() -> None:
    names = [str(file.relative_to(ROOT)) for file in FILES]
    assert STAMPING in names and len(names) > 150
    found = [hit for file, name in zip(FILES, names, strict=True) if is_looked_at(name)
             for hit in stampings(file.read_text(), name)]  # fmt: skip
    assert found == [], "\n".join(found)


def test_the_list_of_exceptions_is_no_longer_than_it_must_be() -> None:
    for names in (BLENDING, TO_BYTES):
        for name in names:
            assert stampings((ROOT / name).read_text(), "another.py"), name


@pytest.mark.parametrize(
    "line",
    [
        "images[stamped] = to_bytes(self.trigger(to_images(source)))",
        "made = self.trigger.cross(to_images(images), others, rows)",
        "(trigger(pixels) * 255).round()",
        "(pixels * 255).round().to(torch.uint8)",
        "(255 * levels).astype(np.uint8)",
        "stamped, _, _ = extract_features(model.f, loader, ranks, self.trigger)",
        "stamped = [trigger.to(x.device, x.dtype)(x) for trigger in self.triggers]",
        "[to_bytes(trigger(before)) for caption, trigger in named]",
        "trigger_of(attack).build(32)(images)",
        "x = images * (1 - mask) + pattern * mask",
        "x = (1 - self.trigger.mask) * images",
        "x = list(map(trigger, batches))",
    ],
)
def test_a_second_stamping_is_found(line: str) -> None:
    assert stampings(line, "another.py")


@pytest.mark.parametrize(
    "line",
    ["stamp_pixels(images, self.trigger)", "x = stamp_images(images, trigger)", "trigger = options.build(32)",
     "trigger = trigger.to(device)", "x = 1 - mask", "x = torch.zeros(3, dtype=torch.uint8)"],
)  # fmt: skip
def test_what_does_not_stamp_is_left_alone(line: str) -> None:
    assert stampings(line, "another.py") == []
