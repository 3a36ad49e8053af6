"""The trainer job: Algorithm 1's updates of the LLM and the recommender, on samples in the order of the log.

``accelerate launch --config_file launch/accelerate/cpu.yaml -m align.trainer --config RUN/config.yaml``

The trainer is a deterministic function of (initial weights, seed, sample log). It publishes snapshot 0 before its
first step, then one every ``refresh_every`` steps, and the last one after its last step. With ``--replay-into DIR`` it
reads the sample log of a finished run and writes all of its own into DIR: what it publishes there last is, on CPU, bit
for bit what it published then.
"""

import contextlib
import logging
import math
import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from torch import Tensor

from align.config import MainJob, Stages
from align.figures import (
    Arrivals,
    first_no_number,
    lag_figures,
    means,
    policy_figures,
    reward_figures,
    text_figures,
)
from align.objective import reward_weights, scaled
from align.policy import Policy, deepspeed_config
from align.reader import Reader
from align.samples import Sample, SampleLog
from align.snapshots import CANARY_TOKENS, LLM, RECOMMENDER, SnapshotStore
from align.start import read_arguments
from align.transfer import Giver
from align.watch import Watch
from llm.knowledge import first_texts
from llm.launched import require_processes, use_own_ninja
from llm.prompts import item_texts, prompt_tokens
from llm.text_encoder import TextEncoder
from llm.text_items import CatalogTexts, TrainedText, reader_of
from llm.tokenizer import load_tokenizer
from rec.build import MODEL
from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks, left_together, lost_contact_is_named, use_own_gpu
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)


def make_accelerator(job: MainJob) -> Accelerator:
    """The process group and DeepSpeed: gloo on CPU, NCCL on GPU.

    Raises:
        UserError: if another number of processes was started than the recipe says (a run may go on with another one,
            but then the recipe says so: the batch is divided by it), or the launcher's file names a
            DeepSpeed configuration, which would not be used.
    """
    if other := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(
            f"the ZeRO stage is the recipe's (align.trainer.zero_stage): take deepspeed_config_file {other} out of what"
            " accelerate launch is given"
        )
    use_own_ninja()
    on_gpu = torch.cuda.is_available()
    group = InitProcessGroupKwargs(
        # Named on CPU: without it every process would believe that it is alone.
        backend=None if on_gpu else "gloo",
        timeout=timedelta(seconds=job.align.wait_timeout_s + 60),
    )
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(job.align.trainer)),
        mixed_precision="bf16" if job.align.trainer.bf16 else "no",
        kwargs_handlers=[group],
    )
    require_processes("align.trainer.processes", job.align.trainer.processes, accelerator.num_processes)
    return accelerator


