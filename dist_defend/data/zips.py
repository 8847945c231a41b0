"""A zip of pictures: a folder per class, in a folder per split where there are several. Nothing is unpacked."""

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dist_defend.data.archives import Found, Member, labels_by_folder, source_of, split_by_folder
from dist_defend.data.class_order import label_notes, number_notes
from dist_defend.data.pictures import ENDINGS, is_picture
from dist_defend.data.reading import Keys, PictureSource
from dist_defend.data.splits import is_passed_over
from dist_defend.errors import UserError

ZIP_ENDINGS = (".zip",)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # pictures are packed already; others need more memory or code
_MOST_BYTES = 256 << 20  # of a picture, unpacked
_MOST_TIMES, _FREE_BYTES = 100, 1 << 20  # it may unpack to so many times its packed bytes, and so many more
_ENCRYPTED = 1


@dataclass(frozen=True)
class _InZip(Member):
    """``info`` of the open archive, which reads for several threads."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def read(self) -> bytes:
        with _readable(self.shard):
            return self.archive.read(self.info)  # at most info.file_size bytes, whose checksum it compares


def zip_splits(path: Path, keys: Keys) -> list[str]:
    """The splits: the folders train/, test/ and so on in it, or train. UserError as for open_zip."""
    return list(_found(path))


def open_zip(path: Path, split: str, keys: Keys) -> PictureSource:
    """One split, in the order of the pictures' names.

    UserError for a zip that is damaged, encrypted or packed in a rare way, that holds links or paths that lead out, or
    pictures that would unpack to far more than they are.
    """
    found = _found(path)
    mine = found[split]
    classes, labels = labels_by_folder(found)
    notes = number_notes(classes) if classes else ["images have no label (-1): there is no folder per class"]
    notes += label_notes(classes, labels, split)
    if mine.other_files:
        notes.append(f"files in the zip that are no pictures, passed over: {mine.other_files}")
    return source_of(mine, labels[split], classes, notes)


def _found(path: Path) -> dict[str, Found]:
    whole = Found()
    with _readable(path):
        archive = zipfile.ZipFile(path)
    for info in archive.infolist():
        place = _checked(path, info)
        if info.is_dir() or any(map(is_passed_over, place.parts)):
            continue
        if is_picture(place.name):
            whole.pictures.append(_InZip(str(path), place, archive, info))
        else:
            whole.other_files += 1
    if not whole.pictures:
        raise UserError(f"{path}: no pictures in it ({', '.join(ENDINGS)}); check --path")
    whole.pictures.sort(key=lambda member: member.path.parts)
    if twice := [one for one, other in zip(whole.pictures, whole.pictures[1:], strict=False) if one.path == other.path]:
        raise UserError(f"{path}: holds '{twice[0].path}' twice; pack each file once")
    whole.words += [None] * len(whole.pictures)
    return split_by_folder({"train": whole})


def _checked(path: Path, info: zipfile.ZipInfo) -> PurePosixPath:
    """The member's place. UserError unless it is a plain file, or a folder, within the zip."""
    place = PurePosixPath(info.filename)
    if place.is_absolute() or ".." in place.parts or "\\" in info.filename:
        raise UserError(f"{path}: the member '{info.filename}' leads out of the zip; ask for another copy")
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where it was packed on Windows
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise UserError(f"{path}: the member '{info.filename}' is a link or a device; pack plain files")
    if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
        raise UserError(f"{path}: '{info.filename}' is encrypted, or neither stored nor deflated; pack it anew")
    if info.file_size > min(_MOST_BYTES, _FREE_BYTES + _MOST_TIMES * info.compress_size):
        told = f"{info.file_size:,} bytes from {info.compress_size:,}"
        raise UserError(f"{path}: '{info.filename}' would unpack to {told}, which no picture does; leave it out")
    return place


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """What zipfile and zlib raise becomes one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: not a whole zip file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check --path") from error
