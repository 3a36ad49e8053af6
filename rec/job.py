"""A recommender's recipe and its run folder: what ``recalign train`` writes and every later command opens."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec.build import FINISHED, MODEL, same_data
from rec.config import RecConfig
from rec.data.builtin import BUILTIN, prepare_builtin
from rec.data.prepared import META, Prepared
from rec.models.base import Recommender
from rec.protocol import TrainedOn
from rec.runtime import files
from rec.runtime.config import Section, apply_overrides, build, load, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, is_run_config, root_of, run_override


class RecJob(Section):
    """A recipe of ``recalign train``."""

    data: str
    """A prepared folder, or the name of a built-in data set."""
    run: Path
    """The run folder."""
    rec: RecConfig = RecConfig()


@dataclass(frozen=True)
class FinishedRun:
    """A trained recommender, the data that it was trained on, and how it was evaluated."""

    path: Path
    model: Recommender
    data: Prepared
    rec: RecConfig
    facts: dict[str, Any]

    @property
    def trained_on(self) -> TrainedOn:
        """Which interactions it was trained on."""
        return self.facts.get("trained_on", "train")


def load_job(path: Path, overrides: Sequence[str] = ()) -> RecJob:
    """Read a recipe; the ``config.yaml`` of a run folder means that folder, wherever it lies now.

    Raises:
        UserError: on a missing file, an unknown key or an impossible value, also one of the grid's.
    """
    job = load(RecJob, path, [*run_override(path), *overrides])
    grid_of(job.rec)
    return job


def grid_of(rec: RecConfig) -> dict[str, RecConfig]:
    """One configuration for every combination of the grid's values, by a name that says the values.

    Raises:
        UserError: if a key of the grid is unknown, or a value impossible.
    """
    if not rec.grid:
        return {}
    # What the recipe says, not the defaults of its own model: another model of the grid has others.
    base = rec.model_dump(mode="json", exclude_unset=True, exclude={"grid"})
    combinations = {}
    for values in itertools.product(*rec.grid.values()):
        chosen = dict(zip(rec.grid, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in chosen.items())
        content = apply_overrides(base, [f"{key}={json.dumps(value)}" for key, value in chosen.items()])
        try:
            own = build(RecConfig, content)
        except UserError as error:
            raise UserError(f"rec.grid, {name}: {error}") from None
        if _judged_by(own) != _judged_by(rec):
            raise UserError(
                f"rec.grid, {name}: what decides on which validation figure a member is judged (train.on,"
                " train.valid_users, evaluate) must be the same for all"
            )
        combinations[name.replace("/", "%2F")] = own  # it names a folder
    return combinations


def _judged_by(rec: RecConfig) -> tuple[object, ...]:
    return rec.train.on, rec.train.valid_users, rec.evaluate.protocol


def open_data(name: str, folder: Path) -> Prepared:
    """The prepared folder called ``name``; a built-in data set is prepared in ``folder`` first."""
    if name not in BUILTIN:
        return Prepared.load(Path(name))
    prepare_builtin(name, folder)
    return Prepared.load(folder)


def _own_data(root: Path) -> Prepared | None:
    """What was prepared inside the run folder, which needs no raw data any more."""
    return Prepared.load(root / "data") if (root / "data" / META).is_file() else None


def open_run(path: Path) -> FinishedRun:
    """A finished run of ``recalign train``, or one recommender of a larger job (``runs/demo/seralm``).

    Raises:
        UserError: if there is none, it is not finished, or its data is gone or another one now.
    """
    if not (path / FINISHED).is_file():
        inside = sorted(found.parent for found in path.glob(f"*/{FINISHED}"))
        if inside:
            raise UserError(f"{path} holds several recommenders; name one: {', '.join(map(str, inside))}")
        if (path / CONFIG).is_file():
            raise UserError(f"{path} is not finished; run 'recalign train {path / CONFIG}' to go on")
        raise UserError(f"{path} is no run folder of a recommender (no {FINISHED})")
    root = root_of(path)
    if not is_run_config(root / CONFIG):
        raise UserError(f"{path} belongs to no run folder (no {CONFIG} that a run wrote, here or above)")
    content = read_recipe(root / CONFIG)
    rec = build(RecConfig, content.get("rec", {}))
    try:
        facts = files.read_json(path / FINISHED)
    except ValueError as error:
        raise UserError(f"{path / FINISHED} is damaged: {error}") from error
    data = _own_data(root) or open_data(str(content.get("data")), root / "data")
    if not same_data(facts, data):
        raise UserError(
            f"{path} was trained on other data than {data.folder} holds now ({facts['data_hash']} then,"
            f" {data.meta['content_hash']} now): prepare it as it was, or train again"
        )
    return FinishedRun(path, Recommender.from_pretrained(path / MODEL), data, rec, facts)
