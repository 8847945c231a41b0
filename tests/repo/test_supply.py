"""What gets installed: ranges against known advisories, and versions and digests of everything."""

import json
import re
import runpy
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
EXTRAS = ("ffcv", "clip", "complete", "deepspeed", "docs", "hub", "sweep", "test")  # what launch/bootstrap installs
CUDA = re.compile(r"nvidia-.*|cuda-.*" + ("|triton" if torch.version.cuda else ""))  # which torch brings


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    """setup.py's requirements, with those of the extras."""
    said: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    extras = said["extras_require"]
    assert isinstance(extras, dict) and isinstance(said["install_requires"], list)
    return [Requirement(text) for text in [*said["install_requires"], *(t for e in EXTRAS for t in extras[e])]]


def advisories() -> list[tuple[str, str, str]]:
    rows = re.findall(
        r"^\| ([\w-]+) \| (\d[\w.]*) \| (\d[\w.]*) \| ((?:CVE|PYSEC|GHSA)-.+) \|$", text("SECURITY.md"), re.M
    )
    return [row[:3] for row in rows]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_ranges_exclude_versions_with_known_advisories(declared: list[Requirement]) -> None:
    listed = advisories()
    assert len(listed) == sum("CVE-" in line or "PYSEC-" in line for line in text("SECURITY.md").splitlines())
    for name, last, first in listed:
        assert Version(last) < Version(first)
        ranges = [r.specifier for r in declared if canonicalize_name(r.name) == name]
        assert ranges, f"setup.py does not name {name}"
        assert not any(r.contains(last) for r in ranges), f"setup.py allows {name} {last}"
        assert any(r.contains(metadata.version(name)) for r in ranges) if name != "setuptools" else True


def installed(declared: list[Requirement]) -> dict[str, str]:
    """Name -> version of every distribution that the project brings into this environment."""
    waiting = [(r, {""} | r.extras) for r in declared]
    found: dict[str, str] = {}
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that could not be built here
        if name not in found and not CUDA.fullmatch(name):
            found[name] = distribution.version
            for text in distribution.requires or ():
                inner = Requirement(text)
                if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                    waiting.append((Requirement(text.partition(";")[0]), {""} | inner.extras))
    return found


def constraints(name: str) -> list[Requirement]:
    lines = [line for line in text(f"launch/{name}").splitlines() if line and not line.startswith(("#", "-c"))]
    return [Requirement(line) for line in lines]


def test_constraints_name_everything_that_is_installed(declared: list[Requirement]) -> None:
    pinned: dict[str, SpecifierSet] = {
        canonicalize_name(r.name): r.specifier
        for r in [*constraints("constraints.txt"), *constraints("constraints-cpu.txt")]
        if r.marker is None or r.marker.evaluate()
    }
    present = installed(declared)
    assert len(present) > 80
    assert sorted(present.keys() - pinned.keys()) == []
    other = {name: version for name, version in present.items() if not pinned[name].contains(version)}
    assert not other, "not the versions of launch/constraints*.txt"
    assert all([s.operator for s in specifier] == ["=="] for specifier in pinned.values())


def locked() -> list[tuple[Requirement, list[str]]]:
    """Each requirement of the file with its digests."""
    joined = re.sub(r"\s*\\\n\s*", " ", text("launch/hashes-cpu.txt"))
    parts = [re.split(r"\s+--hash=sha256:", line) for line in joined.splitlines() if not line.startswith("#")]
    return [(Requirement(head), digests) for head, *digests in parts]


def test_digests_are_well_formed_and_of_the_constraints_versions(declared: list[Requirement]) -> None:
    lines = locked()
    assert all(digests and all(re.fullmatch("[0-9a-f]{64}", d) for d in digests) for _, digests in lines)
    assert all(len(set(digests)) == len(digests) for _, digests in lines)
    everything = [digest for _, digests in lines for digest in digests]
    assert len(set(everything)) == len(everything), "two packages have one digest"
    for python in ("3.10", "3.11", "3.12", "3.13"):
        at = {"python_version": python, "python_full_version": f"{python}.0"}
        own = [r for r, _ in lines if r.marker is None or r.marker.evaluate(at)]
        names = [canonicalize_name(r.name) for r in own]
        assert len(set(names)) == len(names), f"a package twice for Python {python}"
        pins = {r.name: r.specifier for r in own}
        for constraint in [*constraints("constraints.txt"), *constraints("constraints-cpu.txt")]:
            name = canonicalize_name(constraint.name)
            if name in pins and (constraint.marker is None or constraint.marker.evaluate(at)):
                assert pins[name] == constraint.specifier, f"{name} for Python {python}"
    here = {canonicalize_name(r.name) for r, _ in lines if r.marker is None or r.marker.evaluate()}
    assert sorted(installed(declared).keys() - here) == []


def test_the_tool_that_makes_the_digests() -> None:
    def report(python: str, *items: tuple[str, str, str]) -> dict[str, object]:
        install = [
            {"metadata": {"name": n, "version": v}, "download_info": {"archive_info": {"hashes": {"sha256": h}}}}
            for n, v, h in items
        ]
        return {"environment": {"python_version": python}, "install": install}

    lock = runpy.run_path(str(ROOT / "launch" / "lock.py"))["lock"]
    made = lock(
        [
            report("3.10", ("A_b", "1", "aa"), ("c", "2", "cc"), ("nvidia-x", "1", "dd")),
            report("3.11", ("A.b", "1", "bb"), ("c", "3+cpu", "ee"), ("dist-defend", "1", "ff")),
        ]
    )
    assert [line for line in made.splitlines() if not line.startswith("#")] == [
        "a-b==1 \\", "    --hash=sha256:aa \\", "    --hash=sha256:bb",
        'c==2 ; python_version == "3.10" \\', "    --hash=sha256:cc",
        'c==3 ; python_version == "3.11" \\', "    --hash=sha256:ee",
    ]  # fmt: skip
    assert json.dumps(made)
