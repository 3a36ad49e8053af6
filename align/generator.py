"""The generator job: samples texts with vLLM, scores them with the recommender snapshot, writes the sample log.

``python -m align.generator --config RUN/config.yaml``, in a process of its own. It holds no state of its own: its
place is the first step without a batch, its weights are the newest snapshot. Kill it at any time and start it again.

Where ``align.generator.processes`` are several, each is started with its ``--number``, and they take turns at stretches
of ``batches_per_call`` steps. Nothing passes between them.

Staleness rule (hard, in trainer steps): the batch of step t is generated only under a snapshot made at step
t - max_lag_steps or later. Where the newest one is older, the generator waits; nothing is ever dropped.
"""

import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from align.config import AlignConfig, MainJob, Stages
from align.order import StepOrder, Task, Turns, training_data
from align.samples import Other, Sample, SampleLog, Text
from align.scoring import log_p_y_given_xs, make_inputs, pad_histories
from align.snapshots import CANARY_TOKENS, Snapshot, SnapshotStore
from align.start import generator_role, read_arguments
from align.transfer import Taker, TransferFailed
from llm.engine import Engine
from llm.prompts import item_texts, prompt_tokens
from llm.text_encoder import TextEncoder
from llm.text_items import reader_of
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)


def last_step_allowed(snapshot_step: int, max_lag_steps: int) -> int:
    """The newest step whose batch may be generated under a snapshot of ``snapshot_step``."""
    return snapshot_step + max_lag_steps


@dataclass(frozen=True)
class Sources:
    """What stays the same for the whole run: data, prompts, the frozen recommender, the text encoder."""

    data: Prepared
    prompts: list[list[int]]
    order: StepOrder
    base: SequenceRecommender
    encoder: TextEncoder
    temperatures: tuple[float, float]


