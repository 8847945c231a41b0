"""Digests of what pip would install, from its reports: python launch/lock.py REPORT... >launch/hashes-cpu.txt

A report is what `pip install --dry-run --ignore-installed --report FILE -c launch/constraints-cpu.txt torch torchvision
".[ffcv,clip,complete,deepspeed,docs,hub,sweep,test]"` writes, with each version of Python. CUDA's libraries are left
out.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

HEAD = """\
# Versions and SHA-256 digests for `pip install --require-hashes`: Linux, x86-64, Python 3.11 and 3.12, CPU.
# SECURITY.md says what they hold for. Made by launch/lock.py.
"""
LEFT_OUT = re.compile(r"nvidia-.*|cuda-.*|dist-defend")


def lock(reports: list[dict[str, Any]]) -> str:
    """The file's text. A version that not every Python gets has a marker; all reports' digests of a version add up."""
    pythons = [report["environment"]["python_version"] for report in reports]
    found: dict[tuple[str, str], tuple[set[str], set[str]]] = {}
    for python, report in zip(pythons, reports, strict=True):
        for item in report["install"]:
            name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
            version = item["metadata"]["version"].partition("+")[0]
            if not LEFT_OUT.fullmatch(name):
                digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
                own = found.setdefault((name, version), (set(), set()))
                own[0].add(python)
                own[1].add(digest)
    lines = [HEAD.rstrip()]
    for (name, version), (where, digests) in sorted(found.items()):
        marker = "" if len(where) == len(pythons) else f" ; {_marker(where)}"
        lines.append(f"{name}=={version}{marker} \\")
        lines += [f"    --hash=sha256:{digest} \\" for digest in sorted(digests)]
        lines[-1] = lines[-1].removesuffix(" \\")
    return "\n".join(lines) + "\n"


def _marker(pythons: set[str]) -> str:
    return " or ".join(f'python_version == "{python}"' for python in sorted(pythons))


if __name__ == "__main__":
    print(lock([json.loads(Path(file).read_text(encoding="utf-8")) for file in sys.argv[1:]]), end="")
