"""``dist-defend launch``: the one command in front of `accelerate launch` that picks its file and checks the ranks."""

import argparse
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import torch

from dist_defend.engine.sharding import STRATEGIES
from dist_defend.errors import UserError

FILES = Path(__file__).parents[1] / "launch"


def add_arguments(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``launch`` to the command line."""
    parser = subparsers.add_parser("launch", help="run one experiment file on several ranks or machines")
    parser.add_argument("config", help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="change single keys")
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
    """The exit status of the ranks. UserError before anything is started."""
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
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


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
    if not (FILES / "accelerate").is_dir():
        raise UserError(f"{FILES} is not here: install from a checkout (pip install -e .) to use the launcher")
    name = "single" if ranks == 1 else "multinode" if args.machines > 1 and args.strategy == "ddp" else args.strategy
    if name == "ddp" and not devices:
        name = "cpu2"
    port = args.port or (29500 if args.machines > 1 else _free_port())
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"{FILES}/accelerate/{name}.yaml"]
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
        command += ["--deepspeed_config_file", f"{FILES}/deepspeed/{name}.json"]
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
