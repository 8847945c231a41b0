"""The table of docs/benchmarks/gpu.md: estimates, and beside them the rows of `dist-defend bench graphs --json FILE`.

python -m tests.gpu.table FILE           prints the table with these rows
python -m tests.gpu.table FILE --keep    puts them into docs/benchmarks/gpu.json and the table into the page
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
ROWS, PAGE = FOLDER / "gpu.json", FOLDER / "gpu.md"
BEGIN, END = "<!-- table: python -m tests.gpu.table -->\n", "<!-- end of table -->\n"
BANDWIDTH, MATRIX, LAUNCH = 3.35e12, 495e12, 1.5e-6  # an H100's data sheet: bytes/s, TF32 FLOP/s; a kernel in a graph


class Estimate(NamedTuple):
    """Of an update, from counts of 2026-11-29: operators, FLOP, bytes; wanted: milliseconds."""

    what: str
    wanted: float
    operators: int = 0
    flop: float = 0.0
    bytes: float = 0.0

    @property
    def milliseconds(self) -> str:
        """All bytes once over the bus, and every operator's launch; and what the products alone would take."""
        if not self.operators:
            return "not estimated"
        whole = self.bytes / BANDWIDTH + self.operators * LAUNCH
        return f"{1e3 * whole:.2f} ({1e3 * self.flop / MATRIX:.2f})"


ESTIMATES = {
    "graphs-ibau-inner": Estimate("I-BAU, VGG, B = 100: inner step", 0.3, 82, 23.2e9, 0.73e9),
    "graphs-ibau-outer": Estimate("I-BAU, VGG, B = 100: outer step", 1.5, 345, 131.4e9, 4.69e9),
    "graphs-rnp-unlearn": Estimate("RNP, ResNet-18, B = 128: unlearning step", 3.0, 121, 426.1e9, 4.80e9),
    "graphs-rnp-recover": Estimate("RNP, ResNet-18, B = 128: recovering step", 3.0, 122, 283.9e9, 4.46e9),
    "graphs-rnp-defence": Estimate("RNP, ResNet-18, 500 images: whole defence", 5000.0),
}
HEAD = ["row", "estimate, H100 (products alone)", "wanted", "graph, ms", "eager, ms", "ratio", "of matrix peak",
        "of copy peak", "measured on"]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the peaks below; a dash for what has not been measured."""
    found = {row["name"]: row for row in rows}
    lines = [HEAD, ["---"] * len(HEAD)]
    for name, estimate in ESTIMATES.items():
        lines.append([estimate.what, estimate.milliseconds, f"<= {estimate.wanted:g}", *_measured(found.get(name))])
    peaks = next((row for row in rows if "peak_flop" in row), None)
    told = ""
    if peaks is not None:
        told = f"\nPeaks: {peaks['peak_flop'] / 1e12:.0f} TFLOP/s, {peaks['peak_bytes'] / 1e12:.2f} TB/s.\n"
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + told


def _measured(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["-"] * 6
    shares = [f"{row[key]:.0%}" if key in row else "-" for key in ("matrix_share", "copy_share")]
    times = [f"{row[key]:.2f}" for key in ("ours_ms", "baseline_ms", "ratio")]
    return [*times, *shares, f"{row['device']}, batch {row['batch_size']}"]


def filled(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with this table in the place of its own."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + table(rows) + END + after


def main(arguments: list[str] | None = None) -> None:
    """As the module's docstring has it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args(arguments)
    rows = json.loads(given.file.read_text())
    print(table(rows))
    if given.keep:
        ROWS.write_text(json.dumps(rows, indent=1) + "\n")
        PAGE.write_text(filled(PAGE.read_text(), rows))


if __name__ == "__main__":
    main()
