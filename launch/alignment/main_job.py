"""The main job, stage by stage: data, base recommender, LLM, not-aligned knowledge, alignment, final recommender.

Every stage leaves its result in the run folder and is skipped when that is there; an interrupted one goes on where it
was. Running the same command again is therefore always right.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pyarrow import parquet

from align.config import TEMPERATURE, MainJob, Stages
from align.order import set_aside, training_data
from align.snapshots import SnapshotStore
from launch import knowledge, supervise, tables
from launch.alignment import summary
from launch.alignment.case_study import case_study
from launch.alignment.check import check
from launch.alignment.precondition import PRECONDITION, is_closed_world, precondition
from llm.fingerprint import fingerprint
from llm.knowledge import count_texts
from llm.pretrain import pretrain
from llm.prompts import NO_TEXT, item_texts
from llm.text_encoder import TextEncoder
from llm.text_items import CatalogTexts
from rec.build import MODEL, build_model
from rec.calibration import fit_temperature
from rec.config import RecConfig
from rec.data.builtin import BUILTIN, prepare_builtin
from rec.data.prepare import META
from rec.data.prepared import Prepared, read_meta
from rec.evaluation import evaluate
from rec.item_encoder import KnowledgeConcat
from rec.models.base import SequenceRecommender
from rec.protocol import Protocol
from rec.runtime import files
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile
from rec.trainer import train

log = logging.getLogger(__name__)

LAUNCHED = "launched"
BEGINS = ("attempt", LAUNCHED)  # of a batch job, and of this


def require_the_same_data(job: MainJob, run: RunFolder) -> None:
    """Raise a UserError if the job's data were prepared anew since ``run`` was begun; a finished run's may be gone."""
    folder = Stages(job.run).data_folder(job.data)
    if (folder / META).exists():
        run.require_the_same_inputs({"data": read_meta(folder)["content_hash"]})


class MainJobRun:
    """One main job in its run folder.

    Args:
        job: the resolved recipe.
    """

    def __init__(self, job: MainJob) -> None:
        self.job, self.stages, self.run = job, Stages(job.run), RunFolder(job.run)
        self.data: Prepared

    def execute(self, command: str, stop_before_alignment: bool = False) -> dict[str, Any] | None:
        """Run every stage that is not done yet.

        Args:
            command: what the user typed; goes into the result.
            stop_before_alignment: leave the alignment to jobs that are started elsewhere.

        Returns:
            The content of ``result.json``, or None when stopped before it.
        """
        with self.run.lock("launcher"):
            self.run.claim(self.job)
            require_the_same_data(self.job, self.run)
            finished = self.run.result()
            if finished is not None:
                log.info("%s is finished; --fresh starts over", self.run.path)
                return finished
            self.run.log(LAUNCHED)
            # Of the trainer that ended: nobody is to look for it, on a host that this one may not even reach.
            self.stages.exchange.unlink(missing_ok=True)
            if not (stop_before_alignment or self._is_aligned()):
                supervise.check_devices(self.job)
            stages: list[tuple[str, Callable[[], None]]] = [
                ("Prepare the data", self.prepare),
                ("Train the base recommender", self.train_base),
                ("Train the LLM", self.train_llm),
                ("Write the not-aligned LLM's knowledge", self.write_na_knowledge),
                ("Train the recommender on it", self.train_na),
                ("Align", self.align),
                ("Write the aligned LLM's knowledge", self.write_final_knowledge),
                ("Finish the recommender on it", self.train_final),
            ]
            for number, (title, stage) in enumerate(stages, start=1):
                if stop_before_alignment and stage == self.align:
                    return None
                log.info("%d/%d %s", number, len(stages), title)
                started = time.monotonic()
                stage()
                self.run.log("stage", step=number, title=title, seconds=round(time.monotonic() - started, 1))
            return self._conclude(command, self.run.worked_s(*BEGINS))

    def prepare(self) -> None:
        """A prepared folder, and every mistake in the recipe that can be seen without training anything."""
        folder = self.stages.data_folder(self.job.data)
        if self.job.data in BUILTIN:
            prepare_builtin(self.job.data, folder)
        self.data = training_data(self.job, Prepared.load(folder))
        check(self.job, self.data)
        named = {"llm.model": self.job.llm.model, "llm.encoder.model": self.job.llm.encoder.model}
        models = {key: fingerprint(name) for key, name in named.items() if name not in (None, "llm")}
        self.run.require_the_same_inputs(models)

    def train_base(self) -> None:
        """The recommender without knowledge; frozen, it is Rec_f, which gives p(y|x)."""
        train(build_model(self.job.rec, self.data), self.data, self.job.rec, RunFolder(self.stages.base), "Base")

    def train_llm(self) -> None:
        """A small LM on the training histories, unless the recipe names a model."""
        if self.job.llm.model is None:
            pretrain(self.data, self.job.llm, RunFolder(self.stages.llm))

    def write_na_knowledge(self) -> None:
        """One text an item, by the original LLM."""
        self._write_knowledge(self.stages.llm_model(self.job.llm), "original", self.stages.na_knowledge)

    def train_na(self) -> None:
        """Base+NA_LLM: the recommender that reads those texts; and both again without the users that are set aside."""
        texts = self._texts(self.stages.na_knowledge)
        train_reading(self.job, self.data, texts, self.stages.na, "Base+NA_LLM")
        align = self.job.align
        if align.reward_users:
            base, na = self.stages.aligning(align)
            kept = self.data.without(set_aside(self.data, align.reward_users, align.trainer.seed))
            title = f"without {align.reward_users:.0%} of the users"
            train(build_model(self.job.rec, kept), kept, self.job.rec, RunFolder(base), f"Base {title}")
            train_reading(self.job, kept, texts, na, f"Base+NA_LLM {title}")
        self._calibrate()
        self._measure_precondition()

    def _calibrate(self) -> None:
        align = self.job.align
        if align.objective.temperature != "calibrated":
            return
        data = self.data.without(set_aside(self.data, align.reward_users, align.trainer.seed))
        for folder in self.stages.aligning(align):
            if not (folder / TEMPERATURE).exists():
                model = SequenceRecommender.from_pretrained(folder / MODEL)
                files.write_json(folder / TEMPERATURE, {"temperature": fit_temperature(model, data)})

    def _measure_precondition(self) -> None:
        """Of a closed world, before the first step: whether there is anything that alignment could learn from."""
        if is_closed_world(self.data) and not self.run.events(PRECONDITION):
            found = precondition(self.job, self.data)
            self.run.log(PRECONDITION, **found)
            log.info("before alignment %s", tables.precondition(found))
            if found["gap"] <= 2 * found["gap_se"]:
                log.warning("the recommender rewards the relevant fact no more than others: there is nothing to learn")

    def align(self) -> None:
        """Algorithm 1, asynchronously: trainer and generator as processes of their own."""
        if not self._is_aligned():
            supervise.align(self.job)
        if not self._is_aligned():
            raise StopFile(self.run.path).stopped("in alignment")

    def _is_aligned(self) -> bool:
        newest = SnapshotStore(self.stages.snapshots).newest()
        return newest is not None and newest.step >= self.job.align.trainer.steps

    def write_final_knowledge(self) -> None:
        """One text an item, by the aligned LLM."""
        newest = SnapshotStore(self.stages.snapshots).newest()
        self._write_knowledge(str(newest.llm), f"v{newest.version}", self.stages.final_knowledge)

    def train_final(self) -> None:
        """Base+SeRALM: the aligned recommender, finished on the aligned LLM's texts, or a new one trained on them."""
        if self.job.align.finish_from == "scratch":
            job = self.job.model_copy(update={"rec": self._finishing})
            train_reading(job, self.data, self._texts(self.stages.final_knowledge), self.stages.final, "Base+SeRALM")
            return
        newest = SnapshotStore(self.stages.snapshots).newest()
        model = SequenceRecommender.from_pretrained(newest.recommender)
        self._finish(model, self.stages.final_knowledge, self.stages.final, "Base+SeRALM")
        # The control: the same last training, from what alignment began with, on the texts that it already had.
        _, before = self.stages.aligning(self.job.align)
        control = SequenceRecommender.from_pretrained(before / MODEL)
        self._finish(control, self.stages.na_knowledge, self.stages.control, "Control")

    def _finish(self, model: SequenceRecommender, texts: Path, folder: Path, title: str) -> None:
        self._texts(texts).tell(model.items)
        train(model, self.data, self._finishing, RunFolder(folder), title)

    @property
    def _finishing(self) -> RecConfig:
        return self.job.rec.model_copy(update={"train": self.job.align.finish})

    def _write_knowledge(self, model: str, version: str, out: Path) -> None:
        if not out.exists():
            data, log_path = self.stages.data_folder(self.job.data), self.run.path / "logs" / "knowledge.log"
            knowledge.generate(self.job.llm, model, version, data, out, log_path)

    def _texts(self, path: Path) -> CatalogTexts:
        """A knowledge file's texts."""
        return catalog_texts(self.job, parquet.read_table(path, columns=["text"])["text"].to_pylist())

    def _row(self, method: str, folder: Path, texts: Path | None = None) -> dict[str, Any]:
        """Test figures of a saved recommender, which reads other ``texts`` than its own if they are given."""
        model = SequenceRecommender.from_pretrained(folder)
        if texts is not None:
            self._texts(texts).tell(model.items)
        metrics = evaluate(model, self.data, "test", self.job.rec.evaluate, trained_on=self.job.rec.train.on)
        told = {"method": method, "model": self.job.rec.model.name, "protocol_hash": self._protocol.hash}
        return {**told, **metrics.summary()}

    @property
    def _protocol(self) -> Protocol:
        return self.job.rec.evaluate.protocol.of_run(self.data, self.job.rec.train.on)

    def _conclude(self, command: str, wall_s: float) -> dict[str, Any]:
        methods = {"Base": self.stages.base, "Base+NA_LLM": self.stages.na}
        if self.job.align.finish_from == "aligned":
            methods["Base+NA_LLM, trained on"] = self.stages.control
        methods["Base+SeRALM"] = self.stages.final
        rows = [self._row(method, folder / MODEL) for method, folder in methods.items()]
        # Fig. 5: one half of the aligned system with the other half of the not-aligned one.
        na, aligned = self.stages.na_knowledge, self.stages.final_knowledge
        ablations = [
            self._row("A_LLM+NA_Rec", self.stages.na / MODEL, aligned),
            self._row("NA_LLM+A_Rec", self.stages.final / MODEL, na),
        ]
        if self.job.align.finish_from == "scratch":
            # The last recommender is a new one: what alignment made of its own is to be seen too.
            left = SnapshotStore(self.stages.snapshots).newest().recommender
            ablations += [
                self._row("A_LLM+A_Rec, as aligned", left, aligned),
                self._row("NA_LLM+A_Rec, as aligned", left, na),
            ]
        # First, because a run with a result is finished.
        summary.draw(self.run, self.stages)
        return self.run.write_result(
            command,
            self.job.identity,
            self._protocol.described(),
            rows,
            wall_s,
            data={"name": self.job.data, **self.data.meta["counts"]},
            ablations=ablations,
            case_study=case_study(self.job, self.data),
            texts=self._text_counts(),
            asynchronous=summary.asynchronous(self.run),
        )

    def _text_counts(self) -> dict[str, Any]:
        """What nothing was skipped for, but nothing could be said of either."""
        titles = item_texts(self.data.items, self.job.llm.item_text)
        return {
            "items_without_text": sum(title == NO_TEXT for title in titles),
            "not_aligned": count_texts(self.stages.na_knowledge),
            "aligned": count_texts(self.stages.final_knowledge),
        }


def catalog_texts(job: MainJob, texts: Sequence[str]) -> CatalogTexts:
    """Texts of all items, those of an item one after the other, with the job's encoder."""
    return CatalogTexts(texts, TextEncoder(Stages(job.run).encoder_model(job.llm), job.llm.encoder))


def train_reading(job: MainJob, data: Prepared, texts: CatalogTexts, folder: Path, title: str) -> None:
    """Train the job's recommender on ``texts``."""
    align = job.align

    def items() -> KnowledgeConcat:
        return texts.items(
            data.n_items,
            job.rec.model.dim,
            on_target=align.knowledge_on_target,
            dropout=align.knowledge_dropout,
            standardise=align.standardise_knowledge,
            id_dropout=align.id_dropout,
        )

    train(build_model(job.rec, data, items), data, job.rec, RunFolder(folder), title)
