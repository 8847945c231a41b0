"""``dist-defend doctor``: what works on this machine, found by trying it, and how to mend the rest."""

import argparse
import ctypes.util
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import get_args

import psutil
import torch
import torch.distributed

from dist_defend import plugins
from dist_defend.errors import UserError

_LIMIT = 120  # seconds that any one trial may take
_FFCV_REMEDY = "apt-get install pkg-config g++ libopencv-dev libturbojpeg0-dev python3-dev, then make setup"
_THREADS_PROBE = """
import numba
@numba.njit(parallel=True)
def fill(a):
    for i in numba.prange(a.size):
        a[i] = i
import numpy
fill(numpy.empty(8))
print(numba.threading_layer())
"""


@dataclass(frozen=True)
class Finding:
    """One line of the table. status: ok, missing (not here), broken (here, but does not work)."""

    name: str
    status: str
    detail: str
    remedy: str = ""
    is_essential: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("--json", action="store_true", help="print a list of findings as JSON")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """0, or 1 when torch or the package itself cannot be used."""
    findings = examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        print(render(findings))
    return int(any(finding.is_essential and finding.status != "ok" for finding in findings))


def examine() -> list[Finding]:
    """Try everything; the trials run side by side, none longer than its limit."""
    accelerate = partial(_importable, "accelerate", "accelerate", "make setup")
    ffcv = partial(_importable, "ffcv", "ffcv", _FFCV_REMEDY)
    open_clip = partial(_importable, "open_clip_torch", "open_clip", "pip install -e '.[clip]'")
    trials: list[Callable[[], Finding]] = [
        _python, _torch, _core, _plug_ins, _cuda, _nccl, _gloo_ranks, accelerate, ffcv, _turbojpeg, _numba,
        _deepspeed, open_clip, _slurm, _cores, _memory, _disk,
    ]  # fmt: skip
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [future.result() for future in [pool.submit(trial) for trial in trials]]


def render(findings: list[Finding]) -> str:
    """The table: name, status, detail; a remedy on the line below."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        status = "OK" if finding.status == "ok" else finding.status
        lines.append(f"{finding.name:<{width}}  {status:<7}  {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':<{width}}           -> {finding.remedy}")
    return "\n".join(lines)


def _python() -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("python", "broken", detail, "PYTHON=/path/to/python3.11 make setup; 3.10 to 3.13 are supported")
    return Finding("python", "ok", detail)


def _torch() -> Finding:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    try:
        weight = torch.ones(2, 2, requires_grad=True)
        (weight @ weight).sum().backward()
    except RuntimeError as error:
        return Finding("torch", "broken", _last_line(str(error)), "rm -r .venv && make setup", is_essential=True)
    return Finding("torch", "ok", f"{torch.__version__}, {build}", is_essential=True)


def _core() -> Finding:
    try:
        methods = importlib.import_module("dist_defend.methods")
        names = [name for name, source in methods.method_sources().items() if source == plugins.BUILT_IN]
        for name in names:
            methods.find_method(name)
        importlib.import_module("dist_defend.experiment")
    except Exception as error:  # whatever it is, the doctor reports it
        detail = f"{type(error).__name__}: {_last_line(str(error))}"
        return Finding("dist_defend", "broken", detail, "make setup (it repairs .venv)", is_essential=True)
    return Finding("dist_defend", "ok", f"methods {', '.join(names)}", is_essential=True)


def _plug_ins() -> Finding:
    found = [
        claim for kind in get_args(plugins.Kind) for name in plugins.names(kind) for claim in plugins.claims(kind, name)
    ]
    for claim in found:
        try:
            claim.load()
        except UserError as error:
            return Finding("plug-ins", "broken", _last_line(str(error)), "repair or uninstall that package")
    told = ", ".join(f"{claim.entry.name} ({claim.kind}, {claim.source})" for claim in found)
    return Finding("plug-ins", "ok" if found else "missing", told or "no installed package adds anything")


def _cuda() -> Finding:
    if not torch.cuda.is_available():
        has_driver = bool(shutil.which("nvidia-smi"))
        remedy = "this torch does not fit the driver; reinstall a build that does" if has_driver else ""
        return Finding("cuda", "broken" if has_driver else "missing", "no usable GPU; runs use the CPU", remedy)
    try:
        for index in range(torch.cuda.device_count()):
            torch.ones(1, device=f"cuda:{index}").item()
    except RuntimeError as error:
        return Finding(
            "cuda", "broken", _last_line(str(error)), "see nvidia-smi: busy, lost, or too new for this torch"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding("cuda", "ok", f"{len(names)} device(s): {', '.join(sorted(set(names)))}")


def _nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("nccl", "missing", "this torch has none; ranks on CPUs use gloo")
    if not torch.cuda.is_available():
        return Finding("nccl", "missing", "needs a GPU; ranks on CPUs use gloo")
    count = torch.cuda.device_count()
    error = start_ranks("nccl", count, _LIMIT)
    if error:
        return Finding("nccl", "broken", error, "run with NCCL_DEBUG=INFO to see which link fails")
    return Finding("nccl", "ok", f"{count} rank(s) did an all-reduce")


def _gloo_ranks() -> Finding:
    error = start_ranks("gloo", 2, _LIMIT)
    if error:
        return Finding("ranks", "broken", error, "name the interface that other ranks can reach: GLOO_SOCKET_IFNAME=lo")
    return Finding("ranks", "ok", "2 gloo ranks started and did an all-reduce")


def start_ranks(backend: str, world_size: int, limit: float) -> str:
    """Start processes that all-reduce their rank number plus one; an empty string, or what went wrong."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [(rank, world_size, backend, folder) for rank in range(world_size)]
        processes = [spawn.Process(target=_rank, args=a, daemon=True) for a in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit)
        is_late = any(process.is_alive() for process in processes)
        for process in processes:
            process.kill()
            process.join()
        sums = [Path(folder) / f"sum{rank}" for rank in range(world_size)]
        got = [float(path.read_text()) for path in sums if path.exists()]
    if is_late:
        return f"{world_size} {backend} ranks did not finish within {limit:.0f} s"
    wanted = [world_size * (world_size + 1) / 2] * world_size
    return "" if got == wanted else f"{world_size} {backend} ranks summed {got}, expected {wanted}"


