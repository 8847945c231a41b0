"""How much memory this process may still take: the machine's, or what its container or batch job leaves."""

from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
# Below _GROUPS, of versions 2 and 1: the controller's folder, its files of the limit and of what is used.
_FILES = (("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"))


def free_memory(groups: Path = _GROUPS, memberships: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes. A control group (cgroup) may leave less than the machine has; file caches count as free."""
    free = psutil.virtual_memory().available
    try:
        lines = memberships.read_text().splitlines()
    except OSError:
        return free  # no Linux
    for controller, limit, usage in _FILES:
        for line in lines:
            _, names, place = line.split(":", 2)
            if controller in names.split(","):
                own = groups / controller / place.strip("/")
                for group in (own, *own.parents):  # each limits those below it
                    if group.is_relative_to(groups / controller):
                        free = min(free, _left(group / limit, group / usage, free))
    return free


def _left(limit: Path, usage: Path, unlimited: int) -> int:
    """What a group leaves; ``unlimited`` where it says nothing."""
    try:
        text = limit.read_text().strip()
        if text == "max":
            return unlimited
        pairs = [line.split() for line in (limit.parent / "memory.stat").read_text().splitlines()]
        stat = {name: int(value) for name, value in pairs}
        caches = stat.get("total_inactive_file", stat.get("inactive_file", 0))
        return max(0, int(text) - int(usage.read_text()) + caches)
    except (OSError, ValueError):
        return unlimited
