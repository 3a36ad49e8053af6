"""``recalign plan``: does an alignment job fit the GPUs, how long is a step, and how many of them should generate?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from align.config import MainJob, load_job
from launch.cluster import memory, rates
from launch.cluster.memory import Memory, Shape
from launch.cluster.simulate import Prediction, Simulation
from launch.cluster.where import ONE_PROCESS
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import METRICS, RunFolder

# Times the batch: no advice, but another recipe.
MUCH_LARGER = 2


@dataclass(frozen=True)
class Machines:
    """What there is to run on: ``nodes`` of ``gpus`` GPUs with ``gpu_bytes`` of memory each."""

    nodes: int
    gpus: int
    gpu_bytes: float
    hardware: rates.Hardware


@dataclass(frozen=True)
class Option:
    """One way to divide the GPUs, and what comes of it."""

    ranks: int
    generators: int
    trainer: Memory
    fits: bool
    prediction: Prediction


@dataclass(frozen=True)
class Plan:
    """All ways to divide the GPUs, and the best of those that fit; None if none does.

    ``left_out`` are numbers of ranks that there could be, if they divided the batch.
    """

    job: MainJob
    shape: Shape
    generator: Memory
    host_bytes: float
    options: list[Option]
    left_out: list[int]
    best: Option | None
    measured_in: Path | None


def plan(job: MainJob, machines: Machines, prompt_tokens: int = 64, measured_in: Path | None = None) -> Plan:
    """Every division of the GPUs that divides the batch too, simulated.

    On several nodes whole nodes generate; one node's GPUs are divided.

    Args:
        job: the recipe; its own numbers of processes do not matter.
        machines: what there is.
        prompt_tokens: of the longest prompt.
        measured_in: a run whose rates are taken instead of reckoned ones: of the same models and GPUs.

    Raises:
        UserError: if the LLM is not known, or does not fit a generator's GPU, if nothing divides the batch, or if the
            run tells no rates.
    """
    if measured_in is not None and not (measured_in / METRICS).is_file():
        raise UserError(f"{measured_in} has measured nothing: it holds no {METRICS}")
    shape = memory.shape_of(job, prompt_tokens)
    splits, batch = list(_splits(job, machines)), job.align.trainer.batch_size
    left_out = [ranks for ranks, _ in splits if batch % ranks]
    found = [_option(job, machines, shape, *split, measured_in) for split in splits if split[0] not in left_out]
    if not found:
        total = machines.nodes * machines.gpus
        if total == 1:
            raise UserError(
                "one GPU is shared by both jobs, which this plan does not reckon with: ask for two at least"
            )
        raise UserError(f"no ranks that {total} GPUs leave divide align.trainer.batch_size {batch}: change it")
    fitting = [option for option in found if option.fits]
    best = min(fitting, key=lambda option: option.prediction.wall_s) if fitting else None
    ranks = best.ranks if best else found[0].ranks
    host = memory.host_memory(job.align.trainer, shape, ranks, min(ranks, machines.gpus))
    generator = memory.generator_memory(job, shape, machines.gpu_bytes)
    return Plan(job, shape, generator, host, found, left_out, best, measured_in)


def _splits(job: MainJob, machines: Machines) -> Iterator[tuple[int, int]]:
    """(ranks, generators): by whole nodes, or the GPUs of the one node."""
    total = machines.nodes * machines.gpus
    unit = machines.gpus if machines.nodes > 1 else 1
    most = unit if job.align.others == "newest" else total - unit
    for generators in range(unit, most + 1, unit):
        # One generator alone knows what it said last, however many GPUs its node has.
        running = 1 if job.align.others == "newest" else generators
        if total > generators:
            yield total - generators, running


def _option(
    job: MainJob, machines: Machines, shape: Shape, ranks: int, generators: int, measured_in: Path | None
) -> Option:
    needed = memory.trainer_memory(job.align.trainer, shape, ranks)
    if measured_in is None:
        taken = rates.reckoned(job, shape, machines.hardware, ranks, -(-ranks // machines.gpus))
    else:
        run = RunFolder(measured_in)
        found = rates.measured(run)
        taken = rates.on_ranks(found, run.events("trainer_started")[-1]["world_size"], ranks)
    prediction = Simulation(job.align, taken, generators).run()
    return Option(ranks, generators, needed, needed.total <= machines.gpu_bytes, prediction)


def load(recipe: Path, overrides: list[str]) -> MainJob:
    """The recipe of an alignment job, on one process each: a plan looks for better numbers.

    Raises:
        UserError: if it is another kind of recipe.
    """
    if "align" not in read_recipe(recipe):
        raise UserError(f"{recipe} has no section align: recalign plan is about alignment")
    return load_job(recipe, [*overrides, *ONE_PROCESS])


def print_plan(plan: Plan, machines: Machines, console: Console | None = None) -> None:
    """Memory, divisions and the advice, for people."""
    console = console or Console(width=118, highlight=False)
    shape, trainer = plan.shape, plan.job.align.trainer
    console.print(
        f"LLM: {shape.parameters / 1e9:.3g} billion parameters, {shape.trainable / 1e9:.3g} trained;"
        f" {shape.texts_per_step} texts of up to {shape.prompt_tokens} + {shape.new_tokens} tokens a step"
    )
    shown = plan.best or plan.options[0]
    _print_memory(console, f"trainer, ZeRO-{trainer.zero_stage}, {shown.ranks} ranks", shown.trainer, machines)
    _print_memory(console, "generator", plan.generator, machines)
    cached = memory.cached_tokens(plan.generator, plan.job, shape)
    host = f"; offloading takes {plan.host_bytes / 1e9:.0f} GB of a node's memory" if plan.host_bytes else ""
    console.print(f"The KV cache holds {cached:,} tokens{host}")
    source = f"measured in {plan.measured_in}" if plan.measured_in else "reckoned, not measured"
    table = Table(title=f"Rates: {source}", title_justify="left")
    for name in ("ranks", "generators", "GB", "step s", "hours", "lag mean", "lag max", "trainer waits",
                 "generator waits", "saving"):  # fmt: skip
        table.add_column(name, justify="right")
    for option in plan.options:
        table.add_row(*_cells(option), style="bold" if option is plan.best else "" if option.fits else "dim")
    console.print(table)
    if plan.left_out:
        console.print(_left_out(plan))
    console.print(_advice(plan, machines))


def _print_memory(console: Console, title: str, found: Memory, machines: Machines) -> None:
    parts = ", ".join(f"{name} {bytes_ / 1e9:.1f}" for name, bytes_ in found.parts.items() if bytes_ >= 5e7)
    limit = f"{found.total / 1e9:.1f} of {machines.gpu_bytes / 1e9:.0f}"
    console.print(f"GB on each GPU of the {title}: {limit}: {parts}")


def _cells(option: Option) -> list[str]:
    found = option.prediction
    return [
        str(option.ranks),
        str(option.generators),
        f"{option.trainer.total / 1e9:.1f}{'' if option.fits else ' (too much)'}",
        f"{found.step_s:.3g}",
        f"{found.wall_s / 3600:.3g}",
        f"{found.lag_steps_mean:.1f}",
        str(found.lag_steps_max),
        f"{found.trainer_waiting_share:.0%}",
        f"{found.generator_waiting_share:.0%}",
        f"{found.checkpoint_share:.1%}",
    ]


def _left_out(plan: Plan) -> str:
    batch = plan.job.align.trainer.batch_size
    smallest = math.lcm(*plan.left_out, *(option.ranks for option in plan.options))
    other = smallest * max(1, round(batch / smallest))
    remedy = f"; {other} would be divided by all" if other <= MUCH_LARGER * batch else ""
    told = ", ".join(map(str, sorted(plan.left_out)))
    return f"Left out: {told} ranks, which do not divide align.trainer.batch_size {batch}{remedy}"


def _advice(plan: Plan, machines: Machines) -> str:
    best, trainer = plan.best, plan.job.align.trainer
    if best is None:
        left = {
            "a higher align.trainer.zero_stage": trainer.zero_stage < 3,
            "align.trainer.bf16=true": not trainer.bf16,
            "align.trainer.lora": trainer.lora is None,
            "align.trainer.offload=true": not trainer.offload,
        }
        steps = [what for what, untried in left.items() if untried]
        return f"Nothing fits: try {', '.join([*steps, 'a smaller batch'])}"
    if machines.nodes > 1:
        generating = max(1, -(-best.generators // machines.gpus))
        return f"Best: recalign submit RECIPE --nodes {machines.nodes} --generator-nodes {generating}"
    return f"Best: align.trainer.processes={best.ranks} align.generator.processes={best.generators} on one node"
