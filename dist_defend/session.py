"""Runs inside of somebody else's Python program: what they change for the whole process is put back."""

import contextlib
import copy
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed
from accelerate.state import AcceleratorState, GradientState, PartialState

from dist_defend import lifeline
from dist_defend.engine.signals import INTERRUPTED, Stopped
from dist_defend.errors import UserError
from dist_defend.terminal import forwarded

_STATES = (PartialState, AcceleratorState, GradientState)  # what Accelerate keeps for the process
_one_at_a_time = threading.Lock()


@contextlib.contextmanager
def session(device: str | torch.device | None = None) -> Iterator[None]:
    """Within, torch is as a new process has it; at the end it is as the program had it.

    That is: generators of torch, numpy and random, grad mode, autocast, default type and device, number of threads,
    environment variables, Accelerate's state, and the log. What stays is how glibc reuses freed memory. Gradients may
    be on or off around it. Several threads take turns. Ctrl-C raises KeyboardInterrupt, other signals SystemExit.
    device: what to run on; None: a GPU where there is one. UserError for one that torch does not have, and in a
    process that is one of several ranks.
    """
    with _one_at_a_time, contextlib.ExitStack() as stack:
        stack.enter_context(lifeline.environment(_environment(device)))
        stack.enter_context(_kept_generators())
        stack.enter_context(_plain_torch())
        stack.enter_context(_kept_accelerate())
        stack.enter_context(forwarded())
        if torch.device(device or "cpu").type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        try:
            yield
        except Stopped as stop:
            raise (KeyboardInterrupt(str(stop)) if stop.status == INTERRUPTED else SystemExit(stop.status)) from stop


def _environment(device: str | torch.device | None) -> dict[str, str]:
    """What Accelerate needs to be told."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ranks = max(ranks, torch.distributed.get_world_size())
    if ranks > 1:
        raise UserError(
            f"this program is one of {ranks} ranks: call dist_defend in one process, or start `dist-defend launch "
            f"CONFIG --ranks {ranks}`"
        )
    if device is None:
        return {}
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise UserError(f"device is {device!r}; give cpu, cuda or cuda:N") from None
    if wanted.type == "cpu":
        return {"ACCELERATE_USE_CPU": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
    if wanted.type != "cuda" or (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device!r}, but torch finds {torch.cuda.device_count()} GPUs: give cpu or cuda:N")
    return {"ACCELERATE_USE_CPU": "false", "ACCELERATE_TORCH_DEVICE": str(wanted)}


@contextlib.contextmanager
def _kept_generators() -> Iterator[None]:
    plain, numpys = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpys)


@contextlib.contextmanager
def _plain_torch() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


@contextlib.contextmanager
def _kept_accelerate() -> Iterator[None]:
    """Its classes share one dictionary each among their instances, of which the program may have some."""
    before = [copy.copy(state._shared_state) for state in _STATES]
    for state in _STATES:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, content in zip(_STATES, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)
