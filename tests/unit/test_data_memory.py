"""What a container or a batch job leaves of the memory."""

from pathlib import Path

import psutil
import pytest

from dist_defend.data.memory import free_memory

MIB = 1 << 20
V2, V1 = (
    ("memory.max", "memory.current", "inactive_file"),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8,000 MiB free."""
    free = type("Memory", (), {"available": 8000 * MIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)


def group(folder: Path, files: tuple[str, str, str], limit: str, used: int, caches: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*files[:2], "memory.stat"), (limit, str(used), f"anon 1\n{files[2]} {caches}"), strict=True):
        (folder / name).write_text(f"{text}\n")


def left(tmp_path: Path, lines: str) -> float:
    memberships = tmp_path / "memberships"
    memberships.write_text(lines)
    return free_memory(tmp_path / "groups", memberships) / MIB


def test_a_group_and_those_above_it_limit(tmp_path: Path) -> None:
    group(tmp_path / "groups", V2, "max", 5 * MIB, 0)
    group(tmp_path / "groups/job", V2, str(1000 * MIB), 700 * MIB, 100 * MIB)
    group(tmp_path / "groups/job/step", V2, str(900 * MIB), 200 * MIB, 0)
    group(tmp_path / "groups/other", V2, "1", 1, 0)
    assert left(tmp_path, "0::/job/step\n") == 400  # 1000 - 700 and 100 of caches: less than the step's 700
    assert left(tmp_path, "0::/\n") == 8000


def test_version_1_has_a_folder_for_memory(tmp_path: Path) -> None:
    group(tmp_path / "groups/memory", V1, str(1 << 62), 9 * MIB, 0)
    group(tmp_path / "groups/memory/job", V1, str(500 * MIB), 600 * MIB, 150 * MIB)
    assert left(tmp_path, "5:cpu,memory:/job\n4:pids:/job\n0::/\n") == 50
    assert left(tmp_path, "4:pids:/job\n0::/\n") == 8000


def test_what_says_nothing_does_not_limit(tmp_path: Path) -> None:
    assert left(tmp_path, "0::/job\n") == 8000
    assert free_memory(tmp_path, tmp_path / "none") == 8000 * MIB
    group(tmp_path / "groups/job", V2, "nonsense", 0, 0)
    assert left(tmp_path, "0::/job\n") == 8000
    group(tmp_path / "groups/job", V2, "100", 200, 0)
    assert left(tmp_path, "0::/job\n") == 0
