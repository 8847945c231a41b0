"""Pickles changed opcode by opcode, and archives packed again with checksums that are right."""

import io
import pickletools
import random
import struct
import zipfile

OPCODES = (  # single ones that change what the others mean
    *(bytes([code]) for code in b"012()]}NRbuaetoQ\x85\x86\x87\x81\x92\x93\x94\x97\x98\x88\x89\x8f\x90\x91."),
    b"h\x00",
    b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"p" + b"9" * 30 + b"\n",
    b"K\x00",
    b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 8,
    b"\x8b" + struct.pack("<I", 3000) + b"\x7f" * 3000,
    b"\x8b\xff\xff\xff\xff",
    b"I" + b"7" * 4000 + b"\n",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"X\xff\xff\xff\x7fabc",
    b"X\x04\x00\x00\x00a\x1b[2",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + struct.pack("<Q", 2**62),
    b"\x95" + b"\xff" * 8,
    b"\x96" + struct.pack("<Q", 2**40),
    b"\x82\x01",
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ccollections\nOrderedDict\n",
    b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"c_codecs\nencode\n",
    b"ctorch\ndevice\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"csome\nThing\n",
    b"(S'a'\nisome\nThing\n",
)
BOMBS = (  # values that are short to write
    b"N" + b"2\x86" * 70,  # a tuple of two of the same, of two of the same, ...
    b"N" + b"\x85" * 20_000,
    b"]" * 300 + b"a" * 299,
    b"ccollections\nOrderedDict\n" + b"NR" * 3000,
    b"(" + b"N" * 5000 + b"l",
)


def mutate_pickle(rng: random.Random, data: bytes) -> bytes:
    """The pickle with one to four opcodes gone, doubled, moved, changed inside, or others in their place."""
    starts = [at for _, _, at in pickletools.genops(data) if at is not None]
    parts = [data[at:end] for at, end in zip(starts, [*starts[1:], len(data)], strict=True)]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(parts))
        other = rng.randrange(len(parts))
        match rng.randrange(8):
            case 0:
                del parts[at : at + rng.choice((1, 1, 1, 5))]
            case 1:
                parts[at:at] = [parts[at]] * rng.choice((1, 1, 2, 1000))
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = parts[other]
            case 4:
                parts[at] = rng.choice(OPCODES)
            case 5:
                parts.insert(at, rng.choice(OPCODES))
            case 6:
                parts[at] = rng.choice(BOMBS)
            case 7 if len(parts[at]) > 1:
                inside = bytearray(parts[at])
                inside[rng.randrange(1, len(inside))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
                parts[at] = bytes(inside)
        if not parts:
            return b""
    return b"".join(parts)


def unpacked(data: bytes) -> dict[str, bytes]:
    """The entries of an archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(entries: dict[str, bytes]) -> bytes:
    """An archive as torch.save writes them, without compression."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()
