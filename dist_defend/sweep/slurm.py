"""Points to Slurm's job arrays, and back from its queue to their states.

Nothing but sbatch, squeue, sacct, scancel and scontrol is spoken to. A submission is one array; its file, in the
sweep's folder ``submissions``, maps array indices to points. A stage that comes after another follows it index by index
(aftercorr), so a point has the index of the first stage's point that it descends from, and each column of a later
stage is an array of its own.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError
from dist_defend.files import write_atomic
from dist_defend.strict_json import build, read_json
from dist_defend.sweep import sbatch, several
from dist_defend.sweep.grid import Point, Sweep, first_stage

GUARD = Path(__file__).with_name("guard.py")
# srun starts every rank itself, so that each gets Slurm's signals; this gives it what torch.distributed asks for. Where
# Slurm shows each task only its own GPUs (gpus-per-task), a rank's GPU is counted among those that it sees.
RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; "
    'if [ -n "$CUDA_VISIBLE_DEVICES" ]; then seen=(${CUDA_VISIBLE_DEVICES//,/ }); '
    'LOCAL_RANK=$((LOCAL_RANK % ${#seen[@]})); fi; exec "$@"'
)
# A file in the working folder that is called like a module (random.py) is not to be imported instead of it.
_SAFE = "export PYTHONSAFEPATH=1"
_USUAL_ARRAY = 1001  # Slurm's default for MaxArraySize
# Slurm's names of jobs that are not over; one in the queue that was preempted or lost its node is about to be requeued.
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "CONFIGURING"}
RUNNING = {
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "PREEMPTED",
    "NODE_FAIL",
}


@dataclass(frozen=True)
class Task:
    """The array task that a point was last submitted as, and what Slurm still knows of it."""

    job: str
    index: int
    state: str | None  # Slurm's word, or None where it has forgotten the job
    is_queued: bool  # squeue has it, perhaps as ended
    shared_since: float | None = None  # when it was submitted (time.time), if it has several points

    @property
    def is_active(self) -> bool:
        return self.is_queued and self.state in WAITING | RUNNING


@dataclass(frozen=True)
class Block:
    """An array: points of one stage, of roots that fit into one array, all waiting for the same one.

    column: of the points, or the first one's where an array task runs the points of several.
    """

    stage: str
    column: tuple[int, ...]
    chunk: int
    after: "str | Block | None"  # a job's number, or a block of this submission
    points: dict[int, list[Point]] = field(default_factory=dict, compare=False)  # by index


def last_tasks(sweep: Sweep) -> dict[str, Task]:
    """Point key -> its newest array task."""
    placed: dict[str, tuple[str, int]] = {}
    shared: dict[str, float | None] = {}
    for file in _submission_files(sweep):
        submission = _read_submission(file)
        if submission.job is None:
            continue
        for index, keys in submission.points.items():
            together = [keys] if isinstance(keys, str) else keys
            placed |= dict.fromkeys(together, (submission.job, int(index)))
            shared |= dict.fromkeys(together, None if isinstance(keys, str) else file.stat().st_mtime)
    is_done = {point.key for point in sweep.points if sweep.is_done(point)}  # a result needs nobody's word
    known = _states({job for key, (job, _) in placed.items() if key not in is_done})
    tasks = {}
    for key, place in placed.items():
        state, is_queued = known.get(place, (None, False))
        tasks[key] = Task(*place, state, is_queued, shared[key])
    return tasks


def blocks(sweep: Sweep, chosen: Sequence[Point], tasks: Mapping[str, Task], max_array: int) -> list[Block]:
    """The arrays that run the chosen points, parents first. Highest index: max_array - 1.

    A point that waits for its parent has that one's index. With points_per_job a task has neighbouring roots of the
    first stage, and of later stages the points that descend from these, of as many columns as the number allows.
    """
    found: dict[Block, Block] = {}
    place: dict[str, tuple[Block, int]] = {}
    columns = {name: sorted({point.column for point in sweep.stage(name)}) for name in sweep.config.stages}
    for point in chosen:
        roots = sweep.config.stages[first_stage(sweep.config, point.stage)].points_per_job
        width = sweep.config.stages[point.stage].points_per_job // roots
        chunk, index = divmod(point.root // roots, max_array)
        after: str | Block | None = None
        if point.parent is not None and not sweep.is_done(point.parent):
            if point.parent.key in place:
                after, index = place[point.parent.key]
            else:
                after, index = tasks[point.parent.key].job, tasks[point.parent.key].index
        own = columns[point.stage]
        column = own[own.index(point.column) // width * width]
        block = Block(point.stage, column, chunk, after)
        block = found.setdefault(block, block)
        block.points.setdefault(index, []).append(point)
        place[point.key] = block, index
    return list(found)


def check_options(sweep: Sweep) -> None:
    """UserError for what sbatch would not take, before anything is written."""
    for section in (sweep.config.slurm, *(stage.slurm for stage in sweep.config.stages.values())):
        sbatch.options(sweep.path, section)


def submit(sweep: Sweep, chosen: Sequence[Point], tasks: Mapping[str, Task], with_collect: bool) -> list[str]:
    """Submit the arrays and, after all of them, a job that collects; returns a line for each.

    throttle holds for each stage: as many arrays at a time as it takes, each with its share, the others one after
    another.
    """
    (sweep.folder / "submissions").mkdir(parents=True, exist_ok=True)
    (sweep.folder / "logs").mkdir(exist_ok=True)
    jobs: dict[Block, str] = {}
    lines: list[str] = []
    everything: list[str] = []
    max_array = _max_array_size()
    if max_array is None:
        max_array = _USUAL_ARRAY
        lines.append(f"scontrol does not show MaxArraySize: taken to be {_USUAL_ARRAY}, Slurm's default")
    arrays = blocks(sweep, chosen, tasks, max_array)
    for stage in sweep.config.stages:
        own = [block for block in arrays if block.stage == stage]
        throttle = sweep.config.throttle
        lanes = max(1, throttle // max(len(block.points) for block in own)) if own and throttle else len(own)
        submitted: list[str] = []
        for number, block in enumerate(own):
            before = jobs[block.after] if isinstance(block.after, Block) else block.after
            waits = [f"aftercorr:{before}"] if before else []
            if number >= lanes:
                waits.append(f"afterany:{submitted[number - lanes]}")
            jobs[block] = _submit_array(sweep, block, waits, throttle and throttle // lanes)
            submitted.append(jobs[block])
            told = f"{sum(map(len, block.points.values()))} points of stage {stage}"
            if sweep.config.stages[stage].points_per_job > 1:
                told += f" in {len(block.points)} jobs"
            lines.append(f"job {', '.join([jobs[block], *waits])}: {told}")
        everything += submitted
    if with_collect and everything:
        job = _submit_collect(sweep, everything)
        lines.append(f"job {job}: collect and report, when all of them are over")
    return lines


def cancel(sweep: Sweep) -> list[str]:
    """Cancel what is left of the sweep in Slurm's queue; returns the jobs."""
    jobs = {_read_submission(file).job for file in _submission_files(sweep)}
    known = _states(job for job in jobs if job)
    active = sorted(
        {job for (job, _), (state, is_queued) in known.items() if is_queued and state in WAITING | RUNNING}, key=int
    )
    if active:
        _call("scancel", *active)
    return active


