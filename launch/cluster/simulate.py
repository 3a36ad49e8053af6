"""Trainer and generators as a discrete-event simulation: how long a run takes, who waits, how stale the samples are.

The rules are those of the jobs themselves: step t waits for its batch; the batch of step t may be generated under a
snapshot of step t - max_lag_steps or later; a generator loads the newest snapshot before every call of vLLM; several
generators take turns at stretches of ``batches_per_call`` steps; a snapshot is published every ``refresh_every`` steps.
"""

from dataclasses import dataclass

from align.config import AlignConfig
from align.order import Turns


@dataclass(frozen=True)
class Rates:
    """How long each thing takes, in seconds.

    Attributes:
        update_s: one trainer step on a whole batch, without what follows.
        publish_s: one publication of a snapshot, during which the trainer waits.
        checkpoint_s: one checkpoint.
        call_s: a call of vLLM for no batch at all.
        batch_s: what each batch adds to a call: sampling, encoding, scoring, writing.
        refresh_s: loading a snapshot and its canary.
    """

    update_s: float
    publish_s: float
    checkpoint_s: float
    call_s: float
    batch_s: float
    refresh_s: float


@dataclass(frozen=True)
class Prediction:
    """What a run with these rates would be like.

    Attributes:
        wall_s: from the first call of vLLM to the end of the last step.
        step_s: the same for each step.
        lag_steps_mean: age of the samples of a step, in trainer steps.
        lag_steps_max: of the oldest.
        trainer_waiting_share: of its time, for batches.
        generator_waiting_share: of their time until they are done, for snapshots.
        checkpoint_share: of the run, in which the trainer saves.
    """

    wall_s: float
    step_s: float
    lag_steps_mean: float
    lag_steps_max: int
    trainer_waiting_share: float
    generator_waiting_share: float
    checkpoint_share: float


@dataclass
class _Generator:
    turns: Turns
    next_step: int
    free_at: float = 0.0
    loaded: int = -1
    waited: float = 0.0


class Simulation:
    """One run of ``align`` on ``generators`` generators.

    The actor that can begin something earliest does it next. Whatever it brings about comes later than that, so nobody
    ever acts without knowing what would have been known to it.
    """

    def __init__(self, align: AlignConfig, rates: Rates, generators: int) -> None:
        self.align, self.rates, self.steps = align, rates, align.trainer.steps
        turns = [Turns(nth, generators, align.generator.batches_per_call) for nth in range(generators)]
        self.generators = [_Generator(own, own.next(0)) for own in turns]
        # When each snapshot was there, by the steps it had finished; snapshots are in the order of both.
        self.published: list[tuple[int, float]] = [(0, 0.0)]
        self.ready: dict[int, float] = {}
        self.made_at: dict[int, int] = {}
        self.trainer_step, self.trainer_free, self.trainer_waited, self.saved = 0, 0.0, 0.0, 0.0

    def run(self) -> Prediction:
        """Until the trainer's last step."""
        while self.trainer_step < self.steps:
            starts = [(self._generator_start(one), 1, one.turns.number) for one in self.generators]
            starts = [start for start in starts if start[0] is not None]
            if self.trainer_step in self.ready:
                starts.append((max(self.trainer_free, self.ready[self.trainer_step]), 0, 0))
            begin, is_generator, number = min(starts)
            if is_generator:
                self._generate(self.generators[number], begin)
            else:
                self._train(begin)
        lags = [step - self.made_at[step] for step in range(self.steps)]
        busy_until = sum(max(one.free_at, 1e-12) for one in self.generators)
        return Prediction(
            wall_s=self.trainer_free,
            step_s=self.trainer_free / self.steps,
            lag_steps_mean=sum(lags) / len(lags),
            lag_steps_max=max(lags),
            trainer_waiting_share=self.trainer_waited / self.trainer_free,
            generator_waiting_share=sum(one.waited for one in self.generators) / busy_until,
            checkpoint_share=self.saved / self.trainer_free,
        )

    def _generator_start(self, one: _Generator) -> float | None:
        """When it can generate its next batch; None if it has none, or has to wait for a snapshot not yet in sight."""
        if one.next_step >= self.steps:
            return None
        needed = one.next_step - self.align.max_lag_steps
        allowed = (at for step, at in self.published if step >= needed)
        at = next(allowed, None)
        return None if at is None else max(one.free_at, at)

    def _generate(self, one: _Generator, begin: float) -> None:
        one.waited += begin - one.free_at
        newest = max(step for step, at in self.published if at <= begin)
        now = begin + (self.rates.refresh_s if newest > one.loaded else 0.0)
        one.loaded, first = newest, one.next_step
        end = min(one.turns.end(first), newest + self.align.max_lag_steps + 1, self.steps)
        one.free_at = now + self.rates.call_s + (end - first) * self.rates.batch_s
        for step in range(first, end):
            self.ready[step], self.made_at[step] = one.free_at, newest
        one.next_step = one.turns.next(end)

    def _train(self, begin: float) -> None:
        trainer, step = self.align.trainer, self.trainer_step + 1
        self.trainer_waited += begin - self.trainer_free
        now = begin + self.rates.update_s
        if step % self.align.refresh_every == 0 or step == self.steps:
            now += self.rates.publish_s
            self.published.append((step, now))
        if step % trainer.checkpoint_every == 0 or step == self.steps:
            now += self.rates.checkpoint_s
            self.saved += self.rates.checkpoint_s
        self.trainer_step, self.trainer_free = step, now
