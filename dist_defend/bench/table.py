"""Rows of ``dist-defend bench --json FILE`` as a table in Markdown: ``python -m dist_defend.bench.table FILE ...``."""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HEAD = ("row", "ratio", "ours", "baseline", "images/s", "batch", "encoder", "device")


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown; ratios with their smallest and largest in brackets, a dash for what a row does not have."""
    lines = [HEAD, ("---",) * len(HEAD), *map(_cells, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    key, unit = ("mib", "MiB") if "ours_mib" in row else ("ms", "ms")
    spread = f" ({row['min_ratio']:.2f} to {row['max_ratio']:.2f})" if "min_ratio" in row else ""
    speed = row.get("images_per_second", "-")
    speeds = speed.items() if isinstance(speed, dict) else [("", speed)]
    return (
        row["name"],
        f"{row['ratio']:.2f}{spread}",
        *(f"{row[f'{side}_{key}']:.4g} {unit}" for side in ("ours", "baseline")),
        ", ".join(f"{name} {value:.0f}".strip() if value != "-" else "-" for name, value in speeds),
        str(row["batch_size"]),
        str(row.get("encoder", "-")),
        str(row["device"]),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m dist_defend.bench.table", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    print(table(row for file in parser.parse_args().files for row in json.loads(file.read_text())), end="")