def _submit_array(sweep: Sweep, block: Block, waits: list[str], throttle: int | None) -> str:
    options = [f"--array={ranges(block.points)}{f'%{throttle}' if throttle else ''}"]
    if waits:
        options += [f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"]
    everything = [point for points in block.points.values() for point in points]
    ranks = max(point.experiment.world_size or 1 for point in everything)
    is_shared = len(everything) > len(block.points) or sweep.config.stages[block.stage].points_per_job > 1
    if is_shared and ranks > 1:
        raise UserError(
            f"{sweep.path}: points of {ranks} ranks wait for a job that runs several: submit when it is over"
        )
    run = [sys.executable, "-m", "dist_defend", "run", f"{sweep.folder}/points/{{key}}.yaml"]
    command = ["srun", f"--ntasks={ranks}", "--kill-on-bad-exit=1"]
    if is_shared:
        command += several.command(sweep.folder, "{tried}", ["{keys}"])
    else:
        command += ["bash", "-c", RANK, "rank", *run] if ranks > 1 else run
    if ranks > 1:
        options.append(f"--ntasks={ranks}")
    keys = {index: [point.key for point in block.points[index]] for index in sorted(block.points)}
    points = {str(index): own if is_shared else own[0] for index, own in keys.items()}
    record = {"job": None, "stage": block.stage, "points": points, "command": command}
    guard = [sys.executable, str(GUARD), f"--restarts={sweep.config.restarts}"]
    stage = sweep.config.stages[block.stage]
    words = sbatch.options(sweep.path, _over(sweep.config.slurm, stage.slurm))
    return _sbatch(sweep, block.stage, record, [*guard, "--points", "{file}"], [*words, *options], stage.setup)


def _submit_collect(sweep: Sweep, jobs: list[str]) -> str:
    """Failed arrays do not keep it from running."""
    record: dict[str, Any] = {"job": None, "stage": "collect", "points": {}}
    scale = [] if sweep.scale is None else [f"--scale={sweep.scale}"]
    program = [sys.executable, "-m", "dist_defend", "sweep", "report", str(sweep.path), *scale]
    options = [f"--dependency=afterany:{':'.join(jobs)}", "--ntasks=1"]
    return _sbatch(sweep, "collect", record, program, [*sbatch.options(sweep.path, sweep.config.slurm), *options], ())


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both sections; a stage's cpus_per_task replaces the sweep's cpus-per-task."""
    return {str(key).replace("_", "-"): value for section in (below, above) for key, value in section.items()}


def ranges(indices: Iterable[int]) -> str:
    """As sbatch reads them: 0-3,5."""
    parts = []
    for _, group in itertools.groupby(enumerate(sorted(indices)), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(parts)


def _sbatch(
    sweep: Sweep, stage: str, record: dict[str, Any], command: list[str], options: list[str], setup: Sequence[str]
) -> str:
    """Write the submission down, submit it, note the job's number."""
    file = _new_submission(sweep)
    write_atomic(file, json.dumps(record, indent=1))
    words = [part.replace("{file}", str(file.absolute())) for part in command]
    script = file.with_suffix(".sbatch")
    lines = [*sweep.config.setup, *setup]
    shell = "#!/bin/bash -l" if lines else "#!/bin/bash"  # a login shell knows `module` and `conda`
    script.write_text("\n".join([shell, *lines, _SAFE, f"exec {shlex.join(words)}", ""]), encoding="utf-8")
    logs = f"{(sweep.folder / 'logs').absolute()}/{'collect_%j' if stage == 'collect' else '%A_%a'}.log"
    own = ["--parsable", "--requeue", "--open-mode=append", "--signal=B:USR1@120"]
    own += [f"--output={logs}", f"--job-name={sweep.path.stem}-{stage}"]
    try:
        printed = _call("sbatch", *own, *options, str(script))
    except UserError:
        file.unlink()
        raise
    job = sbatch.job_number(printed)  # or else the file stays, for whatever has been submitted
    write_atomic(file, json.dumps(record | {"job": job}, indent=1))
    return job


@dataclass(frozen=True)
class _Submission:
    """A file in ``submissions``. job: its number, or None until Slurm has told it."""

    job: str | None
    stage: str
    points: dict[str, str | list[str]]  # array index -> key, or keys of those that one task runs
    command: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not all(number.isdigit() for number in (self.job or "0", *self.points)):
            raise ValueError("job and indices are numbers")


def _read_submission(file: Path) -> _Submission:
    remedy = "see with squeue what runs, delete the file, and resubmit"
    return build(_Submission, read_json(file, remedy), file, remedy)


def _submission_files(sweep: Sweep) -> list[Path]:
    return sorted(file for file in (sweep.folder / "submissions").glob("*.json") if file.stat().st_size)


def _new_submission(sweep: Sweep) -> Path:
    """An empty file with the next number, also when two commands submit at once."""
    number = len(_submission_files(sweep))
    while True:
        file = sweep.folder / "submissions" / f"{number:04d}.json"
        try:
            file.touch(exist_ok=False)
            return file
        except FileExistsError:
            number += 1


def _max_array_size() -> int | None:
    """None where the site does not tell it."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _try("scontrol", "show", "config") or "", re.MULTILINE)
    return int(found[1]) if found else None


def _states(jobs: Iterable[str]) -> dict[tuple[str, int], tuple[str, bool]]:
    """(job, index) -> state, and whether squeue, which knows better, told it or sacct, where there is one."""
    wanted = sorted(set(jobs), key=int)
    if not wanted:
        return {}
    found: dict[tuple[str, int], tuple[str, bool]] = {}
    accounting = _try("sacct", "-n", "-P", "-X", "-j", ",".join(wanted), "-o", "JobID,State") or ""
    for line in accounting.splitlines():
        name, _, state = line.partition("|")
        job, _, index = name.partition("_")
        if index.isdigit() and state:  # those that wait are told together, as 8_[3-7]
            found[job, int(index)] = state.split()[0], False  # "CANCELLED by 1000"
    fields = "ArrayJobID:20,ArrayTaskID:20,State:20"
    own = f"--user={os.getuid()}"  # --me is not known before Slurm 20.02
    queue = _call("squeue", "-h", "-r", own, "--states=all", "-O", fields) if shutil.which("squeue") else ""
    for line in queue.splitlines():
        job, index, state, *_ = [*line.split(), "", "", ""]
        if job in wanted and state:  # a login banner is no job
            found[job, int(index) if index.isdigit() else -1] = state, True  # -1: not an array, the job that collects
    return found


def _try(*command: str) -> str | None:
    try:
        return _call(*command)
    except UserError:
        return None


def _call(*command: str) -> str:
    """Output of a Slurm command. UserError with its own words when it fails or does not exist."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=120,
            env=sbatch.environment(),
        )
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not on this machine; run where Slurm is, or with --local") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]} does not answer; see whether Slurm's controller is up (scontrol ping)"
        ) from error
    if done.returncode:
        raise UserError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
    return done.stdout
