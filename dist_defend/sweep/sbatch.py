"""What sbatch is told, and what it answers: options from YAML, a clean environment, the job's number."""

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_defend.errors import UserError

RESERVED = ("array", "dependency", "kill-on-invalid-dep", "output", "error", "open-mode", "parsable", "wrap", "chdir")
# sbatch(1), Slurm 22.05 to 25.05. A site's plugins add others, which its `sbatch --help` lists.
_KNOWN = (
    "account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint "
    "consolidate-segments container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu "
    "cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export export-file external "
    "extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres "
    "gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem "
    "mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks "
    "ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit "
    "oversubscribe parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation "
    "resv-ports segment signal sockets-per-node spread-job stepmgr switches thread-spec threads-per-core time "
    "time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait-all-nodes wckey wrap"
)
_NAMES = frozenset(_KNOWN.split())
_SHORT = {"A": "account", "C": "constraint", "G": "gpus", "J": "job-name", "N": "nodes", "c": "cpus-per-task",
          "n": "ntasks", "p": "partition", "q": "qos", "t": "time", "w": "nodelist", "x": "exclude"}  # fmt: skip
# A job that submits hands its own size down: sbatch would take SLURM_NTASKS for an option, a point RANK for its own.
_OUTER = re.compile(r"(SLURM|SRUN|PMI|PMIX|TORCHELASTIC|GROUP|ROLE)_.*|(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS")  # how to reach Slurm


def options(path: Path, section: Mapping[str, Any]) -> list[str]:
    """sbatch's options of a ``slurm`` section, each as one word.

    _ in a name is -; lists are joined by commas; true is the bare option; false and null leave it out. UserError for an
    option that sbatch does not know, one that the sweep sets itself, and a value that is no such thing.
    """
    words = []
    for key, value in section.items():
        name = str(key).replace("_", "-")
        if name in RESERVED:
            raise UserError(f"{path}: key 'slurm.{key}' is the sweep's own; leave it out")
        if name not in _NAMES and not _is_a_plugins(name):
            near = _SHORT.get(name) or next(iter(difflib.get_close_matches(name, _NAMES, n=1)), None)
            hint = f"did you mean '{near}'?" if near else "the keys are sbatch's long options, see sbatch --help"
            raise UserError(f"{path}: key 'slurm.{key}' is no option of sbatch; {hint}")
        items = value if isinstance(value, list | tuple) else [value]
        if value is None or value is False or value == []:
            continue
        if not all(isinstance(item, str | int | float) and str(item).isprintable() for item in items) or (
            isinstance(value, list | tuple) and any(isinstance(item, bool) for item in items)
        ):
            raise UserError(
                f"{path}: key 'slurm.{key}' is {value!r}; expected one line of text, a number, a list or true"
            )
        words.append(f"--{name}" if value is True else f"--{name}={','.join(map(str, items))}")
    return words


def _is_a_plugins(name: str) -> bool:
    """Whether this cluster's sbatch lists the option; False where there is no sbatch to ask."""
    if not shutil.which("sbatch"):
        return False
    try:
        told = subprocess.run(["sbatch", "--help"], capture_output=True, text=True, check=False, timeout=60).stdout
    except subprocess.TimeoutExpired:
        return False
    return re.search(rf"--{re.escape(name)}(?![\w-])", told) is not None


def environment() -> dict[str, str]:
    """This process's environment without what a job or a launcher around it has set."""
    return {key: value for key, value in os.environ.items() if key in _KEPT or not _OUTER.fullmatch(key)}


def job_number(printed: str) -> str:
    """The number in what `sbatch --parsable` printed, whatever a login banner or a plugin printed around it."""
    found = re.findall(r"^[ \t]*(?:Submitted batch job )?([1-9][0-9]*)(?:;[^\s;]+)?[ \t]*$", printed, re.MULTILINE)
    if not found:
        told = " ".join(printed.split())[:200]
        raise UserError(
            f"sbatch succeeded but printed no job number ({told!r}): look with squeue for what it has submitted, "
            "cancel that with scancel, and see what prints instead of sbatch"
        )
    number: str = found[-1]
    return number
