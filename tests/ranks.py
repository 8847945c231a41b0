"""Two ranks on this machine, started once for the whole test session, that run functions for tests.

They meet over gloo and see no GPU, or over NCCL with a GPU each.

Pool.run(function, *arguments) calls function(*arguments) on both ranks inside one process group and returns the two
results in rank order. The function must be importable (a test module's top level), arguments and results picklable.
"""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
GRACE_SECONDS = 5.0  # for the other rank, once one has failed


class RankError(RuntimeError):
    """A rank raised, died or ran out of time; the message holds its traceback."""


def _serve(rank: int, world_size: int, rendezvous: str, pipe: Connection, on_gpus: bool) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    if not on_gpus:
        os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
        warnings.simplefilter("error")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if on_gpus:
        torch.cuda.set_device(rank)
    backend, device = ("nccl", torch.device("cuda", rank)) if on_gpus else ("gloo", None)
    meeting = f"file://{rendezvous}"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world_size, device_id=device)
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
            reply = ("result", function(*arguments))
        except EOFError:
            return
        except BaseException:
            reply = ("error", traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))


class Pool:
    """Ranks that wait for work. A failure ends them, and the next run starts fresh ones."""

    def __init__(self, world_size: int = 2, on_gpus: bool = False) -> None:
        self.world_size, self.on_gpus = world_size, on_gpus
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60.0) -> list[Any]:
        """function(*arguments) on each rank -> their results in rank order. RankError if one fails or is too slow."""
        if not self._processes:
            self._start()
        task = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        return self._collect(timeout)

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        rendezvous = Path(tempfile.mkdtemp(prefix="ranks-")) / "store"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, str(rendezvous), theirs, self.on_gpus)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_SECONDS)

    def _collect(self, timeout: float) -> list[Any]:
        replies: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(replies) < self.world_size:
            pending = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in replies}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    replies[pending[pipe]] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionError):
                    replies[pending[pipe]] = ("error", "the process died")
            if any(kind == "error" for kind, _ in replies.values()):
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        errors = [f"rank {rank}: {text}" for rank, (kind, text) in sorted(replies.items()) if kind == "error"]
        errors += [f"rank {rank}: no answer in time" for rank in range(self.world_size) if rank not in replies]
        if errors:
            self.close()
            raise RankError("\n".join(errors))
        return [replies[rank][1] for rank in range(self.world_size)]
