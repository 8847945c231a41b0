"""Runs one command inside a Slurm job and puts the job back into the queue when it was cut short.

Usage: python guard.py [--restarts N] COMMAND...      the command, usually srun ...
       python guard.py [--restarts N] --points FILE   the points that this array task stands for, see slurm.py

Slurm is to send USR1 to the batch script some time before the limit (--signal=B:USR1@120); the script is to ``exec``
this program. It then asks the job's steps to save (TERM), waits for them and requeues the job; so it does after a
preemption, which Slurm announces to the steps itself. A job that was restarted more than N times fails instead.
Where a task has several points and one of them kills the process, the command is started again for those behind it.

Only the standard library, and run by its path: importing the package would load PyTorch for nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SAVED = 75  # dist_defend.cli.PREEMPTED
REQUEUE_SECONDS = 120.0  # within which Slurm ends a job that it has requeued


def job() -> str:
    """This job's name for scontrol: an array task's own, since its number may be the whole array's."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return os.environ["SLURM_JOB_ID"] if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"


def main(argv: list[str]) -> int:
    """The command's exit status; 75 when it was cut short for the last time."""
    parser = argparse.ArgumentParser(prog="guard.py", description=__doc__.split("\n")[0])
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--points", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts > args.restarts:
        return tell(f"restarted {restarts} times already, {args.restarts} are allowed", SAVED)
    tried = args.points and args.points.with_name(f"{args.points.stem}_{os.environ['SLURM_ARRAY_TASK_ID']}.tried")
    if tried:
        tried.unlink(missing_ok=True)  # an earlier life's: what has no result is tried again
    command = point_command(args.points, tried) if args.points else args.command
    environment = os.environ | ranks_meet()
    if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
        environment["SRUN_CPUS_PER_TASK"] = cores  # since Slurm 22.05 srun does not take sbatch's
        environment.setdefault("OMP_NUM_THREADS", cores)
    told: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        told.append(number)
        if number == signal.SIGUSR1:
            tell("the time limit is near: asking the job's steps to save")
            subprocess.run(["scancel", "--signal=TERM", job()], check=False)

    signal.signal(signal.SIGUSR1, on_signal)
    signal.signal(signal.SIGTERM, on_signal)  # a cancelled job's steps get it too; their end is ours
    while True:
        begun = size_of(tried)
        status = subprocess.Popen(command, env=environment).wait()
        if status == 0:
            return 0
        is_running, is_preempted = job_state()
        is_crash = status < 0 or status > 128  # as srun tells of a signal
        if not (is_crash and is_running and size_of(tried) > begun) or told or is_preempted:
            break
        tell(f"a point ended the process with exit {status}: going on with the next")
    if is_running and (status == SAVED or signal.SIGUSR1 in told or is_preempted):
        if restarts >= args.restarts:
            return tell(f"cut short, and restarted {restarts} times already: not requeued", SAVED)
        tell(f"cut short with exit {status}: requeued")
        if subprocess.run(["scontrol", "requeue", job()], check=False).returncode == 0:
            time.sleep(REQUEUE_SECONDS)  # an end of our own would take the place of the requeue
    return tell(f"exit {status}", status if status > 0 else 128 - status)


def point_command(file: Path, tried: Path) -> list[str]:
    """From a submission's file: the command of the point, or of the points, with this task's index."""
    submission = json.loads(file.read_text(encoding="utf-8"))
    points = submission["points"][os.environ["SLURM_ARRAY_TASK_ID"]]
    keys = [points] if isinstance(points, str) else points
    tell(f"point {' '.join(keys)}, host {os.environ.get('SLURMD_NODENAME')}, {time.strftime('%F %T')}")
    words = [part.replace("{key}", keys[0]).replace("{tried}", str(tried)) for part in submission["command"]]
    return [word for part in words for word in (keys if part == "{keys}" else [part])]


def size_of(tried: Path | None) -> int:
    """Of the list of points that this life of the job has begun; it grows by one with each."""
    return tried.stat().st_size if tried is not None and tried.exists() else 0


def ranks_meet() -> dict[str, str]:
    """Where ranks meet: the job's first host and a port that no other job of this one's neighbours takes."""
    port = 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000
    if os.environ.get("SLURM_NNODES", "1") == "1":
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    first = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"MASTER_ADDR": os.environ.get("MASTER_ADDR", first), "MASTER_PORT": str(port)}


def job_state() -> tuple[bool, bool]:
    """Whether the job still runs, as one that was cancelled does not, and whether it is being preempted."""
    shown = subprocess.run(["scontrol", "show", "job", "-o", job()], capture_output=True, text=True, check=False).stdout
    fields = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    return fields.get("JobState") == "RUNNING", fields.get("PreemptTime", "None") != "None"


def tell(line: str, status: int = 0) -> int:
    """Print a line to the job's log; returns the status."""
    print(f"guard: {line}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
