"""Makes the mistakes, and tells which of them no test noticed.

    python -m tests.mutations             # all, some minutes
    python -m tests.mutations --list      # as a table
    python -m tests.mutations --only 3 7  # some, by number

No part of `make test`; tests/repo holds that every mutation still fits the code and names a test that is there.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation, mutated

ROOT = Path(__file__).parents[2]
PARTS = ("dist_defend", "tests", "configs", "docs", "examples", "launch", "slurm", "pyproject.toml")
SECONDS = 600  # that a test may take


def outcome(tree: Path, mutation: Mutation) -> str:
    """Make the mistake in a copy of the tree, run its test, take the mistake back: "noticed" or what else came."""
    file = tree / "dist_defend" / mutation.file
    plain = file.read_text(encoding="utf-8")
    file.write_text(mutated(plain, mutation), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
    own = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return f"no end in {SECONDS} s"
    finally:
        file.write_text(plain, encoding="utf-8")
    if done.returncode == 0:
        return "SURVIVED"
    has_failed = any(line.startswith("FAILED") for line in done.stdout.splitlines())  # not just could not start
    return "noticed" if has_failed else f"pytest ended with {done.returncode}: {done.stdout[-500:]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the table and run nothing")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the mutations to make, counted from 0")
    options = parser.parse_args()
    numbers = options.only or range(len(MUTATIONS))
    if options.list:
        print("| | wrong | file | test |\n|---|---|---|---|")
        for number in numbers:
            wrong, file, _, _, test = MUTATIONS[number]
            print(f"| {number} | {wrong} | {file} | {test} |")
        return 0
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            source, copy = ROOT / part, Path(folder) / part
            shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        for number in numbers:
            found = outcome(Path(folder), MUTATIONS[number])
            survived += found != "noticed"
            print(f"{number} {MUTATIONS[number].wrong}: {found}", flush=True)
    print(f"{survived} not noticed of {len(numbers)}")
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
