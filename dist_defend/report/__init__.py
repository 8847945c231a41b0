"""``dist-defend report``: finished runs to a table in the terminal, report.md, report.csv and one report.html."""

import argparse
import os
import sys
from pathlib import Path

from dist_defend.aligned import width_of
from dist_defend.errors import UserError
from dist_defend.files import write_atomic

FILES = "report_files"  # the folder of figures and tables beside report.html


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Fill the command's parser."""
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="run folders, or folders that hold some")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the folder that holds all RUNS)")
    parser.add_argument(
        "--embedding", choices=["pca", "tsne"], default="pca", help="projection of the features (default: pca)"
    )
    parser.add_argument(
        "--files", action="store_true", help="also every figure as SVG and PDF, every table as CSV and LaTeX"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Write the files and print the summary; 1 if a damaged run folder was left out, and told.

    UserError without a finished run that can be read, or without a folder to write to.
    """
    from dist_defend.report import detectors, html, runs, tables

    found, unfinished, damaged = runs.find_runs(args.runs)
    folder = Path(args.out or os.path.commonpath([Path(path).resolve() for path in args.runs]))
    lines = tables.summarise(found)
    alarms, notices = tables.alarms(lines), tables.notices(found, unfinished, damaged, lines)
    page = html.render(found, lines, alarms, notices, args.embedding)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "report.csv", tables.to_csv(found))
        write_atomic(folder / "report.md", tables.to_markdown(lines, [*alarms, *notices], found))
        write_atomic(folder / "report.html", page.text)
        if args.files:
            from dist_defend.report import exports

            count = exports.write(folder / FILES, page.panels, page.pictures, page.sheets)
            print(f"{count} files of figures and tables: {folder / FILES}\n")
    except OSError as error:
        told = f"{folder}: cannot write the report ({error.strerror})"
        raise UserError(f"{told}; choose another folder with --out") from error
    width = width_of(sys.stdout)
    if lines:
        print(tables.to_text(lines, width))
    if detected := detectors.cells(found):
        print(f"\n{detectors.to_text(detected, width)}")
    for text in [*alarms, *notices]:
        print(f"\nnote: {text}")
    print(f"\nreport: {folder / 'report.html'}")
    return 1 if damaged else 0
