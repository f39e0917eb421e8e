"""The command ``hf-soo``: what there is (``list``), and tables and pictures of runs (``report``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_soo
from hf_soo.registry import METHODS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 after one line on stderr for bad input (argparse exits with 2).

    Args:
        arguments: the command line without the program's name; None: that of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        text = options.run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"hf-soo: error: {error}\n")
        return 1
    sys.stdout.write(text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-soo", description="Second-order optimizers for Hugging Face Transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the optimizers, each with its default base")
    listing.set_defaults(run=_list)

    report = commands.add_parser(
        "report",
        help="table and picture of a folder of run JSONs",
        description="Print the markdown table of the best run of every method in FOLDER (best learning rate by final "
        "evaluation loss); on request write it to a file, into a README, and draw the curves.",
    )
    report.add_argument("folder", metavar="FOLDER", help="the folder that holds the run JSONs")
    report.add_argument("--table", metavar="FILE.md", help="write the table to this file")
    report.add_argument("--picture", metavar="FILE.png", help="draw evaluation loss over steps and over seconds")
    report.add_argument("--title", default="", help="title of the picture")
    report.add_argument(
        "--readme",
        metavar="FILE.md",
        help="put the table between <!-- results:NAME --> and <!-- /results -->; NAME is the folder's name",
    )
    report.set_defaults(run=_report)
    return parser


def _list(options: argparse.Namespace) -> str:
    rows = [("name", "default base", "what it is")]
    for name, title in hf_soo.available().items():
        base = METHODS[name].base
        rows.append((name, "" if base == name else base, title))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "".join(f"{name:{widths[0]}}  {base:{widths[1]}}  {title}\n" for name, base, title in rows)


def _report(options: argparse.Namespace) -> str:
    from hf_soo.experiments import report
    from hf_soo.files import write_atomically

    records, text = report.report(options.folder)
    if options.table:
        write_atomically(Path(options.table), text)
    if options.readme:
        report.update_readme(options.readme, Path(options.folder).resolve().name, text)
    if options.picture and not records:
        raise ValueError(f"--picture: {options.folder} holds benchmarks, which have no curve; leave it out.")
    if options.picture:
        report.picture(records, options.picture, options.title)
    return text


if __name__ == "__main__":
    sys.exit(main())
