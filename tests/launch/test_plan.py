"""The arithmetic of memory against numbers worked out elsewhere, and the simulation against rules and a real run."""

import io
import itertools

import pytest
from rich.console import Console
from transformers import LlamaConfig

from align.config import AlignConfig, MainJob, TrainerConfig
from launch.cluster.memory import Shape, generator_memory, host_memory, shape_of, trainer_memory
from launch.cluster.plan import Machines, load, plan, print_plan
from launch.cluster.rates import Hardware, measured
from launch.cluster.simulate import Rates, Simulation
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> MainJob:
    folder = tmp_path_factory.mktemp("llama") / "model"
    LlamaConfig(vocab_size=32000, **LLAMA_2_7B).save_pretrained(folder)
    align = {"trainer": {"processes": 8, "batch_size": 48, "bf16": True, "zero_stage": 2, "steps": 200}}
    llm = {"model": str(folder), "engine": {"dtype": "bfloat16", "canary_tolerance": 0.15}}
    return build(MainJob, {"data": "x", "run": "y", "llm": llm, "align": align})


@pytest.mark.parametrize(
    ("stage", "ranks", "states_gb", "with_reference_gb"),
    # Of 6.74 billion parameters: 2 bytes of weights, 2 of gradients, 12 of Adam, divided as the stage says.
    [
        (2, 4, 37.1, 50.5),
        (2, 8, 25.3, 38.7),
        (2, 16, 19.4, 32.8),
        (3, 4, 27.0, 30.3),
        (3, 8, 13.5, 15.2),
        (3, 16, 6.7, 7.6),
    ],
)
def test_seven_billion_parameters_take_what_is_known_of_them(job, stage, ranks, states_gb, with_reference_gb):
    trainer = job.align.trainer.model_copy(update={"zero_stage": stage})
    shape = shape_of(job)
    assert shape.parameters == 6_738_415_616
    found = trainer_memory(trainer, shape, ranks).parts
    states = found["weights"] + found["gradients"] + found["optimizer"]
    assert states / 1e9 == pytest.approx(states_gb, abs=0.06)
    assert (states + found["reference"]) / 1e9 == pytest.approx(with_reference_gb, abs=0.1)


def test_adapters_need_no_reference_and_offloading_no_states_on_the_gpu(job):
    lora = build(TrainerConfig, {"lora": {"rank": 16}, "bf16": True, "zero_stage": 2})
    adapted = shape_of(job.model_copy(update={"align": job.align.model_copy(update={"trainer": lora})}))
    # Of each block: q, k, v, o between 4,096 and 4,096, and three between 4,096 and 11,008.
    assert adapted.trainable == 32 * 16 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert adapted.parameters == 6_738_415_616
    assert trainer_memory(lora, adapted, 8).parts["reference"] == 0
    offloaded = build(TrainerConfig, {"zero_stage": 3, "offload": True, "bf16": True})
    found = trainer_memory(offloaded, shape_of(job), 8).parts
    assert found["weights"] == found["optimizer"] == found["reference"] == 0
    assert host_memory(offloaded, shape_of(job), 8, 8) / 1e9 == pytest.approx(6.738 * (2 + 2 + 2 + 12), rel=1e-3)


def test_the_cache_is_what_the_weights_leave(job):
    found = generator_memory(job, shape_of(job), 80e9)
    assert found.parts["weights"] / 1e9 == pytest.approx(13.48, abs=0.01)
    assert found.total == pytest.approx(0.85 * 80e9)
    with pytest.raises(UserError, match=r"does not hold the LLM's 13\.5 GB"):
        generator_memory(job, shape_of(job), 15e9)


def align_of(**settings) -> AlignConfig:
    trainer = {"steps": 60, "checkpoint_every": 1000, "keep_snapshots": 9, **settings.pop("trainer", {})}
    return build(AlignConfig, {"refresh_every": 10, "max_lag_steps": 20, "trainer": trainer, **settings})


FREE = Rates(update_s=0.0, publish_s=0.0, checkpoint_s=0.0, call_s=0.0, batch_s=0.0, refresh_s=0.0)


def test_without_any_overlap_times_add_up():
    """Synchronous training: every step waits for its own batch, every batch for the weights of the step before."""
    align = align_of(refresh_every=1, max_lag_steps=0, generator={"batches_per_call": 1})
    rates = Rates(update_s=3.0, publish_s=0.5, checkpoint_s=0.0, call_s=0.25, batch_s=1.0, refresh_s=0.125)
    found = Simulation(align, rates, 1).run()
    assert found.wall_s == pytest.approx(60 * (3.0 + 0.5 + 0.25 + 1.0 + 0.125))
    assert found.lag_steps_max == 0
    assert found.trainer_waiting_share == pytest.approx(1.375 / 4.875)


@pytest.mark.parametrize(("update_s", "batch_s", "slower"), [(2.0, 0.5, 2.0), (0.5, 2.0, 2.0)])
def test_with_room_to_work_ahead_a_run_takes_as_long_as_its_slower_job(update_s, batch_s, slower):
    rates = Rates(update_s, 0.0, 0.0, 0.0, batch_s, 0.0)
    found = Simulation(align_of(max_lag_steps=40), rates, 1).run()
    assert found.wall_s == pytest.approx(60 * slower, rel=0.05)
    waits = found.trainer_waiting_share, found.generator_waiting_share
    assert (waits[0] > 0.5) == (batch_s > update_s)
    assert (waits[1] > 0.3) == (update_s > batch_s)


