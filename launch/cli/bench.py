"""``recalign bench``: speed comparisons that anyone can run."""

import argparse
import shlex
import sys
from importlib import resources
from pathlib import Path

from launch.commands import add_command
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    names = commands.add_parser("bench", help="speed, side by side in one run").add_subparsers(
        required=True, metavar="NAME"
    )
    align = add_command(names, "align", _align, "alignment: synchronous, asynchronous, and each job alone", """\
examples:
  recalign bench align                                 # the closed world: about 8 minutes on 2 cores
  recalign bench align my.yaml --steps 200 align.trainer.batch_size=64
""")  # fmt: skip
    align.add_argument("recipe", type=Path, nargs="?", help="of a main job (default: the closed world)")
    align.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    align.add_argument("--steps", type=int, default=100, help="trainer steps of every measurement (default: 100)")
    align.add_argument("--out", type=Path, default=Path("runs/bench-align"), help="folder of the measurements")

    latency = add_command(names, "latency", _latency, "one request of a finished main job, and one item's text", """\
examples:
  recalign bench latency runs/demo
""")  # fmt: skip
    latency.add_argument("run", type=Path, metavar="RUN", help="run folder of a finished main job")
    latency.add_argument("--requests", type=int, default=200, help="timed, of each kind (default: 200)")
    latency.add_argument("--out", type=Path, help="folder of the result (default: RUN/latency)")

    lmrec = add_command(names, "lmrec", _lmrec, "LMRec's training step beside transformers' Trainer", """\
examples:
  recalign bench lmrec                                 # 20M preset, bf16, context 512: 2 to 10 minutes on 2 cores
  recalign bench lmrec my.yaml --steps 20 --only packed,padded llm.lmrec.context=1024
""")  # fmt: skip
    lmrec.add_argument("recipe", type=Path, nargs="?", help="of a pretraining (default: the benchmark's own)")
    lmrec.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    lmrec.add_argument("--steps", type=int, default=10, help="timed, of each trainer (default: 10)")
    lmrec.add_argument("--only", help="measurements, separated by commas (default: all)")
    lmrec.add_argument("--out", type=Path, default=Path("runs/bench-lmrec"), help="folder of the measurements")

    recformer = add_command(names, "recformer", _recformer, "stage-PT beside the authors' four padded passes", """\
examples:
  recalign bench recformer launch/recipes/recformer-beauty.yaml
  recalign bench recformer my.yaml --steps 5 llm.recformer.pretrain.batch_size=16
""")  # fmt: skip
    recformer.add_argument("recipe", type=Path, help="with an llm.recformer.pretrain section")
    recformer.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    recformer.add_argument("--steps", type=int, default=5, help="timed a round and way (default: 5)")
    recformer.add_argument("--rounds", type=int, default=4, help="turns of each way (default: 4)")
    recformer.add_argument("--out", type=Path, default=Path("runs/bench-recformer"), help="folder of the result")

    bench = add_command(names, "rec", _rec, "recommenders beside RecBole, RecTools and RePlay", """\
examples:
  python -m launch.bench.peers --setup                 # once: RecBole, RecTools, RePlay, each in its environment
  recalign bench rec --data data/amazon-beauty-2014 --data data/ml-1m
  recalign bench rec --data data/amazon-beauty-2014 --peers replay --stages epoch --seconds 60 --max-length 50
""")  # fmt: skip
    bench.add_argument("--data", type=Path, action="append", required=True, help="prepared folder; may be repeated")
    bench.add_argument("--peers", default="recbole,rectools,replay", help="separated by commas (default: all)")
    bench.add_argument("--stages", help="separated by commas (default: all but quality)")
    bench.add_argument("--max-length", default="50,200", help="lengths of history (default: 50,200)")
    bench.add_argument("--seconds", type=float, default=30, help="to time each system (default: 30)")
    bench.add_argument("--out", type=Path, default=Path("runs/bench-rec"), help="folder of the measurements")


def _align(arguments: argparse.Namespace) -> None:
    recipe, overrides = _recipe(arguments, "closed-world.yaml")

    from launch import tables
    from launch.bench import align

    result = align.run(recipe, overrides, arguments.steps, arguments.out, shlex.join(["recalign", *sys.argv[1:]]))
    tables.print_bench_align(result)


def _recipe(arguments: argparse.Namespace, default: str) -> tuple[Path, list[str]]:
    """The recipe and its overrides; argparse gives the first word to the recipe, which may be left out."""
    recipe, overrides = arguments.recipe, list(arguments.overrides)
    if recipe is not None and "=" in str(recipe) and not recipe.exists():
        recipe, overrides = None, [str(recipe), *overrides]
    return recipe or Path(str(resources.files("launch.recipes").joinpath(default))), overrides


def _lmrec(arguments: argparse.Namespace) -> None:
    if arguments.steps < 1:
        raise UserError(f"--steps {arguments.steps}: at least one is needed")
    recipe, overrides = _recipe(arguments, "lmrec-bench.yaml")

    from launch.bench import lmrec
    from launch.lmrec import tables

    names = arguments.only.split(",") if arguments.only else lmrec.NAMES
    command = shlex.join(["recalign", *sys.argv[1:]])
    tables.print_bench(lmrec.run(recipe, overrides, arguments.out, arguments.steps, names, command))


def _latency(arguments: argparse.Namespace) -> None:
    if arguments.requests < 1:
        raise UserError(f"--requests {arguments.requests}: at least one is needed")

    from launch import tables
    from launch.bench import latency

    out, command = arguments.out or arguments.run / "latency", shlex.join(["recalign", *sys.argv[1:]])
    tables.print_latency(latency.run(arguments.run, out, arguments.requests, command))


def _recformer(arguments: argparse.Namespace) -> None:
    if min(arguments.steps, arguments.rounds) < 1:
        raise UserError("--steps and --rounds: at least one each")

    from launch import recformer_tables
    from launch.bench import recformer

    measured, command = (arguments.steps, arguments.rounds), shlex.join(["recalign", *sys.argv[1:]])
    result = recformer.run(arguments.recipe, arguments.overrides, *measured, arguments.out, command)
    recformer_tables.print_bench(result)


def _rec(arguments: argparse.Namespace) -> None:
    from launch import tables
    from launch.bench import rec, rec_tasks

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
