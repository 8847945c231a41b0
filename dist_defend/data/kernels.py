"""numba.njit with a cache that follows the content of every module whose code or constants end up in a kernel.

numba's own cache looks at the file that defines a function, not at those whose functions and constants it compiles in.
So kernels lie in a folder named after the content of all of them. It is made where numba would have put it: below
NUMBA_CACHE_DIR, else beside the source, else in the user's cache; where none can be written, in a temporary folder.
"""

import atexit
import functools
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numba

from dist_defend.files import user_cache

SOURCES = ("augment.py", "draws.py", "fused.py", "kernels.py", "pixels.py")  # beside this file
_Function = TypeVar("_Function", bound=Callable[..., Any])
_log = logging.getLogger(__name__)
_settings: Any = numba.config


def kernel(**options: Any) -> Callable[[_Function], _Function]:
    """A decorator: numba.njit(cache=True, nogil=True, ...), cached as this module says."""

    def compiled(function: _Function) -> _Function:
        before = _settings.CACHE_DIR
        _settings.CACHE_DIR = str(cache_folder())  # read once, when a function is decorated
        try:
            function = numba.njit(cache=True, nogil=True, **options)(function)
        finally:
            _settings.CACHE_DIR = before
        return function

    return compiled


@functools.cache
def cache_folder() -> Path:
    """The folder of this content's kernels; it exists and can be written."""
    own = Path(__file__)
    content = hashlib.sha256()
    for name in SOURCES:
        content.update(own.with_name(name).read_bytes() + b"\0")
    name = f"dist_defend-{content.hexdigest()[:16]}"
    for place in _places():
        if _can_write(place / name):
            return place / name
    folder = tempfile.mkdtemp(prefix="dist_defend-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _log.warning("no folder for compiled kernels can be written, so each process compiles its own; set NUMBA_CACHE_DIR")
    return Path(folder)


def _places() -> Iterator[Path]:
    if _settings.CACHE_DIR:
        yield Path(_settings.CACHE_DIR)
    yield Path(__file__).parent / "__pycache__"
    if (cache := user_cache()) is not None:
        yield cache.parent


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True
