"""The recipe of the Elephant's study."""

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from llm.recformer.config import RecformerSettings
from rec.config import RecConfig
from rec.protocol import PRESETS
from rec.runtime.config import Section

OWN = ("vanilla", "PT", "FT")
RANDOM, START = "random", "frozen FT"
FURTHER: dict[str, Literal["all", "items"]] = {"further all": "all", "further items": "items"}
TABLE_3 = [RANDOM, *(f"{how} {what}" for how in ("frozen", "trainable") for what in OWN), *FURTHER]


class Cell(NamedTuple):
    """One recommender of the study."""

    model: str
    variant: str
    recformer: str
    seed: int


class ElephantStudy(Section):
    """The recipe of such a study."""

    placement: ClassVar[tuple[str, ...]] = ("parallel", "recformer.processes")
    selection: ClassVar[tuple[str, ...]] = ("seeds", "headline", "margin")

    run: Path
    """The run folder."""
    pretrained: Path | None = None
    """Where stage-PT lies, by a hash of what decides it: studies that name the same folder share it. Null: ``run``."""
    target: str
    """One of ``targets``, or a prepared folder."""
    targets: dict[str, str] = Field(default_factory=dict)
    """Prepared folders by name."""
    for_target: dict[str, list[str]] = Field(default_factory=dict)
    """Overrides of this recipe by the name of the target that they are for."""
    recformer: RecformerSettings
    """The ``llm.recformer`` section; its pretrain section names the sources."""
    recformers: dict[str, list[str]] = Field({"RECFORMER": []}, min_length=1)
    """Overrides of that section by a name; variants that need none of them are run for the first one alone."""
    models: dict[str, RecConfig] = Field(default_factory=dict)
    """The ``rec`` section of every plain recommender, by a name; its items are the variants'. One that is null is left
    out: ``models.BERT4Rec=null``."""
    variants: list[str] = Field(default_factory=lambda: list(TABLE_3))
    """``random``; ``frozen X``, ``trainable X`` and ``id+X`` for X of vanilla, PT, FT and the names of ``more``;
    ``further all`` and ``further items``, which start from ``frozen FT``."""
    more: dict[str, str] = Field(default_factory=dict)
    """More item vectors: what ``recalign vectors`` takes (an LMRec's run, a sentence encoder), by a name."""
    item_text: str | None = None
    """Template of an item's text for ``more``. Null: a run's own, a model's is "{title}"; a RECFORMER has none."""
    lrs: list[float] = Field([3e-4, 1e-3, 3e-3, 1e-2], min_length=1)
    """Learning rates. Each model's is chosen by validation NDCG@10 once for every family of variants (random, frozen,
    trainable, id+, further all, further items), with the vectors that the recipe has first of PT, FT and the rest; from
    the two in the middle on outwards, while it gets better."""
    stds: list[float | None] = Field([0.02], min_length=1)
    """Deviations that item vectors are scaled to as a whole, null for as they are. A family's is chosen after its rate,
    which is chosen at the first of them and, where another is better, once more at that; to train further is to have
    that of ``frozen``, where it starts."""
    rate_epochs: int | None = Field(None, ge=1)
    """Epochs after which both are chosen, by what validation says then; null for the best of whole trainings."""
    seeds: list[int] = Field([1], min_length=1)
    """The first of them of all cells; the others of the ``headline`` alone."""
    headline: dict[str, list[str]] = Field(default_factory=dict)
    """Variants that are trained with every seed, by model."""
    projection: bool = False
    """Learn a map from the vectors' width to the models', where these differ."""
    pca: bool = False
    """Begin with as many principal components of the vectors as the models are wide."""
    protocols: list[str] = Field(["elephant-100", "elephant-full"], min_length=1)
    cutoffs: list[int] = Field([5, 10, 50], min_length=1)
    cold_targets: Literal["drop", "rank", "miss"] = "drop"
    """Held-out items that never occur in training; the paper leaves these instances out."""
    margin: float = Field(0.02, ge=0)
    """A difference that does not matter, as a share of the NDCG@10 that is compared with: within it, vanilla vectors do
    not help and RECFORMER is reached."""
    parallel: int = Field(1, ge=1)
    """Recommenders that are trained at a time, each in a process with its share of the cores."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for variant in [*self.variants, *(own for some in self.headline.values() for own in some)]:
            how, what = parts_of(variant)
            if variant not in (RANDOM, *FURTHER) and (
                how not in ("frozen", "trainable", "id+") or what not in (*OWN, *self.more)
            ):
                raise ValueError(f"unknown variant {variant!r}")
        for name in self.protocols:
            if name not in PRESETS:
                raise ValueError(f"unknown protocol {name!r}; there are: {', '.join(PRESETS)}")
        for kind, names in (("model", self.headline), ("target", self.for_target)):
            known = self.models if kind == "model" else self.targets
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"unknown {kind} {unknown[0]!r}; there are: {', '.join(known)}")
        for name in (*self.recformers, *self.models, *self.more):
            if not name or "/" in name:
                raise ValueError(f"{name!r} names a folder: no '/'")
        if taken := sorted(set(self.more) & set(OWN)):
            raise ValueError(f"more.{taken[0]}: {taken[0]} are a RECFORMER's vectors, take another name")
        return self

    @model_validator(mode="after")
    def _rates_are_the_studys_to_choose(self) -> Self:
        for name, rec in self.models.items():
            if rec.grid:
                raise ValueError(f"models.{name}.grid: a study's own search is over lrs and stds")
            if rec.train.on != "train":
                raise ValueError(f"models.{name}.train.on={rec.train.on} trains on the items that rates are chosen by")
        return self


def family_of(variant: str) -> str:
    """The name of the variants that share a learning rate: frozen ones, trainable ones; each way to train further."""
    return variant if variant in FURTHER else parts_of(variant)[0]


def parts_of(variant: str) -> tuple[str, str]:
    """The family of a variant, and its vectors: ("trainable", "PT"), ("id+", "FT"), ("further", "FT")."""
    if variant in FURTHER:
        return "further", "FT"
    how, _, what = variant.replace("id+", "id+ ").partition(" ")
    return how, what