def _rank(rank: int, world_size: int, backend: str, folder: str) -> None:
    torch.distributed.init_process_group(backend, f"file://{folder}/store", rank=rank, world_size=world_size)
    value = torch.tensor([rank + 1.0], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(value)
    (Path(folder) / f"sum{rank}").write_text(str(value.item()))
    torch.distributed.destroy_process_group()


def _importable(name: str, module: str, remedy: str) -> Finding:
    """Import in a process of its own: what kills or hangs that process leaves this one alone."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", remedy)
    status, said = _python_says(f"import {module}")
    return Finding(name, "ok", version) if status else Finding(name, "broken", f"{version}: {said}", remedy)


def _turbojpeg() -> Finding:
    library = ctypes.util.find_library("turbojpeg")
    if library is None:
        return Finding("turbojpeg", "missing", "FFCV decodes JPEG with it", "apt-get install libturbojpeg0-dev")
    return Finding("turbojpeg", "ok", library)


def _numba() -> Finding:
    is_done, said = _python_says(_THREADS_PROBE)
    if not is_done:
        return Finding("numba", "broken", said, "make setup (it repairs .venv)", is_essential=True)
    detail = f"{metadata.version('numba')}, threads by {said}"
    remedy = "two loaders at once can abort with workqueue: pip install tbb" if said == "workqueue" else ""
    return Finding("numba", "ok", detail, remedy, is_essential=True)


def _deepspeed() -> Finding:
    try:
        version = metadata.version("deepspeed")
        metadata.version("transformers")
    except metadata.PackageNotFoundError as error:
        return Finding("deepspeed", "missing", f"{error.name} is not installed", "pip install -e '.[deepspeed]'")
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    locks = sorted(cache.rglob("lock"))
    if locks:
        return Finding(
            "deepspeed", "broken", f"{version}: {locks[0]} makes every later build wait for it",
            f"if nothing is compiling now: rm -r {locks[0].parent}",
        )  # fmt: skip
    if not torch.cuda.is_available() and not any(cache.rglob("deepspeed_shm_comm.so")):
        remedy = "the first run on CPUs compiles it for minutes; do so now: DIST_DEFEND_PREBUILD=1 make setup"
        return Finding("deepspeed", "ok", f"{version}, its CPU communication operation is not built", remedy)
    return Finding("deepspeed", "ok", version)


def _slurm() -> Finding:
    if not (shutil.which("sbatch") and shutil.which("sinfo")):
        return Finding("slurm", "missing", "no sbatch and sinfo on PATH; sweeps run on this machine")
    is_done, said = _says(["sinfo", "--noheader", "--format=%P %D"], 20)
    if not is_done:
        return Finding("slurm", "broken", said, "the controller does not answer; ask the cluster's administrators")
    return Finding("slurm", "ok", f"partitions (nodes): {said}")


def _cores() -> Finding:
    usable = len(os.sched_getaffinity(0))
    return Finding("cores", "ok", f"{usable} usable by this process of {os.cpu_count()} in the machine")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}")


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    return Finding("disk", "ok", f"{usage.free / 2**30:.1f} GiB free of {usage.total / 2**30:.1f} in {Path.cwd()}")


def _python_says(code: str) -> tuple[bool, str]:
    return _says([sys.executable, "-c", code], _LIMIT)


def _says(command: list[str], limit: float) -> tuple[bool, str]:
    """Whether the command succeeded in time, and what it printed on one line: all of stdout, or the end of stderr."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {limit:.0f} s"
    return done.returncode == 0, _last_line(done.stderr) if done.returncode else ", ".join(done.stdout.split("\n")[:-1])


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
