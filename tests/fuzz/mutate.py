"""What goes wrong with files: bytes cut, flipped, doubled or swapped; values of a JSON or YAML tree replaced."""

import copy
import random
from typing import Any

LENGTHS = (0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
SCALARS: tuple[Any, ...] = (
    None,
    True,
    False,
    *LENGTHS,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "../../etc/passwd",
    "a\x1b[2Jb",
    "\u202egnp",
    "x" * 5000,
    "\udc80",
    [],
    {},
    [[]],
    {"": None},
)
TEXTS = (b"\x00", b"\xff\xfe", b"\x1b[2J", b"{", b"[" * 2000, b"&a [*a]", b"NaN", b"1e999", b"-1", b'"', b"\n", b"\r\n")


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """The data with one to four things wrong."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(7):
            case 0:
                del out[at:]
            case 1:
                del out[at : at + rng.randint(1, 64)]
            case 2 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 3:
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice(LENGTHS) % (1 << 8 * width)
                out[at : at + width] = value.to_bytes(width, "little")
            case 4:
                out[at:at] = rng.choice(TEXTS)
            case 5:
                to = rng.randrange(len(out) + 1)
                out[at:at] = out[to : to + rng.randint(1, 256)]
            case 6:
                out[at : at + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))
    return bytes(out)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of nested dicts and lists in which one to three places hold something else, are gone or are doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(list(_places(tree)) or [(None, None)])
        if parent is None:
            return rng.choice(SCALARS)
        match rng.randrange(5):
            case 0:
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[rng.choice(("unknown", "", "a\nb", str(key) + "x"))] = parent[key]
            case 2 if isinstance(parent, list):
                parent[key:key] = [parent[key]] * rng.choice((1, 2, 1000))
            case 3 if isinstance(parent[key], int | float):
                parent[key] = rng.choice((-parent[key], parent[key] + 1, parent[key] * 1000, str(parent[key])))
            case _:
                parent[key] = copy.deepcopy(rng.choice(SCALARS))
    return tree


def _places(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key
        yield from _places(value)