@pytest.mark.parametrize(
    ("refresh_every", "max_lag", "per_call", "generators", "seed"),
    [(1, 0, 1, 1, 0), (5, 4, 3, 1, 1), (10, 20, 4, 2, 2), (7, 13, 2, 3, 3), (50, 100, 4, 4, 4)],
)
def test_no_rule_of_the_jobs_is_broken(refresh_every, max_lag, per_call, generators, seed):
    align = align_of(
        refresh_every=refresh_every, max_lag_steps=max_lag,
        generator={"batches_per_call": per_call, "processes": generators},
    )  # fmt: skip
    rates = Rates(*(((seed * 7 + nth * 3) % 5 + 0.25) / 4 for nth in range(6)))
    run = Simulation(align, rates, generators)
    found = run.run()
    assert found.lag_steps_max <= max_lag
    assert set(run.ready) == set(run.made_at) == set(range(60))
    finished = dict(run.published)
    for step, version_step in run.made_at.items():
        assert version_step in finished, "a snapshot that was never published"
        assert finished[version_step] < run.ready[step], "a batch under weights that were not there yet"
    busy = sum((rates.update_s * 60, rates.publish_s * (len(run.published) - 1), rates.checkpoint_s))
    assert found.wall_s >= busy
    assert found.wall_s == pytest.approx(busy + found.trainer_waiting_share * found.wall_s)


def test_more_generators_help_as_long_as_the_trainer_waits():
    rates = Rates(1.0, 0.0, 0.0, 0.0, 3.0, 0.0)
    walls = [Simulation(align_of(max_lag_steps=40), rates, several).run().wall_s for several in (1, 2, 3, 4)]
    assert walls[0] == pytest.approx(180, rel=0.05)
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(walls))
    assert walls[3] < 0.45 * walls[0]


def test_the_plan_divides_what_can_be_divided_and_says_what_does_not_fit(job):
    one = plan(job, Machines(1, 8, 80e9, Hardware()))
    assert [(option.ranks, option.generators) for option in one.options] == [(6, 2), (4, 4), (3, 5), (2, 6), (1, 7)]
    assert one.best is not None
    assert one.best.fits
    assert all(one.best.prediction.wall_s <= option.prediction.wall_s for option in one.options if option.fits)
    several = plan(job, Machines(3, 8, 80e9, Hardware()))
    assert [(option.ranks, option.generators) for option in several.options] == [(16, 8), (8, 16)]
    assert several.left_out == []
    small = plan(job, Machines(1, 8, 24e9, Hardware()))
    assert small.best is None
    with pytest.raises(UserError, match=r"divide align\.trainer\.batch_size 48"):
        plan(job, Machines(2, 5, 80e9, Hardware()))
    with pytest.raises(UserError, match="one GPU is shared"):
        plan(job, Machines(1, 1, 80e9, Hardware()))
    with pytest.raises(UserError, match="has measured nothing"):
        plan(job, Machines(1, 8, 80e9, Hardware()), measured_in=job.run / "typo")
    assert not (job.run / "typo").exists()
    with pytest.raises(UserError, match="too few to measure"):
        measured(RunFolder(job.run / "nowhere"))


def test_the_plan_says_what_it_left_out(job):
    content = job.model_dump(mode="json")
    content["align"]["trainer"]["batch_size"] = 56
    machines, told = Machines(4, 8, 80e9, Hardware()), Console(record=True, width=200, file=io.StringIO())
    uneven = plan(build(MainJob, content), machines)
    assert [option.ranks for option in uneven.options] == [8]
    print_plan(uneven, machines, told)
    left_out = "Left out: 16, 24 ranks, which do not divide align.trainer.batch_size 56; 48 would be divided by all"
    assert left_out in told.export_text()


def test_rates_are_the_means_of_what_was_logged(tmp_path):
    run, now = RunFolder(tmp_path), 100.0
    for step in range(21):
        publish, save = (0.5 if step % 10 == 9 else 0.0), (0.25 if step % 5 == 4 else 0.0)
        now += 0.1 + 1.0 + 0.05  # waiting, busy, and something in between
        run.log("train", time_s=now, step=step, waited_s=0.1, busy_s=1.0)
        if publish:
            run.log("published", step=step, version_step=step + 1, publish_s=publish)
        if save:
            run.log("saved", step=step + 1, save_s=save)
        now += publish + save
    for nth in range(6):
        run.log("generated", step=nth, batches=nth % 3 + 1, busy_s=0.2 + 0.3 * (nth % 3 + 1))
        run.log("refresh", step=nth, load_s=0.02, canary_s=0.03)
    found = measured(run)
    assert found == Rates(*(pytest.approx(value, rel=1e-6) for value in (1.05, 0.5, 0.25, 0.2, 0.3, 0.05)))


def test_a_recipe_is_planned_whatever_its_own_processes_are(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: x\nrun: y\nalign: {trainer: {processes: 5, batch_size: 48}}\n")
    assert load(recipe, []).align.trainer.batch_size == 48
    recipe.write_text("data: x\nrun: y\nrec: {}\n")
    with pytest.raises(UserError, match="has no section align"):
        load(recipe, [])


def test_a_shape_counts_texts_that_reward_and_those_that_only_fit(job):
    settings = job.align.model_copy(update={"reward_users": 0.2, "fresh_items": 2})
    objective = settings.objective.model_copy(update={"samples": 4})
    shape = shape_of(job.model_copy(update={"align": settings.model_copy(update={"objective": objective})}))
    assert shape.texts_per_step == (48 * 4 + 48) * 2
    assert isinstance(shape, Shape)
