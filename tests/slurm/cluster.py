"""A real Slurm that lives in one folder: munged, slurmctld and some slurmd, started and ended by a test session.

Nothing below /etc, /var or /run is touched, but for names in /run/netns. As root each node is a host of its own, with
network, host name and address, inside namespaces that nothing else on the machine sees. Any other user, and root in a
container that may not make namespaces, gets all nodes on 127.0.0.1, told apart by port.
By hand, a command and all the jobs that it submits: python -m tests.slurm.cluster dist-defend sweep submit SWEEP.yaml
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY"}
CLIENTS = ("sinfo", "squeue", "sbatch", "srun", "scancel", "scontrol", "sacct")
SUBNET = "10.213.77"
START_SECONDS = 60.0
_SEARCH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"  # jobs find this interpreter first

# A node that is silent for 10 s is down; a requeued job waits as long as a credential lives (two minutes elsewhere);
# ended jobs stay in squeue for a day; nothing is isolated by cgroups; nodes have more CPUs than the
# machine; no two clusters have a job number in common.
CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SlurmdTimeout=10
ReturnToService=2
KillWait=5
CompleteWait=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MaxArraySize=33
MinJobAge=86400
FirstJobId={first_job}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Of those that a cluster needs."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]


class Cluster:
    """Nodes n1, n2, ... of 64 CPUs and 8 GPUs, which are links to /dev/null: Slurm hands them out, nothing is there."""

    def __init__(self, nodes: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 108 characters
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.has_hosts = os.geteuid() == 0 and shutil.which("ip", path=_SEARCH) is not None and _may_unshare()
        self.tag = self.folder.name.removeprefix("slurm-")
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "SBATCH_TIMELIMIT": "10"}  # minutes
        self.environment |= {"PYTHONFAULTHANDLER": "1"}  # ABRT tells where a process stands
        self.environment |= {"SLURM_CONF": f"{self.folder}/etc/slurm.conf", "PATH": _SEARCH}

    def start(self) -> None:
        """Return when all nodes wait for work. RuntimeError with the logs if they do not come up."""
        for name in ("etc", "log", "run", "state", "spool", "dev", "bin", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        self._configure()
        key, munge = self.folder / "etc" / "munge.key", self.folder / "run" / "munge.sock"
        key.write_bytes(random.randbytes(128))
        key.chmod(0o400)
        options = {"socket": munge, "key-file": key, "pid-file": self.folder / "run" / "munged.pid"}
        options |= {"log-file": self.folder / "log" / "munged.log", "seed-file": self.folder / "state" / "munge.seed"}
        self._spawn("munged", "munged", "--foreground", *(f"--{name}={value}" for name, value in options.items()))
        self._await(munge.exists)
        if self.has_hosts:
            self._make_network()
        self._spawn("ctl", *self._on("ctl"), "slurmctld", "-D", "-c")
        if self.has_hosts:
            self._make_clients()
        for node in self.nodes:
            self.revive(node)
        self._await(lambda: len(self._idle()) == len(self.nodes))

    def run(self, *command: str, cwd: Path | None = None, timeout: float = 60.0, check: bool = True) -> str:
        """Its output. RuntimeError with the error output when it fails."""
        options = {"env": self.environment, "cwd": cwd or self.folder, "timeout": timeout}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return str(done.stdout)

    def states(self, job: str) -> dict[str, tuple[str, int, int]]:
        """Array index ("N/A" for a job that is no array) -> state, exit status, restarts."""
        fields = "ArrayTaskID:12,State:24,exit_code:12,restartcnt:8"
        lines = self.run("squeue", "-h", "-r", "--states=all", "-j", job, "-O", fields).splitlines()
        rows = [line.split() for line in lines]
        return {index: (state, int(status) >> 8, int(restarts)) for index, state, status, restarts in rows}

    def wait(self, job: str, timeout: float = 240.0) -> dict[str, tuple[str, int, int]]:
        """The states once nothing of the job waits or runs. TimeoutError with the queue and the end of its log."""
        deadline = time.monotonic() + timeout
        while True:
            states = self.states(job)
            if {state for state, _, _ in states.values()} <= ENDED:  # and none of those in between, as SIGNALING
                return states
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job}: {states}\n{self.run('squeue', '-l')}\n{self._end_of_log(job)}")
            time.sleep(0.2)

    def _end_of_log(self, job: str) -> str:
        """The last of what a job printed that hangs, and where its steps' processes are."""
        self.run("scancel", "--signal=ABRT", job, check=False)
        time.sleep(5)
        shown = self.run("squeue", "-h", "--states=all", "-j", job, "-O", "STDOUT:4000", check=False)
        log = Path(shown.partition("\n")[0].strip())
        return log.read_text()[-20000:] if log.is_file() else f"no log: {shown}"

    def clear(self) -> None:
        """Cancel whatever is left of the queue, and wait until it is gone."""
        self.run("scancel", "--quiet", "--me")
        self._await(lambda: not self.run("squeue", "-h", "--me").strip())

    def crash(self, node: str) -> None:
        """What a power failure does: the node's daemon, job steps and jobs are gone at once."""
        for process in [psutil.Process(self.processes[node].pid), *self._steps(f"slurmd.{node}.log")]:
            _kill(process)
        self.processes.pop(node).wait()

    def revive(self, node: str) -> None:
        """Start the node's daemon; the controller takes it back by itself."""
        self._spawn(node, *self._on(node), "slurmd", "-D", "-N", node)

    def stop(self) -> None:
        """End whatever this cluster started, and remove its folder."""
        for process in [
            *(psutil.Process(p.pid) for p in self.processes.values() if p.poll() is None),
            *self._steps(""),
        ]:
            _kill(process)
        for process_ in self.processes.values():
            process_.wait()
        if self.has_hosts:
            for host in ("ctl", *self.nodes):
                subprocess.run(["ip", "netns", "del", self._namespace(host)], capture_output=True, check=False)
        shutil.rmtree(self.folder)

    def _configure(self) -> None:
        host = "ctl" if self.has_hosts else socket.gethostname().split(".")[0]
        port = 6817 if self.has_hosts else _free_ports(len(self.nodes) + 2)
        address = f"{SUBNET}.1" if self.has_hosts else "127.0.0.1"
        names = {"name": f"t{self.tag}", "folder": self.folder, "user": psutil.Process().username()}
        text = CONFIGURATION.format(
            **names,
            controller=f"{host}({address})",
            port=port,
            node_port=port + 1,
            first_job=int(time.time()) // 10 % 60_000_000,
        )
        gpus, hosts = ["AutoDetect=off"], ["127.0.0.1 localhost", f"{address} {host}"]
        for number, node in enumerate(self.nodes):
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + number}"
            if self.has_hosts:
                place = f"NodeAddr={SUBNET}.{11 + number}"
                hosts.append(f"{SUBNET}.{11 + number} {node}")
            text += f"NodeName={node} {place} CPUs=64 RealMemory=64000 Gres=gpu:8\n"
            gpus.append(f"NodeName={node} Name=gpu File={self.folder}/dev/{node}-gpu[0-7]")
            for gpu in range(8):
                (self.folder / "dev" / f"{node}-gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "etc" / "slurm.conf").write_text(text)
        (self.folder / "etc" / "gres.conf").write_text("\n".join(gpus) + "\n")
        (self.folder / "etc" / "hosts").write_text("\n".join(hosts) + "\n")

    def _make_network(self) -> None:
        """One namespace per host; the controller's holds the bridge that joins them."""
        commands = [f"netns add {self._namespace(host)}" for host in ("ctl", *self.nodes)]
        control = f"-n {self._namespace('ctl')}"
        commands += [f"{control} link set lo up", f"{control} link add br0 type bridge"]
        commands += [f"{control} addr add {SUBNET}.1/24 dev br0", f"{control} link set br0 up"]
        for number, node in enumerate(self.nodes):
            own = f"-n {self._namespace(node)}"
            peer = f"type veth peer name eth0 netns {self._namespace(node)}"
            commands += [f"{control} link add to{node} {peer}", f"{control} link set to{node} master br0 up"]
            commands += [f"{own} addr add {SUBNET}.{11 + number}/24 dev eth0", f"{own} link set eth0 up"]
            commands += [f"{own} link set lo up"]
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True, timeout=20)

    def _make_clients(self) -> None:
        """squeue and the like, which enter the controller's host; within a job the node's own host will do."""
        enter = f"nsenter --target {self.processes['ctl'].pid} --net --uts --mount"
        for name in CLIENTS:
            client = self.folder / "bin" / name
            real = shutil.which(name, path=_SEARCH)
            client.write_text(
                f'#!/bin/sh\n[ -n "$SLURM_JOB_ID" ] && exec {real} "$@"\nexec {enter} --wd="$PWD" {real} "$@"\n'
            )
            client.chmod(0o755)
        self.environment["PATH"] = f"{self.folder}/bin:{_SEARCH}"

    def _namespace(self, host: str) -> str:
        return f"dd-{self.tag}-{host}"

    def _on(self, host: str) -> list[str]:
        """The head of a command that makes it run on that host."""
        if not self.has_hosts:
            return []
        setup = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self._namespace(host)}", "unshare", "--uts", "--mount"]
        return [*enter, "--propagation=private", "sh", "-c", setup, "sh", host, f"{self.folder}/etc/hosts"]

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "env": self.environment}
            self.processes[name] = subprocess.Popen(command, start_new_session=True, **options)  # type: ignore[call-overload]

    def _idle(self) -> set[str]:
        return set(self.run("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N", check=False).split())

    def _await(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_so():
            dead = [name for name, process in self.processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = {file.name: file.read_text()[-800:] for file in (self.folder / "log").iterdir()}
                raise RuntimeError(f"the cluster does not start; ended: {dead}; logs: {logs}")
            time.sleep(0.1)

    def _steps(self, log: str) -> list[psutil.Process]:
        """Job steps of the nodes whose log's name ends so, and all their processes; Slurm detaches them from slurmd."""
        daemons, theirs = [], []
        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "slurmstepd":
                    files = [file.path for file in process.open_files()]
                    if any(file.startswith(f"{self.folder}/log/slurmd.") and file.endswith(log) for file in files):
                        daemons.append(process)
                        theirs += process.children(recursive=True)
            except psutil.Error:
                continue
        return [*daemons, *theirs]  # to kill in this order: no daemon is left to report how the others ended


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _may_unshare() -> bool:
    return (
        subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False).returncode
        == 0
    )


def _free_ports(count: int) -> int:
    """The first of so many neighbouring ports that nobody uses."""
    while True:
        first = random.randrange(20000, 32000)
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + number))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()


def main(command: list[str]) -> int:
    """Run a command in a new cluster and wait until its queue is empty; without one, say whether there could be one."""
    if missing := missing_programs():
        remedy = "with root: apt-get install slurmctld slurmd slurm-client munge iproute2"
        print(
            f"\n!!!!!! SLURM CANNOT BE STARTED HERE: tests/slurm is left out ({', '.join(missing)} missing; {remedy})\n"
        )
        return 1
    if not command:
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end that still stops the cluster
    cluster = Cluster()
    try:
        cluster.start()
        status = subprocess.run(command, env=cluster.environment, check=False).returncode
        while cluster.run("squeue", "-h", "--me").strip():
            time.sleep(2)
        return status
    finally:
        cluster.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
