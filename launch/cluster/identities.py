"""What the checkpoints of every stage of a run must have been written with to be resumed, read off the run's recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from align.config import MainJob, Stages
from llm.lmrec_job import LMRecJob, is_recformer
from llm.mixture import Source
from llm.recformer.job import RecformerJob
from rec.data.builtin import BUILTIN
from rec.data.prepared import META, read_meta
from rec.job import RecJob, grid_of
from rec.runtime.config import build, hash_of, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG


@dataclass(frozen=True)
class Identity:
    """Of one stage: the hash of what it does, the prepared folders that it reads, and what makes one hash of theirs."""

    config_hash: str
    data: tuple[Path, ...]
    combine: Callable[[list[str]], str] = " ".join

    def differences(self, meta: dict[str, str]) -> list[str]:
        """What of a checkpoint's recipe and data is another now."""
        found = []
        if "config_hash" in meta and meta["config_hash"] != self.config_hash:
            found.append(f"another recipe ({meta['config_hash']}, now {self.config_hash})")
        gone = [str(folder) for folder in self.data if not (folder / META).is_file()]
        if gone:
            return [*found, f"data that is gone ({', '.join(gone)})"]
        now = self.combine([read_meta(folder)["content_hash"] for folder in self.data])
        if "data_hash" in meta and meta["data_hash"] != now:
            found.append(f"other data ({meta['data_hash']}, now {now} in {', '.join(map(str, self.data))})")
        return found


def identities(run: Path) -> dict[Path, Identity]:
    """Of every stage that the recipe of a run may have, by its folder."""
    content = read_recipe(run / CONFIG)
    if "align" in content:
        return _of_alignment(run, build(MainJob, content))
    if "pretrain" in content or "job" in content or "targets" in content or "probe" in content.get("llm", {}):
        raise UserError(
            f"{run} is a study's or a probe's: it has no checkpoints; name a run folder inside, if it has any"
        )
    if "llm" not in content:
        return _of_recommender(run, build(RecJob, content))
    if is_recformer(content):
        return _of_recformer(run, build(RecformerJob, content))
    return {run: _of_lmrec(run, build(LMRecJob, content))}


def _of_alignment(run: Path, job: MainJob) -> dict[Path, Identity]:
    stages, data = Stages(run), (Stages(run).data_folder(job.data),)
    trained, finished = (
        Identity(hash_of(job.rec.model_copy(update=update)), data) for update in ({}, {"train": job.align.finish})
    )
    without = stages.without_reward_users
    return {
        run: Identity(job.identity, data),
        stages.llm: Identity(hash_of(job.llm), data),
        **dict.fromkeys((stages.base, stages.na, without / "base", without / "na"), trained),
        **dict.fromkeys((stages.final, stages.control), finished),
    }


def _of_recommender(run: Path, job: RecJob) -> dict[Path, Identity]:
    data = (_prepared(job.data, run / "data"),)
    grid = {run / "grid" / name: Identity(hash_of(rec), data) for name, rec in grid_of(job.rec).items()}
    return {run: Identity(hash_of(job.rec), data), **grid}


def _of_recformer(run: Path, job: RecformerJob) -> dict[Path, Identity]:
    def folder(name: str) -> Path:
        return _prepared(name, run / "data" / name)

    tuned = Identity(job.identity("finetune"), (folder(job.data),))
    found = {run / job.finetune_folder.relative_to(job.run) / stage: tuned for stage in ("FT1", "FT2")}
    if job.settings.pretrain is not None:
        sources = tuple(map(folder, job.settings.pretrain.sources or [job.data]))
        found[run / job.pretrain_folder.relative_to(job.run)] = Identity(job.identity("pretrain"), sources)
    return found


def _of_lmrec(run: Path, job: LMRecJob) -> Identity:
    agnostic = job.llm.corpus.agnostic
    names = [job.data, *(task.data for task in job.llm.tasks.values())]
    prepared = [_prepared(name, run / "data") for name in names]
    prepared += [Path(source.data) for source in agnostic if source.data is not None]

    def combine(hashes: list[str]) -> str:
        return hash_of([hashes, [Source(source).texts for source in agnostic if source.data is None]])

    return Identity(job.identity, tuple(prepared), combine)


def _prepared(name: str, own: Path) -> Path:
    return own if name in BUILTIN else Path(name)
