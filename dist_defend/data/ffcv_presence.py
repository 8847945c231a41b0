"""What must be known of FFCV before it is imported."""

import contextlib
import importlib.util
from collections.abc import Iterator

import numba
import torch


def ffcv_installed() -> bool:
    """Whether ffcv can be found; does not import it."""
    return importlib.util.find_spec("ffcv") is not None


@contextlib.contextmanager
def quiet_ffcv() -> Iterator[None]:
    """Undo what importing FFCV or making a Loader does to the process: it sets torch's and numba's thread counts.

    FFCV's field of images keeps the numbers of its two modes in a typed dict of numba's. Nothing compiled reads it,
    but numba compiles it in every process, which takes seconds: here it becomes a plain dict.
    """
    torch_threads, numba_threads = torch.get_num_threads(), numba.get_num_threads()
    typed_dict = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed_dict
        torch.set_num_threads(torch_threads)
        numba.set_num_threads(numba_threads)