class Generator:
    """The generator's loop.

    Args:
        job: the recipe; its earlier stages (base recommender, LLM, not-aligned recommender) are finished.
        number: which of the run's generators it is, from 0.
    """

    def __init__(self, job: MainJob, number: int = 0) -> None:
        generator = job.align.generator
        self.turns = Turns(number, generator.processes, generator.batches_per_call)
        self.job, self.stages, self.run = job, Stages(job.run), RunFolder(job.run)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stages, llm, trainer = self.stages, job.llm, job.align.trainer
        data = training_data(job, Prepared.load(stages.data_folder(job.data)))
        frozen, _ = stages.aligning(job.align)
        base = SequenceRecommender.from_pretrained(frozen / "model").to(self.device)
        tokenizer = load_tokenizer(stages.llm_model(llm))
        prompts = prompt_tokens(item_texts(data.items, llm.item_text), llm.knowledge.prompt, tokenizer)
        self.sources = Sources(
            data,
            prompts,
            StepOrder(data, job.align.reward_users, base.reach, trainer.batch_size, trainer.seed),
            base,
            TextEncoder(stages.encoder_model(llm), llm.encoder),
            stages.temperatures(job.align),
        )
        self.store, self.log = SnapshotStore(stages.snapshots), SampleLog(stages.samples)
        by, timeout_s = job.align.weights, job.align.wait_timeout_s
        self.taker = None if by == "files" else Taker(stages.exchange, by, timeout_s)
        self.stop = StopFile(job.run)
        # vLLM generates one token after the canary that it scores.
        self.longest = max(max(map(len, prompts)) + llm.knowledge.max_new_tokens, CANARY_TOKENS + 1)
        self.engine: Engine | None = None
        self.snapshot: Snapshot | None = None
        self.recommender: SequenceRecommender | None = None
        self.newest: dict[int, str] = {}

    def loop(self) -> None:
        """Generate until every step of the run has its batch."""
        align = self.job.align
        lora = align.trainer.lora
        step = self.log.next_step(self.turns.has)
        if step >= align.trainer.steps:
            log.info("all of its batches are written already")
            return
        self._stop_if_asked(step)
        self.engine = Engine(
            self.stages.llm_model(self.job.llm), self.job.llm.engine, self.longest, lora_rank=lora.rank if lora else 0
        )
        waited = 0.0
        while (step := self.log.next_step(self.turns.has)) < align.trainer.steps:
            waited += self._refresh(step)
            last = min(
                self.turns.end(step) - 1,
                last_step_allowed(self.snapshot.step, align.max_lag_steps),
                align.trainer.steps - 1,
            )
            self._generate(range(step, last + 1), waited)
            waited = 0.0
        log.info("all %d batches are written", align.trainer.steps)

    def _refresh(self, step: int) -> float:
        """Load the newest snapshot if there is a newer one, waiting where ``step`` needs it; seconds waited."""
        begin, loading, align = time.monotonic(), 0.0, self.job.align
        seen, alive = self.run.last_logged(), begin
        while True:
            self._stop_if_asked(step)
            if (newer := self._newer()) is not None:
                loading += self._load(newer)
            if self.snapshot and self.snapshot.step > step:
                raise UserError(
                    f"{self.log.path_of(step)} is gone, and the newest weights, of step {self.snapshot.step}, are too"
                    " new to write it again: bring it back, or start over with --fresh"
                )
            waited = time.monotonic() - begin - loading
            if self.snapshot and step <= last_step_allowed(self.snapshot.step, align.max_lag_steps):
                return waited
            if (logged := self.run.last_logged()) != seen:  # the trainer gets on, however slow its steps are
                seen, alive = logged, time.monotonic()
            if time.monotonic() - alive > align.wait_timeout_s:
                raise TimeoutError(
                    f"waited {align.wait_timeout_s:.0f} s, in which the trainer logged nothing, for a snapshot of step"
                    f" {max(0, step - align.max_lag_steps)} or later in {self.store.folder}"
                )
            time.sleep(0.02)

    def _newer(self) -> Snapshot | None:
        """The newest snapshot that can be loaded, if it is newer than what is."""
        own = -1 if self.snapshot is None else self.snapshot.version
        found = self.store.newest(after=own)
        if found is None or found.whole:
            return found
        held = -1 if self.taker is None else self.taker.held()
        return self.store.get(held) if held > own else self.store.newest(after=own, whole=True)

    def _stop_if_asked(self, step: int) -> None:
        if self.stop.seen():
            raise self.stop.stopped(f"before the batch of step {step}")

    def _load(self, snapshot: Snapshot) -> float:
        """Swap both models, then prove by the canary that vLLM computes what the trainer computed.

        Returns:
            Seconds it took; 0 if the weights did not come.
        """
        begin = time.monotonic()
        try:
            snapshot = self._load_llm(snapshot)
        except TransferFailed as error:
            log.warning("%s", error)
            return 0.0
        self.recommender = SequenceRecommender.from_pretrained(snapshot.recommender).to(self.device)
        started_anew = self.snapshot is None
        self.snapshot, self.newest = snapshot, {}
        if started_anew and self.job.align.others == "newest":
            self._remember_what_was_said()
        load_s = time.monotonic() - begin
        scored = self.engine.logprobs_of(snapshot.canary_tokens)
        differences = [abs(ours - theirs) for ours, theirs in zip(scored, snapshot.canary_logprobs, strict=True)]
        difference = math.nan if any(map(math.isnan, differences)) else max(differences)
        self.run.log(
            "refresh",
            step=snapshot.version,
            version=snapshot.version,
            version_step=snapshot.step,
            load_s=round(load_s, 4),
            canary_s=round(time.monotonic() - begin - load_s, 4),
            canary_max_difference=difference,
        )
        if not difference <= self.job.llm.engine.canary_tolerance:
            raise RuntimeError(
                f"vLLM's log-probs of the canary differ from the trainer's by {difference:.2g} nats after loading"
                f" {snapshot.folder} (allowed: {self.job.llm.engine.canary_tolerance:g})"
            )
        return time.monotonic() - begin

    def _remember_what_was_said(self) -> None:
        """What a predecessor has written under the same weights."""
        by = self.snapshot.version, self.snapshot.step
        for step in range(self.snapshot.step, self.log.next_step()):
            self._remember([one for one in self.log.read(step) if (one.version, one.version_step) == by])

    def _load_llm(self, snapshot: Snapshot) -> Snapshot:
        """Swap the LLM; returns the snapshot that it is of: what the trainer gives may be newer than what was seen."""
        if snapshot.whole:
            self.engine.load_weights(snapshot.llm, f"v{snapshot.version}")
            return snapshot
        version, weights = self.taker.take()
        if (given := self.store.get(version)) is None:
            raise TransferFailed(f"the weights of snapshot {version} came, but it is not in {self.store.folder}")
        self.engine.load_tensors(weights, f"v{version}")
        return given

    def _generate(self, steps: range, waited_s: float) -> None:
        """Sample, score and write the batches of ``steps`` with one vLLM call."""
        begin = time.monotonic()
        wanted = [self._wanted(step, task) for step in steps for task in self.sources.order.tasks(step)]
        # A text that several histories share is asked for once.
        asked = {seed: item for one in wanted for draw in one.seeds for seed, item in zip(draw, one.fresh, strict=True)}
        completions = self.engine.generate(
            [self.sources.prompts[item - 1] for item in asked.values()],
            list(asked),
            self.job.llm.knowledge.max_new_tokens,
        )
        generated_s = time.monotonic() - begin
        texts = {
            seed: Text(seed, completion.token_ids, completion.logprobs, completion.text.strip())
            for seed, completion in zip(asked, completions, strict=True)
        }
        samples = self._scored([self._sample(one, texts) for one in wanted])
        if self.job.align.others == "newest":
            self._remember(samples)
        per_step = len(samples) // len(steps)
        for nth, step in enumerate(steps):
            self.log.append(step, samples[nth * per_step : (nth + 1) * per_step])
        self.run.log(
            "generated",
            step=steps.start,
            generator=self.turns.number,
            batches=len(steps),
            version=self.snapshot.version,
            texts=len(completions),
            tokens=sum(len(completion.token_ids) for completion in completions),
            empty_texts=sum(not text.text for text in texts.values()),
            cut_texts=sum(completion.cut for completion in completions),
            generate_s=round(generated_s, 4),
            busy_s=round(time.monotonic() - begin, 4),
            waited_s=round(waited_s, 4),
        )

    def _wanted(self, step: int, task: Task) -> "Wanted":
        """What is to be generated for one sample: the same however often the generator is restarted."""
        align, items = self.job.align, task.pair.items
        places = fresh_places(align, len(items), hash_of([align.trainer.seed, "places", task.ordinal]))
        fresh = [items[place] for place in places]

        def seed(nth: int, item: int, draw: int) -> int:
            of = ["shared", step, item, draw] if align.share_texts else [task.ordinal, nth, draw]
            return int(hash_of([align.trainer.seed, *of])[:15], 16)

        draws = align.objective.samples if task.rewards else 1
        seeds = [[seed(nth, item, draw) for nth, item in enumerate(fresh)] for draw in range(draws)]
        return Wanted(task, places, fresh, seeds)

    def _remember(self, samples: Sequence[Sample]) -> None:
        """What the present version said last of each item."""
        for sample in samples:
            for draw in sample.draws:
                fresh = (sample.items[place] for place in sample.places)
                self.newest.update(zip(fresh, (text.text for text in draw), strict=True))

    def _sample(self, wanted: "Wanted", texts: dict[int, Text]) -> Sample:
        """The sample without its scores."""
        return Sample(
            ordinal=wanted.task.ordinal,
            user=wanted.task.pair.user,
            items=wanted.task.pair.items,
            target=wanted.task.pair.target,
            rewards=wanted.task.rewards,
            fits=wanted.task.fits,
            places=wanted.places,
            prompts=[self.sources.prompts[item - 1] for item in wanted.fresh],
            draws=[[texts[seed] for seed in draw] for draw in wanted.seeds],
            others=[
                Other(place, self.newest[item])
                for place, item in enumerate(wanted.task.pair.items)
                if item in self.newest and place not in wanted.places
            ],
            log_p_y_given_xs=[],
            log_p_y_given_x=0.0,
            version=self.snapshot.version,
            version_step=self.snapshot.step,
        )

    @torch.no_grad()
    def _scored(self, samples: list[Sample]) -> list[Sample]:
        """The samples with p(y|x,s) of the snapshot's recommender and p(y|x) of the frozen one."""
        read = reader_of(self.recommender.items, self.sources.encoder)
        inputs = make_inputs(samples, read).to(self.device)
        frozen, reading = self.sources.temperatures
        with_text = log_p_y_given_xs(self.recommender, inputs, reading).split([len(sample.draws) for sample in samples])
        items, lengths = pad_histories([sample.items for sample in samples])
        targets = torch.tensor([sample.target for sample in samples])
        pairs = (value.to(self.device) for value in (items, lengths, targets))
        without = self.sources.base.log_likelihood(*pairs, temperature=frozen).tolist()
        self._refuse_no_numbers(torch.cat(with_text).tolist(), without)
        scores = zip(samples, with_text, without, strict=True)
        return [replace(sample, log_p_y_given_xs=own.tolist(), log_p_y_given_x=base) for sample, own, base in scores]

    def _refuse_no_numbers(self, with_text: list[float], without: list[float]) -> None:
        for name, values, whose, remedy in (
            ("p(y|x,s)", with_text, str(self.snapshot.folder), "align.trainer.rec_lr"),
            ("p(y|x)", without, "the frozen recommender", "rec.train.lr"),
        ):
            bad = sum(not math.isfinite(value) for value in values)
            if bad:
                raise UserError(
                    f"log {name} is no number for {bad} of {len(values)} texts under {whose}: the recommender has"
                    f" diverged; start over with a lower {remedy}"
                )


@dataclass(frozen=True)
class Wanted:
    """Which texts a sample needs: the ``places`` and items that are ``fresh`` [n], and the texts' ``seeds`` [k][n]."""

    task: Task
    places: list[int]
    fresh: list[int]
    seeds: list[list[int]]


def fresh_places(align: AlignConfig, length: int, seed: str) -> list[int]:
    """Which of ``length`` history items get fresh texts, ascending."""
    if align.fresh == "all":
        return list(range(length))
    count = min(align.fresh_items, length)
    if align.fresh == "last":
        return list(range(length - count, length))
    return sorted(random.Random(seed).sample(range(length), count))


def main() -> None:
    """Entry of the generator process."""
    job, arguments = read_arguments(__doc__, generator=True)
    number, several = arguments.number, job.align.generator.processes
    if not 0 <= number < several:
        raise UserError(f"--number {number} is none of align.generator.processes {several}, which count from 0")
    with RunFolder(job.run).lock(generator_role(number), wait_s=30):
        Generator(job, number).loop()


if __name__ == "__main__":
    run_main(main, "generator")
