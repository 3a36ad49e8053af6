"""``recalign bench``: speed comparisons that anyone can run."""

import argparse
import shlex
import sys
from pathlib import Path

from launch.commands import add_command


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    bench = add_command(commands, "bench", _bench, "compare speed with peers, side by side", """\
examples:
  python -m launch.bench.peers --setup                 # once: RecBole, RecTools, RePlay, each in its environment
  recalign bench rec --data data/beauty --data data/ml-1m
  recalign bench rec --data data/beauty --peers replay --stages epoch --seconds 60 --max-length 50
""")  # fmt: skip
    bench.add_argument("name", choices=("rec",), help="what to compare")
    bench.add_argument("--data", type=Path, action="append", required=True, help="prepared folder; may be repeated")
    bench.add_argument("--peers", default="recbole,rectools,replay", help="separated by commas (default: all)")
    bench.add_argument("--stages", help="separated by commas (default: all but quality)")
    bench.add_argument("--max-length", default="50,200", help="lengths of history (default: 50,200)")
    bench.add_argument("--seconds", type=float, default=30, help="to time each system (default: 30)")
    bench.add_argument("--out", type=Path, default=Path("runs/bench-rec"), help="folder of the measurements")


def _bench(arguments: argparse.Namespace) -> None:
    from launch import tables
    from launch.bench import rec, rec_tasks
    from rec.runtime.errors import UserError

    stages = arguments.stages.split(",") if arguments.stages else rec_tasks.STAGES
    known = (*rec_tasks.STAGES, *rec_tasks.ON_REQUEST)
    if unknown := [stage for stage in stages if stage not in known]:
        raise UserError(f"unknown stage {unknown[0]!r}; there are: {', '.join(known)}")
    if not all(length.isdigit() and int(length) for length in arguments.max_length.split(",")):
        raise UserError(f"--max-length {arguments.max_length!r}: expected numbers above 0 separated by commas")
    if arguments.seconds <= 0:
        raise UserError(f"--seconds {arguments.seconds:g}: expected a number above 0")
    settings = rec_tasks.Settings(
        arguments.data,
        [int(length) for length in arguments.max_length.split(",")],
        arguments.peers.split(",") if arguments.peers else [],
        arguments.seconds,
        stages,
    )
    result = rec.run(settings, arguments.out, shlex.join(["recalign", *sys.argv[1:]]))
    tables.print_bench(result)
