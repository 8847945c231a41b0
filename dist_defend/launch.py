"""``dist-defend launch``: the one command in front of `accelerate launch` that picks its file and checks the ranks.

Accelerate's launcher (torchrun's agent) runs in a thread of this process, so the ranks are its own children. The main
thread passes signals on to them and waits for as long as they need to save; torchrun would kill them after 30 s.
"""

import argparse
import contextlib
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from dist_defend import lifeline
from dist_defend.arguments import add_experiment
from dist_defend.engine.sharding import STRATEGIES
from dist_defend.errors import UserError
from dist_defend.templates import template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    add_experiment(parser)
    parser.add_argument("--ranks", type=int, help="over all machines (default: one per GPU here, 1 without GPUs)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp", help="how ranks share a model (default ddp)")
    parser.add_argument("--machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="which of the machines this is")
    parser.add_argument("--main-ip", help="address of machine 0; needed with several machines")
    parser.add_argument("--port", type=int, help="where machine 0 listens (default: a free one; 29500 on several)")
    parser.add_argument("--max-restarts", type=int, default=0, help="how often to start all ranks again if one dies")
    parser.add_argument("--print", action="store_true", dest="is_shown", help="print the command and stop")
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """The exit status of the ranks; 128 + N where signal N ended one. UserError before anything is started."""
    from dist_defend.config import load_experiment

    asked = load_experiment(args.config, args.overrides).world_size
    ranks = args.ranks or asked or torch.cuda.device_count() or 1
    if asked is not None and asked != ranks:
        raise UserError(f"{args.config}: key 'world_size' is {asked}, but --ranks is {ranks}; change one of them")
    command, environment = build_command(args, ranks)
    if args.is_shown:
        settings = [f"{key}={value}" for key, value in environment.items()]
        print(shlex.join([*settings, *command]))
        return 0
    own = command[command.index("dist_defend") - 1 :]  # -m dist_defend run ...
    run = (lambda: _run_one([sys.executable, *own])) if ranks == 1 else (lambda: _run_ranks(command[3:]))
    with lifeline.environment(environment | {lifeline.STARTER: str(os.getpid())}):
        return _watch(run)


def _run_one(command: list[str]) -> int:
    """A single rank needs no rendezvous. A session of its own: the terminal's Ctrl-C comes by way of this process."""
    return subprocess.Popen(command, start_new_session=True).wait()


def _run_ranks(arguments: list[str]) -> int:
    """Accelerate's launcher with these arguments; the exit status of the rank that failed first, or 0."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It would warn that a thread gets no signals, and say of a rank that ended what the rank has said itself.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(f"launch: rank {rank} ended first, with exit status {failure.exitcode}", file=sys.stderr)
        return failure.exitcode
    return 0


def _watch(run: Callable[[], int]) -> int:
    """Call it in a thread, and pass every signal on to each process that it starts; returns the exit status."""
    ended: list[int | BaseException] = []
    received: list[int] = []
    told: dict[int, int] = {}  # child's pid -> how many of these signals it has

    def thread_main() -> None:
        try:
            ended.append(run())
        except BaseException as error:
            ended.append(error)

    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        answer = Path(folder) / "status"
        os.environ[lifeline.ANSWER] = str(answer)
        thread = threading.Thread(target=thread_main)
        with lifeline.handled(lambda number, _: received.append(number)):
            thread.start()
            while thread.is_alive():
                thread.join(0.1)
                if received:
                    told = _forward(psutil.Process().children(), received, told)
        if isinstance(ended[0], BaseException):
            raise ended[0]
        status = int(answer.read_text()) if ended[0] == 0 and answer.exists() else ended[0]
    return 128 - status if status < 0 else status


def _forward(children: list[psutil.Process], received: list[int], told: dict[int, int]) -> dict[int, int]:
    """Send each what it has not got yet -> pid -> how many it has. What is no child any more is forgotten.

    Not told apart by psutil's create_time: it follows the system's clock, and a child would get its signals again when
    that is set. Two Ctrl-C stop a run without a checkpoint.
    """
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            for number in received[told.get(child.pid, 0) :]:
                child.send_signal(number)
    return {child.pid: len(received) for child in children}


def build_command(args: argparse.Namespace, ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command and the environment variables that it needs beside the present ones."""
    if ranks < 1 or args.machines < 1 or ranks % args.machines:
        raise UserError(f"--ranks {ranks} cannot be shared equally by --machines {args.machines}")
    if not 0 <= args.machine_rank < args.machines:
        raise UserError(f"--machine-rank is {args.machine_rank}; it must be below --machines {args.machines}")
    if args.machines > 1 and not args.main_ip:
        raise UserError("--machines needs --main-ip, the address of machine 0, the same on all of them")
    devices = torch.cuda.device_count()
    if devices and ranks // args.machines > devices:
        raise UserError(f"{ranks // args.machines} ranks on this machine, but it has {devices} GPUs; lower --ranks")
    name = "single" if ranks == 1 else "multinode" if args.machines > 1 and args.strategy == "ddp" else args.strategy
    if name == "ddp" and not devices:
        name = "cpu2"
    port = args.port or (29500 if args.machines > 1 else _free_port())
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"{template('launch/accelerate')}/{name}.yaml"]
    command += ["--num_processes", str(ranks), "--num_machines", str(args.machines)]
    command += ["--machine_rank", str(args.machine_rank), "--main_process_port", str(port)]
    if args.main_ip:
        command += ["--main_process_ip", args.main_ip]
    environment = {} if devices else {"ACCELERATE_USE_CPU": "true"}
    if args.max_restarts:
        command += ["--max_restarts", str(args.max_restarts)]
        if args.machines > 1:
            command += ["--rdzv_backend", "c10d"]  # on which the machines meet again
            environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # under keys that no dead rank has used
    if name.startswith("zero"):
        command += ["--deepspeed_config_file", f"{template('launch/deepspeed')}/{name}.json"]
    command += ["-m", "dist_defend", "run", args.config, *args.overrides, f"world_size={ranks}"]
    if args.debug:
        command.append("--debug")
    if "OMP_NUM_THREADS" not in os.environ and not devices:
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) * args.machines // ranks))
    return command, environment


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
        return port
