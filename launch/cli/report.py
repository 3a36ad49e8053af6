"""``recalign report``."""

import argparse
import sys
from pathlib import Path

from launch.commands import add_command


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    report = add_command(commands, "report", _report, "run folders as one HTML page", """\
examples:
  recalign report runs/demo
  recalign report runs/closed-world runs/bench-align --out report.html
  recalign report docs/results/*.json                       # results alone, without their run folders
""")  # fmt: skip
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, or the result.json of one")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")


def _report(arguments: argparse.Namespace) -> None:
    from launch import report

    report.write(arguments.runs, arguments.out)
    sys.stdout.write(f"{arguments.out}\n")