class Trainer:
    """The trainer's loop; one instance a rank.

    Args:
        job: the recipe; its earlier stages are finished.
        into: the folder of checkpoints, snapshots and metrics, if not the run's own.
    """

    def __init__(self, job: MainJob, into: Path | None = None) -> None:
        self.job, self.stages = job, Stages(job.run)
        own = Stages(into or job.run)
        self.run = RunFolder(own.run)
        align, original = job.align, self.stages.llm_model(job.llm)
        use_own_gpu()
        # Before the accelerator: under ZeRO-3 it makes transformers shard whatever is loaded from then on.
        encoder = TextEncoder(self.stages.encoder_model(job.llm), job.llm.encoder)
        _, reading = self.stages.aligning(align)
        recommender = SequenceRecommender.from_pretrained(reading / MODEL)
        self.accelerator = make_accelerator(job)
        self.ranks = Ranks.current()
        torch.manual_seed(align.trainer.seed)
        data = Prepared.load(self.stages.data_folder(job.data))
        self.tokenizer = load_tokenizer(original)
        self.policy = Policy(original, align, self.accelerator)
        encoder.to(self.accelerator.device)
        recommender.to(self.accelerator.device)
        if isinstance(recommender.items, TrainedText):  # to encode them again when its encoder has changed
            CatalogTexts(first_texts(self.stages.na_knowledge), encoder).tell(recommender.items)
        self.reader = Reader(
            recommender,
            reader_of(recommender.items, encoder),
            align.trainer.rec_lr,
            self.accelerator.device,
            distributed=self.ranks.size > 1,
            temperature=self.stages.temperatures(align)[1],
        )
        self.store = SnapshotStore(own.snapshots, align.trainer.keep_snapshots or align.snapshots_in_use)
        self.log = SampleLog(self.stages.samples)
        # A replay has no generator.
        self.in_files = align.weights == "files" or into is not None
        self.giver = None if self.in_files or not self.ranks.is_first else Giver(own.exchange, align.weights)
        keep = align.trainer.keep_checkpoints, align.trainer.keep_checkpoint_every
        self.checkpoints = Checkpoints(own.checkpoints, self.ranks, *keep)
        self.stop, self.arrivals = StopFile(own.run), Arrivals()
        self.meta = {"config_hash": job.identity, "data_hash": data.meta["content_hash"]}
        texts = item_texts(data.items.slice(0, 1), job.llm.item_text)
        self.watch = Watch(align.watch, data.items)
        self.canary = self._canary(prompt_tokens(texts, job.llm.knowledge.prompt, self.tokenizer)[0])

    def loop(self) -> None:
        """Train to the last step, from the newest complete checkpoint if there is one."""
        align, begin = self.job.align, time.monotonic()
        step = self._resume()
        self._publish_what_is_needed(step)
        with progress("Align", align.trainer.steps, self.ranks.is_first) as advance:
            while step < align.trainer.steps:
                waited = self._wait_for(step)
                if waited is None:
                    self._save_if_new(step)
                    raise self.stop.stopped(f"after step {step}")
                started = time.monotonic()
                row = self._update(step)
                if self.ranks.is_first:
                    # Before anything is saved: a step that no checkpoint holds runs again, and writes its row again.
                    row |= {"waited_s": round(waited, 4), "busy_s": round(time.monotonic() - started, 4)}
                    self.run.log("train", step=step, **row)
                    advance(step + 1, f"reward {row['reward']:.3f}  KL {row['kl']:.3f}  lag {row['lag_steps']}")
                step += 1
                if step % align.refresh_every == 0 or step == align.trainer.steps:
                    self._publish(step)
                if step % align.trainer.checkpoint_every == 0 or step == align.trainer.steps:
                    self._save_if_new(step)
        log.info("rank %d: %d steps, %.0f s", self.ranks.rank, step, time.monotonic() - begin)

    def _publish_what_is_needed(self, step: int) -> None:
        """What the generator cannot go on without, if a kill or damage took it: beginning at ``step``."""
        align = self.job.align
        if step % align.refresh_every == 0 or step == align.trainer.steps:
            self._publish(step)
            return
        newest = self.store.newest(whole=True) if self.ranks.is_first else None
        lost = newest is None or newest.step < step - align.max_lag_steps
        if self.ranks.broadcast(lost):
            self._publish(step, on_schedule=False)

    def _save_if_new(self, step: int) -> None:
        """Write the checkpoint of ``step``, unless it is there or nothing has happened yet."""
        begin = time.monotonic()
        if not step or self.checkpoints.holds(step):
            return
        self.checkpoints.save(step, {"reader": self.reader.state()}, self.meta, self.policy.save)
        if self.ranks.is_first:
            self.run.log("saved", step=step, save_s=round(time.monotonic() - begin, 4))

    def _resume(self) -> int:
        """Restore the newest complete checkpoint; returns the steps that it had finished."""
        if self.ranks.is_first:
            self.run.log(
                "trainer_started",
                engine=type(self.policy.engine).__name__,
                zero_stage=self.policy.stage,
                world_size=self.ranks.size,
                backend=torch.distributed.get_backend(),
            )
        found = self.checkpoints.resume(self.meta, replicated=True)
        if found is None:
            return 0
        checkpoint, saved = found
        self.policy.load(checkpoint.folder, checkpoint.world_size)
        self.reader.load_state(saved["reader"])
        log.info("resuming after step %d", checkpoint.step)
        return checkpoint.step

    def _wait_for(self, step: int) -> float | None:
        """Rank 0 waits for the batch of ``step`` and tells the others; seconds waited, None if the run is to stop."""
        outcome: float | str | None = 0.0
        if self.ranks.is_first:
            try:
                outcome = self.log.wait(step, self.job.align.wait_timeout_s, self._give_and_look)
            except TimeoutError as error:
                outcome = str(error)
        outcome = self.ranks.broadcast(outcome)
        if isinstance(outcome, str):
            raise TimeoutError(outcome)
        if outcome is not None and not self.ranks.is_first:
            self.log.wait(step, self.job.align.wait_timeout_s)  # another node may see it later
        return outcome

    def _give_and_look(self) -> bool:
        """What rank 0 does between two looks for a batch: give weights to whoever asks; whether to stop."""
        for row in self.giver.serve() if self.giver else ():
            self.run.log("given", step=row["version"], **row)
        return self.stop.seen()

    def _update(self, step: int) -> dict[str, float]:
        """One iteration of Algorithm 1's lines 5 and 6; returns the step's figures, the same on every rank."""
        samples = self.log.read(step)
        self._refuse_wrong_age(step, samples)
        queue = self._queue_figures(step)
        # Dropout is a function of (seed, step, rank), so a resumed run draws the same.
        torch.manual_seed(int(hash_of([self.job.align.trainer.seed, step, self.ranks.rank])[:15], 16))
        rewarding = [sample for sample in samples if sample.rewards]
        with_text = torch.tensor([sample.log_p_y_given_xs for sample in rewarding])
        without = torch.tensor([sample.log_p_y_given_x for sample in rewarding])
        weights = self._reward_weights(step, rewarding, with_text, without)
        share = self.job.align.trainer.batch_size // self.ranks.size
        mine = slice(self.ranks.rank * share, (self.ranks.rank + 1) * share)
        loss, of_texts, of_draws = self.policy.update(step, rewarding[mine], weights[mine])
        of_reader = self.reader.update([sample for sample in samples if sample.fits][mine], rewarding[mine])
        own = {"policy_loss": loss, **of_reader}
        every, texts, draws = zip(*self.ranks.gather((own, of_texts, of_draws)), strict=True)
        figures = means(every)
        for name, rate in (("policy_loss", "align.trainer.lr"), ("rec_loss", "align.trainer.rec_lr")):
            if not math.isfinite(figures[name]):
                raise UserError(f"{name} is {figures[name]} at step {step}: start over with a lower {rate}")
        return {
            **figures,
            **policy_figures(texts, draws),
            **reward_figures(with_text, without),
            **self.watch.figures(rewarding),
            **lag_figures(samples, step, self.job.align.refresh_every),
            **queue,
            **text_figures(samples),
        }

    def _reward_weights(self, step: int, rewarding: list[Sample], with_text: Tensor, without: Tensor) -> Tensor:
        """[B, k] of the whole batch, which every rank can read: a baseline may need it."""
        objective = self.job.align.objective
        of_ratios = partial(
            reward_weights, with_text, without, max_ratio=objective.max_ratio, denominator=objective.denominator
        )
        weights = of_ratios(objective.baseline)
        if objective.scale_rewards:
            weights = scaled(weights)
        if first_no_number(weights) is not None:
            # One bad ratio spoils all that a baseline over pairs compares with it.
            without_baseline = first_no_number(of_ratios("none"))
            bad = first_no_number(weights) if without_baseline is None else without_baseline
            raise UserError(
                f"the reward of sample {rewarding[bad].ordinal} in {self.log.path_of(step)} is {weights[bad].tolist()}:"
                " set align.objective.max_ratio, or start over with a lower align.trainer.rec_lr"
            )
        return weights

    def _refuse_wrong_age(self, step: int, samples: list[Sample]) -> None:
        lags = [step - sample.version_step for sample in samples]
        if max(lags) > self.job.align.max_lag_steps:
            raise RuntimeError(
                f"step {step} got a sample {max(lags)} steps old, the bound is {self.job.align.max_lag_steps}"
            )
        if min(lags) < 0:
            raise UserError(
                f"{self.log.path_of(step)} is by weights of step {step - min(lags)}, which did not exist yet: it was"
                " deleted and written anew; bring back the old one, or start over with --fresh"
            )

    def _queue_figures(self, step: int) -> dict[str, int]:
        """Batches that lie ready behind this one, and how long this one has."""
        if not self.ranks.is_first:
            return {}
        known = self.arrivals.known_until(step + 1)
        queued = known + self.log.ready_from(known) - (step + 1)
        self.arrivals.see(step, queued)
        return {"queued": queued, "lag_in_queue": self.arrivals.steps_in_queue(step)}

    def _publish(self, step: int, on_schedule: bool = True) -> None:
        """Publish both models as they are after ``step`` steps, unless they are; every rank takes part.

        A publication that is not ``on_schedule`` stands in for the last one that was, which is lost.
        """
        begin, every = time.monotonic(), self.job.align.refresh_every
        if on_schedule:  # the vectors of stored texts are part of what is trained on: at no other time may they change
            self.reader.refresh()
        is_last = step == self.job.align.trainer.steps
        version = -(-step // every) if is_last else step // every
        if self.ranks.broadcast(self.ranks.is_first and self.store.holds(version, step)):
            return
        canary_logprobs = self.policy.logprobs_of(self.canary)
        if not all(map(math.isfinite, canary_logprobs)):  # the same on every rank
            raise UserError(f"the LLM is no numbers after step {step - 1}: start over with a lower align.trainer.lr")
        weights, whole = self.policy.gathered_weights(), self.in_files or is_last
        # Nothing is written where a snapshot of these weights is there already, without an LLM: they alone were lost.
        seconds = {"gather_s": time.monotonic() - begin, "write_s": 0.0}

        def write(folder: Path) -> None:
            started = time.monotonic()
            if whole:
                self.policy.save_pretrained(folder / LLM, weights)
                self.tokenizer.save_pretrained(folder / LLM)
            self.reader.save_pretrained(folder / RECOMMENDER)
            seconds["write_s"] = time.monotonic() - started

        if self.ranks.is_first:
            self.store.publish(version, step, write, self.canary, canary_logprobs, whole)
            if not whole:
                self.giver.hold(version, self.policy.as_in_files(weights))
        self.ranks.barrier()
        if self.ranks.is_first:
            seconds["publish_s"] = time.monotonic() - begin
            # Hashes, flushing to disk, pruning.
            seconds["hash_s"] = seconds["publish_s"] - seconds["gather_s"] - seconds["write_s"]
            rounded = {name: round(value, 4) for name, value in seconds.items()}
            self.run.log("published", step=version, version=version, version_step=step, **rounded)

    def _canary(self, prompt: list[int]) -> list[int]:
        """A fixed text: the first item's prompt, repeated to a fair length, or cut to it."""
        return (prompt * CANARY_TOKENS)[:CANARY_TOKENS]


def main() -> None:
    """Entry of every trainer rank."""
    job, arguments = read_arguments(__doc__, replay=True)
    into = arguments.replay_into
    first = int(os.environ.get("RANK", "0")) == 0
    # A predecessor that is being killed may hold the lock a little longer.
    lock = RunFolder(into or job.run).lock("trainer", wait_s=30) if first else contextlib.nullcontext()
    with lost_contact_is_named(), lock, left_together():
        Trainer(job, into).loop()


if __name__ == "__main__":
    run_main(main, "trainer")
