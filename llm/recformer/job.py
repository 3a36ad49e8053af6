"""The recipe of a RECFORMER, and where its stages lie in the run folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from llm.config import LLMConfig
from llm.fingerprint import fingerprint
from llm.recformer.config import RecformerSettings
from llm.recformer.model import resolve
from rec.data.builtin import BUILTIN, prepare_builtin
from rec.data.prepared import Prepared
from rec.runtime import files
from rec.runtime.config import Section, hash_of, load
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import run_override

Stage = Literal["vanilla", "PT", "FT"]
FINISHED = "finished.json"


class RecformerJob(Section):
    """A recipe with an ``llm.recformer`` section."""

    placement: ClassVar[tuple[str, ...]] = ("llm.recformer.processes",)

    data: str
    """The prepared folder, or built-in data set, that is fine-tuned on; and pretrained on if no sources are named."""
    run: Path
    """The run folder."""
    llm: LLMConfig

    @model_validator(mode="after")
    def _has_recformer(self) -> Self:
        if self.llm.recformer is None:
            raise ValueError("llm.recformer is missing: without it a recipe is not a RECFORMER's")
        return self

    @property
    def settings(self) -> RecformerSettings:
        """The ``llm.recformer`` section."""
        return self.llm.recformer

    @property
    def tokens(self) -> Path:
        """Where tokenised catalogs are kept."""
        return self.run / "tokens"

    @property
    def pretrain_folder(self) -> Path:
        """Of stage-PT."""
        return self.run / "pretrain"

    @property
    def finetune_folder(self) -> Path:
        """Of stage-FT1 and stage-FT2."""
        return self.run / "finetune"

    def identity(self, stage: Literal["pretrain", "finetune"]) -> str:
        """A hash of everything that decides a stage's result: not where the run lies, nor the other stage alone."""
        content = self.settings.model_dump(mode="json", exclude={"processes", "zero_stage"})
        if stage == "pretrain":
            content.pop("finetune")
        return hash_of(content)

    def finished(self, stage: Literal["pretrain", "finetune"]) -> list[Path]:
        """The folders of a stage that are finished: one of stage-PT, FT1's and FT2's. Every rank calls this.

        Raises:
            UserError: if one was trained on other data, or began with another backbone, than there is now.
        """
        folders = [self.pretrain_folder]
        if stage == "finetune":
            folders = [self.finetune_folder / name for name in ("FT1", "FT2")]
        found = [folder for folder in folders if (folder / FINISHED).exists()]
        sources = self.settings.pretrain.sources if stage == "pretrain" else []
        now = self.inputs([self.open(name) for name in sources or [self.data]]) if found else {}
        for folder in found:
            facts = files.read_json(folder / FINISHED)
            for name, what in (("data_hash", "on other data"), ("backbone_hash", "from another backbone")):
                if facts.get(name) != now[name]:
                    raise UserError(f"{folder} was trained {what} than there is now: delete it and all made of it")
        return found

    def inputs(self, data: Sequence[Prepared]) -> dict[str, str]:
        """Hashes of what a stage that is trained on ``data`` reads, beside its recipe. Every rank calls this."""
        backbone = Ranks.current().from_first(lambda: fingerprint(resolve(self.settings.backbone)))
        return {"data_hash": " ".join(own.meta["content_hash"] for own in data), "backbone_hash": backbone}

    def open(self, name: str) -> Prepared:
        """A prepared folder; a built-in data set is prepared in the run folder first. Every rank calls this."""
        if name not in BUILTIN:
            return Prepared.load(Path(name))
        folder, ranks = self.run / "data" / name, Ranks.current()
        if ranks.is_first:
            prepare_builtin(name, folder)
        ranks.barrier()
        return Prepared.load(folder)


def load_job(path: Path, overrides: Sequence[str] = ()) -> RecformerJob:
    """Read a recipe; the ``config.yaml`` of a run folder means that folder, wherever it lies now.

    Raises:
        UserError: on a missing file, an unknown key or an impossible value.
    """
    return load(RecformerJob, path, [*run_override(path), *overrides])
