"""The commands about clusters: submit, status, logs, doctor, check and plan."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from launch.commands import add_command, add_run_options, number
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    _add_submit(commands)
    _add_plan(commands)
    check = add_command(commands, "check", _check, "measure whether an allocation is fit for a job", """\
examples:
  salloc --nodes 2 recalign check --folder /scratch/runs
  recalign check                    # this machine alone
""")  # fmt: skip
    check.add_argument("--site", type=Path, help="site settings (default: launch/slurm/site.sh)")
    check.add_argument("--folder", type=Path, default=Path(), help="where runs are to live (default: here)")

    status = add_command(commands, "status", _status, "say what a run is doing, from its files alone", """\
examples:
  recalign status runs/mine
  watch -n 5 recalign status runs/mine
""")  # fmt: skip
    logs = add_command(commands, "logs", _logs, "show the logs of a run's latest attempt", """\
examples:
  recalign logs runs/mine
  recalign logs runs/mine -f        # until it is finished
""")  # fmt: skip
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what is added")
    logs.add_argument("-n", "--lines", type=number(int), default=20, help="of every log, to begin with (default: 20)")
    doctor = add_command(commands, "doctor", _doctor, "say which checkpoints are whole and what would be resumed", """\
examples:
  recalign doctor runs/mine
""")  # fmt: skip
    for parser in (status, logs, doctor):
        parser.add_argument("run", type=Path, help="run folder")


def _add_submit(commands: argparse._SubParsersAction) -> None:
    submit = add_command(commands, "submit", _submit, "submit a recipe as a SLURM job", """\
examples:
  recalign submit launch/recipes/sasrec-beauty.yaml --nodes 1
  recalign submit launch/recipes/seralm-llama2.yaml align.trainer.batch_size=64 --nodes 3 --generator-nodes 1 --dry-run
  recalign submit my.yaml --nodes 1 --sbatch="--time=12:00:00" align.trainer.steps=1000   # divides the one node

The script, the resolved recipe, the commit and the packages are kept in RUN/slurm/submission-N.
""")  # fmt: skip
    submit.add_argument("recipe", type=Path, help="YAML recipe, or the config.yaml of a run folder")
    add_run_options(submit)
    submit.add_argument("--nodes", type=number(int, 1), default=1, help="nodes of the whole job (default: 1)")
    submit.add_argument("--generator-nodes", type=number(int), metavar="M", help="of these, for generators (alignment)")
    submit.add_argument("--het", action="store_true", help="alignment as a heterogeneous job")
    submit.add_argument("--sbatch", default="", metavar="OPTIONS", help="more options of sbatch, in one argument")
    submit.add_argument("--sbatch-generators", default="", metavar="OPTIONS", help="of the generators alone (--het)")
    submit.add_argument("--site", type=Path, help="site settings (default: launch/slurm/site.sh)")
    submit.add_argument("--dry-run", action="store_true", help="print the script, submit and write nothing")


def _add_plan(commands: argparse._SubParsersAction) -> None:
    plan = add_command(commands, "plan", _plan, "say whether alignment fits the GPUs, and how to divide them", """\
examples:
  recalign plan launch/recipes/seralm-llama2.yaml --nodes 2 --gpus 8 --gpu-memory 80
  recalign plan my.yaml --nodes 4 --rates runs/short      # by what a short run of it measured
""")  # fmt: skip
    plan.add_argument("recipe", type=Path, help="YAML recipe of alignment")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    for option, kind, default, unit in (
        ("--nodes", int, 1, "nodes of the whole job"),
        ("--gpus", int, 8, "GPUs of each node"),
        ("--gpu-memory", float, 80.0, "of each GPU, in 10⁹ bytes"),
        ("--prompt-tokens", int, 64, "of the longest prompt"),
        ("--gpu-tflops", float, 312.0, "of each GPU, dense bf16"),
        ("--mfu", float, 0.4, "share of these that training reaches"),
        ("--gpu-bandwidth", float, 2000.0, "of each GPU's memory, in GB/s"),
        ("--network", float, 20.0, "all-reduce between nodes, in GB/s (recalign check measures it)"),
        ("--disk", float, 1.0, "writing of each node, in GB/s (recalign check measures it)"),
    ):
        plan.add_argument(option, type=number(kind, above=True), default=default, help=f"{unit} (default: {default:g})")
    plan.add_argument("--rates", type=Path, metavar="RUN", help="take the rates that this run measured")


def _submit(arguments: argparse.Namespace) -> None:
    from launch.cluster.submit import Wish, submit
    from launch.cluster.where import run_of

    wish = Wish(
        arguments.recipe,
        arguments.overrides,
        arguments.nodes,
        arguments.generator_nodes,
        arguments.het,
        _options(arguments.sbatch, "--sbatch"),
        _options(arguments.sbatch_generators, "--sbatch-generators"),
        arguments.site,
    )
    run = run_of(arguments.recipe, arguments.overrides)
    script, job = submit(wish, shlex.join(["recalign", *sys.argv[1:]]), arguments.dry_run, arguments.fresh)
    if job is None:
        sys.stdout.write(script)
        return
    sys.stdout.write(f"Submitted job {job}\n  recalign status {run}\n  recalign logs {run} -f\n")


def _options(text: str, given_as: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UserError(f"{given_as}={text}: {str(error).lower()}") from None


def _status(arguments: argparse.Namespace) -> None:
    from launch.cluster.status import print_status, status

    print_status(status(arguments.run), arguments.run)


def _logs(arguments: argparse.Namespace) -> None:
    from launch.cluster.status import follow, log_files, status

    status(arguments.run)  # says what is wrong with the folder
    if not arguments.follow and not log_files(arguments.run):
        raise UserError(f"{arguments.run} has no logs: none of its jobs has begun, or none writes any")
    for line in follow(arguments.run, arguments.lines, arguments.follow):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _doctor(arguments: argparse.Namespace) -> None:
    from launch.cluster.doctor import print_diagnoses

    print_diagnoses(arguments.run)


def _check(arguments: argparse.Namespace) -> None:
    from launch.cluster.check import start

    sys.exit(start(arguments.folder, arguments.site))


def _plan(arguments: argparse.Namespace) -> None:
    # DeepSpeed is asked for its settings alone, and would look for a GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from launch.cluster.plan import Machines, load, plan, print_plan
    from launch.cluster.rates import Hardware

    hardware = Hardware(arguments.gpu_tflops, arguments.mfu, arguments.gpu_bandwidth, arguments.network, arguments.disk)
    machines = Machines(arguments.nodes, arguments.gpus, arguments.gpu_memory * 1e9, hardware)
    job = load(arguments.recipe, arguments.overrides)
    print_plan(plan(job, machines, arguments.prompt_tokens, arguments.rates), machines)
