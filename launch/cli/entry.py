"""The ``recalign`` command."""

import argparse
import json
import os
import shlex
import sys
from importlib import resources
from pathlib import Path

from launch.cli import bench, cluster, data, llm, pretrain, rec, report, reproduce, serve, vectors
from launch.commands import add_command, add_run_options, delete_run
from rec.runtime.errors import RESUME_ANYWAY, UserError
from rec.runtime.logs import run_main

# Heavy modules are imported by the commands that need them, so that --help and mistakes answer at once.

DEMO_RECIPE = "seralm-ml-100k.yaml"


def main() -> None:
    """Entry of the ``recalign`` command."""
    parser = _parser()
    arguments, rest = parser.parse_known_args()
    # argparse takes no more positional arguments after an option: "recalign demo --fresh align.alpha=0.1".
    if not hasattr(arguments, "overrides") or any("=" not in word or word.startswith("-") for word in rest):
        arguments = parser.parse_args()
    else:
        arguments.overrides += rest
    if getattr(arguments, "resume_anyway", False):
        os.environ[RESUME_ANYWAY] = "1"
    run_main(lambda: arguments.handler(arguments), debug=arguments.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recalign", description="Train large language models and sequential recommenders together."
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback for a user's mistake too")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = add_command(commands, "demo", _demo, "run the main job on MovieLens-100K, nothing to configure", """\
examples:
  recalign demo                              # resumes, or says that it is done
  recalign demo --fresh                      # starts over
  recalign demo --run runs/short align.trainer.steps=100
""")  # fmt: skip
    demo.add_argument("--run", type=Path, default=Path("runs/demo"), help="run folder (default: runs/demo)")
    add_run_options(demo)

    align_summary = "run the main job of a recipe: trainer and generator on this machine"
    align = add_command(commands, "align", _align, align_summary, """\
examples:
  recalign align launch/recipes/seralm-online-retail.yaml
  recalign align my.yaml align.refresh_every=10 align.max_lag_steps=20
  recalign align runs/demo/config.yaml       # resume a run
  recalign align --replay runs/demo          # train again on its recorded samples: the same weights, bit for bit
""")  # fmt: skip
    align.add_argument("recipe", type=Path, nargs="?", help="YAML recipe")
    align.add_argument("--replay", type=Path, metavar="RUN", help="a finished run whose trainer is to be run again")
    align.add_argument("--out", type=Path, help="of a replay: where it writes (default: RUN/replay)")
    align.add_argument(
        "--stop-before-alignment",
        action="store_true",
        help="do only what comes before; then start trainer and generator yourself, e.g. on a cluster",
    )
    add_run_options(align)

    rec.add_commands(commands)
    serve.add_commands(commands)
    llm.add_commands(commands)
    pretrain.add_commands(commands)
    vectors.add_commands(commands)
    data.add_commands(commands)
    reproduce.add_commands(commands)
    report.add_commands(commands)
    bench.add_commands(commands)
    cluster.add_commands(commands)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    recipe = Path(str(resources.files("launch.recipes").joinpath(DEMO_RECIPE)))
    _run_main_job(
        recipe, [*_ranks_for_gpus(), f"run={json.dumps(str(arguments.run))}", *arguments.overrides], arguments.fresh
    )


def _align(arguments: argparse.Namespace) -> None:
    if arguments.replay is not None:
        _replay(arguments)
        return
    if arguments.recipe is None:
        raise UserError("align needs a recipe, or --replay RUN")
    if arguments.out is not None:
        raise UserError("--out belongs to --replay; a recipe's run folder is its key run: run=DIR")
    _run_main_job(arguments.recipe, arguments.overrides, arguments.fresh, arguments.stop_before_alignment)


def _replay(arguments: argparse.Namespace) -> None:
    if arguments.recipe or arguments.overrides or arguments.stop_before_alignment:
        raise UserError("--replay takes a run folder as it is, without a recipe or overrides")
    from launch.alignment.replay import replay

    out = arguments.out or arguments.replay / "replay"
    if out.resolve() == arguments.replay.resolve():
        raise UserError(f"--out {out} is the run that is replayed: name another folder")
    if arguments.fresh:
        delete_run(out)
    result = replay(arguments.replay, out, shlex.join(["recalign", *sys.argv[1:]]))
    [claim] = result["claims"]
    sys.stdout.write(f"{claim['id']}: {'yes' if claim['holds'] else 'NO'} ({claim['figure']})\n")
    if not claim["holds"]:
        sys.exit(1)


def _run_main_job(recipe: Path, overrides: list[str], fresh: bool, stop_before_alignment: bool = False) -> None:
    from align.config import load_job

    job = load_job(recipe, overrides)
    if fresh:
        delete_run(job.run)

    from launch.alignment import summary
    from launch.alignment.main_job import MainJobRun

    command = shlex.join(["recalign", *sys.argv[1:]])
    result = MainJobRun(job).execute(command, stop_before_alignment)
    if result is None:
        sys.stdout.write(f"Ready to align: both jobs read --config {job.run}/config.yaml\n")
        return
    summary.print_result(result)
    sys.stdout.write(f"\nEverything is in {job.run}: result.json, metrics.jsonl, plots/, knowledge/, seralm/model\n")


def _ranks_for_gpus() -> list[str]:
    """The demo's two ranks, or as many as a machine with few GPUs has beside the generator's."""
    import torch

    gpus = torch.cuda.device_count()
    return [f"align.trainer.processes={max(1, min(2, gpus - 1))}"] if gpus else []
