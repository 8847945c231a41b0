"""Start the processes' common ground: device, ranks, precision, threads, trackers."""

import atexit
import ctypes
import gc
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dist_defend.engine.graphed import end_graphs
from dist_defend.engine.sharding import Sharding, launched_sharding, unwrapped
from dist_defend.errors import UserError

_groups: list[torch.distributed.ProcessGroup] = []  # see keep_group
_MIXED = {"fp64": "no", "fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all."""

    accelerator: Accelerator
    dtype: torch.dtype  # of parameters and of batches
    sharding: Sharding = field(default_factory=Sharding)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device


def start(precision: str, world_size: int | None, trackers: tuple[str, ...] = (), folder: Path | None = None) -> Ranks:
    """Create the Accelerator and check that the world is the one asked for.

    Without a CUDA device Accelerate ignores the launcher's ranks unless ACCELERATE_USE_CPU is set, and each process
    would train alone without a word; it is set here, and the world size is compared with the launcher's and the
    configuration's. Raises UserError when they differ, or for fp16 on a CPU, or for an unusable tracker.
    """
    _check_launcher()
    if not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
        if precision == "fp16":
            raise UserError("key 'precision' is fp16, which needs a GPU; use bf16 or fp32 on a CPU")
    usable = [str(tracker) for tracker in get_available_trackers()]
    for tracker in trackers:
        if tracker not in usable:
            raise UserError(f"key 'trainer.trackers' names {tracker!r}; usable here: {', '.join(usable)}")
    os.environ.setdefault("WANDB_MODE", "offline")
    AcceleratorState._reset_state()  # a second run in the same process may use another precision
    sharding = launched_sharding(precision)
    _meet_apart_from_the_dead()
    with unwrapped():
        accelerator = Accelerator(
            mixed_precision=_MIXED[precision],
            log_with=list(trackers) or None,
            project_dir=None if folder is None else str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    keep_group()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} ranks but Accelerate sees {accelerator.num_processes}; "
            "on CPUs use `accelerate launch --multi_gpu --num_processes N` with ACCELERATE_USE_CPU=true, or torchrun"
        )
    if world_size is not None and accelerator.num_processes != world_size:
        raise UserError(
            f"key 'world_size' asks for {world_size} ranks but {accelerator.num_processes} started; launch with "
            f"`accelerate launch --multi_gpu --num_processes {world_size}` (CPUs: ACCELERATE_USE_CPU=true) or torchrun"
        )
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    if accelerator.num_processes == 1:
        sharding = Sharding()  # nothing to share
    return Ranks(accelerator, torch.float64 if precision == "fp64" else torch.float32, sharding)


# A scheduler's or MPI's own words for: so many processes were started, and this is the n-th.
_STARTED = (
    ("srun", "SLURM_NTASKS", "SLURM_PROCID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK"),
)


def _check_launcher() -> None:
    """UserError for several tasks that know nothing of each other: each would run the whole experiment alone."""
    if "RANK" in os.environ:
        return
    for starter, size, number in _STARTED:
        told = os.environ.get("SLURM_STEP_NUM_TASKS" if starter == "srun" else size, os.environ.get(size, "1"))
        if number in os.environ and told.isdigit() and int(told) > 1:
            raise UserError(
                f"{starter} has started {told} tasks ({size}), but no launcher gave them ranks (RANK): for {told} "
                f"ranks say `srun --ntasks=1 dist-defend launch CONFIG --ranks {told}`, or let srun start the ranks as "
                "slurm/multi_node.sbatch does; for one rank say `srun --ntasks=1 dist-defend run CONFIG`"
            )


def _meet_apart_from_the_dead() -> None:
    """After a restart by torchrun on one machine, meet under new keys.

    Its store outlives the ranks (torch 2.13), and one that is quick would find the address that a dead one left there.
    Several machines may count restarts differently; `dist-defend launch` has torchrun make a new store there.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("GROUP_WORLD_SIZE", "1") != "1" or torch.distributed.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, world_size = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore(f"restart_{restarts}", store),
        rank=rank,
        world_size=world_size,
    )


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks; it gives them back at once, and each step of a CNN pays for zeroed pages again."""
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold, trim_threshold, size = -3, -1, 1 << 30  # mallopt(3); bytes
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, size)
        libc.mallopt(trim_threshold, size)


def keep_group() -> None:
    """Keep the process group that there is until the process ends, or has another one.

    Otherwise DDP's reducer may be the last to let go of it (torch 2.13). It then waits, under Python's lock, for gloo's
    threads; one of these may need that lock to free a tensor, and the rank hangs after its work is done.
    """
    group = torch.distributed.group.WORLD
    if group is not None and group not in _groups:
        _let_go()
        _groups.append(group)


@atexit.register
def _let_go() -> None:
    if _groups:
        gc.collect()  # reducers go first
        _groups.clear()


def stop() -> None:
    """Leave the process group, if there is one, so that no rank hangs or warns at exit."""
    if torch.distributed.is_initialized():
        end_graphs()
        torch.distributed.destroy_process_group()
