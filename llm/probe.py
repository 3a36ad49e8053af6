"""Feature-based transfer, LMRec^TL: frozen features of a pretrained decoder, linear heads alone are trained (LMRec,
section 2.2, Fig. 2, Tables 1 and 7).

Features are computed once and kept in the run folder: one [EOS] vector an item, one a history or prefix. Training the
heads then touches nothing but these matrices.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llm.corpus import ItemTokens
from llm.joint import Heads, JointModel, pair_loss, softmax_loss
from llm.knowledge import fingerprint
from llm.lmrec_evaluation import HISTORIES_AT_ONCE, ITEMS_AT_ONCE, ReaderConfig
from llm.lmrec_job import LMRecEvaluation
from llm.lmrec_job import read as read_content
from llm.lmrec_run import starting_model
from llm.prompts import item_texts
from llm.recommendation import TextRows
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.job import open_data
from rec.models.base import Recommender
from rec.runtime import files
from rec.runtime.config import Section, build, hash_of
from rec.runtime.errors import UserError
from rec.runtime.progress import progress
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

LONGEST = 2048
"""Tokens of a history that are read by a decoder without a bound of its own: the paper's context."""
Feature = Literal["specific", "agnostic", "combine"]


class AgnosticConfig(Section):
    """Histories of the same users in another service."""

    data: str
    """A prepared folder whose user ids are those of the task."""
    item_text: str = "{title}"


class ProbeConfig(Section):
    """The linear heads W_u and W_i, and how they are trained."""

    features: list[Feature] = Field(["specific"], min_length=1)
    """From which histories user vectors come: the task's own, the same users' in another service until then, or both in
    one text, the other service's first (Table 7's Combine)."""
    prefixes: int = Field(8, ge=1)
    """Training pairs of a user, after random prefixes that are drawn once."""
    loss: Literal["bce", "softmax"] = "bce"
    negatives: int = Field(128, ge=1)
    batch_size: int = Field(1024, ge=1)
    """Pairs a step."""
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    steps: int = Field(2000, ge=1)
    validate_every: int = Field(20, ge=1)
    patience: int = Field(200, ge=1)
    """Steps without a better validation loss before training stops."""
    seed: int = 42


class ProbeLLM(Section):
    """The ``llm`` section of a recipe of ``recalign probe``."""

    model: str
    """The pretrained decoder: the run folder of a pretraining, or any causal LM."""
    item_text: str = "{title}"
    agnostic: AgnosticConfig | None = None
    probe: ProbeConfig = ProbeConfig()


class ProbeJob(Section):
    """A recipe of ``recalign probe``."""

    data: str
    """A prepared folder: the target task, which the decoder was not trained on."""
    run: Path
    rec: LMRecEvaluation = LMRecEvaluation()
    llm: ProbeLLM


@dataclass(frozen=True)
class Features:
    """Frozen vectors of one kind of user feature.

    Attributes:
        users: [P, D] of training pairs.
        owners: [P] whose they are.
        targets: [P] next items, from 0.
        valid: [V, D] of the validation instances, in their order.
        test: [M, D] of the test instances.
        items: [N, D].
    """

    users: Tensor
    owners: Tensor
    targets: Tensor
    valid: Tensor
    test: Tensor
    items: Tensor


def load_job(path: Path, overrides: Sequence[str] = ()) -> ProbeJob:
    """Read a recipe; raises UserError on a missing file, an unknown key or an impossible value."""
    job = build(ProbeJob, read_content(path, overrides))
    if job.llm.agnostic is None and set(job.llm.probe.features) != {"specific"}:
        raise UserError("llm.probe.features other than specific need llm.agnostic")
    return job


def run(job: ProbeJob, command: str) -> dict[str, Any]:
    """Compute what features are not there yet, train heads on each kind, rank the test items.

    Returns:
        The content of ``result.json``.
    """
    folder = RunFolder(job.run)
    with folder.lock("launcher"):
        folder.claim(job)
        done = folder.result()
        if done is not None:
            return done
        data, begin, rows = open_data(job.data, folder.path / "data"), time.monotonic(), []
        reader, protocol = _Reader(job, data), job.rec.evaluate.protocol.of_run(data, "train")
        for kind in job.llm.probe.features:
            found = reader.features(kind, folder.path / "features")
            started = time.monotonic()
            heads, steps = train_heads(found, data, job.llm.probe)
            seconds = time.monotonic() - started
            model = Probe(heads, found.items, found.test, data.instances("test")[0])
            metrics = evaluate(model, data, "test", job.rec.evaluate).summary()
            rows.append(
                {"model": "LMRec^TL", "feature": kind, "part": "test", "steps": steps, "seconds": round(seconds, 2)}
                | {"protocol_hash": protocol.hash, **metrics}
            )
            log.info("%s: HR@10 %.4f after %d steps, %.1f s", kind, metrics["HR@10"], steps, seconds)
        return folder.write_result(
            command,
            hash_of(job.model_dump(mode="json", exclude={"run"})),
            protocol.described(),
            rows,
            time.monotonic() - begin,
            data={"name": job.data, "content_hash": data.meta["content_hash"], **data.meta["counts"]},
        )


def train_heads(features: Features, data: Prepared, config: ProbeConfig) -> tuple[Heads, int]:
    """W_u and W_i by Eq. 5 on frozen features, stopped by the validation loss; and the steps that it took."""
    torch.manual_seed(config.seed)
    heads = Heads(features.items.shape[1])
    heads.user.fix(features.users)
    heads.item.fix(features.items)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    loss_of, count = (pair_loss if config.loss == "bce" else softmax_loss), min(config.negatives, data.n_items)

    def loss(users: Tensor, targets: Tensor, rng: np.random.Generator) -> Tensor:
        negatives = torch.from_numpy(rng.choice(data.n_items, size=count, replace=False))
        z_users, z_items = heads.user(users), heads.item(features.items)
        allowed = negatives != targets[:, None]
        return loss_of((z_users * z_items[targets]).sum(1), z_users @ z_items[negatives].T, allowed)

    valid_targets = data.sequence[data.instances("valid")[1]] - 1
    best, best_step, kept, step = math.inf, 0, heads.state_dict(), 0
    while step < config.steps and step - best_step < config.patience:
        rng = np.random.default_rng([config.seed, step])
        chosen = torch.from_numpy(rng.integers(len(features.users), size=config.batch_size))
        value = loss(features.users[chosen], features.targets[chosen], rng)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        step += 1
        if step % config.validate_every == 0 or step == config.steps:
            with torch.no_grad():
                judged = loss(features.valid, valid_targets, np.random.default_rng([config.seed])).item()
            if judged < best:
                best, best_step = judged, step
                kept = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    heads.load_state_dict(kept)
    return heads, step


class Probe(Recommender):
    """Scores <W_u z_u, W_i z_i> from cached features.

    Args:
        heads: W_u and W_i.
        items: [N, D].
        users: [M, D] of the test instances.
        owners: [M] their users, each once.

    Raises:
        UserError: if a user has several test items, whose histories would need a vector each.
    """

    architecture = "LMRec^TL"

    def __init__(self, heads: Heads, items: Tensor, users: Tensor, owners: Tensor) -> None:
        nn.Module.__init__(self)
        if len(owners.unique()) != len(owners):
            raise UserError("a probe needs one test item a user: prepare with a leave-one-out split, or one by users")
        self.config = ReaderConfig(max_length=1)
        self.heads = heads
        with torch.no_grad():
            self.table, self.vectors = heads.item(items), heads.user(users)
        self.row_of = torch.full((int(owners.max()) + 1,), -1).index_put((owners,), torch.arange(len(owners)))

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        return self.vectors[self.row_of[users]] @ self.table.T


class _Reader:
    """Computes features with the frozen decoder, or takes those that lie there."""

    def __init__(self, job: ProbeJob, data: Prepared) -> None:
        self.job, self.data = job, data
        self.path = starting_model(job.llm.model)
        self.tokenizer = load_tokenizer(self.path)
        own, other = item_texts(data.items, job.llm.item_text), job.llm.agnostic
        self.agnostic = None if other is None else open_data(other.data, job.run / "data")
        texts = own if other is None else own + item_texts(self.agnostic.items, other.item_text)
        self.others = None if other is None else _matched(data, self.agnostic)
        self.times = None if other is None else data.timestamps.numpy()
        self.texts, self.model = texts, None

    def features(self, kind: Feature, folder: Path) -> Features:
        """Of one kind, from the cache if they are there."""
        probe = self.job.llm.probe
        hashes = [self.data.meta["content_hash"], self.agnostic and self.agnostic.meta["content_hash"]]
        key = hash_of([fingerprint(self.path), hashes, self.texts, kind, probe.prefixes, probe.seed])
        path = folder / f"{kind}-{key}.safetensors"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = files.beside(path)
            save_file(self._compute(kind), temporary)
            files.fsync(temporary)
            temporary.replace(path)
        return Features(**load_file(path))

    def _compute(self, kind: Feature) -> dict[str, Tensor]:
        data, rows = self.data, self._rows()
        items, histories = (data.sequence - 1).numpy(), self._histories(kind)
        rng = np.random.default_rng([self.job.llm.probe.seed, 5])
        cuts = {}
        for user, (begin, end) in enumerate(zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True)):
            own = np.sort(rng.permutation(np.arange(begin + 1, end))[: self.job.llm.probe.prefixes])
            if len(own):
                cuts[user] = own
        if not cuts:
            raise UserError(f"{data.folder}: no user has two training interactions, so there are no pairs to train on")
        if kind == "specific":
            begins = data.offsets[list(cuts)].tolist()
            windows = [items[begin : own[-1]] for begin, own in zip(begins, cuts.values(), strict=True)]
            counts = [own - begin for begin, own in zip(begins, cuts.values(), strict=True)]
            users = self._of_prefixes(rows, windows, counts)
        else:
            inputs = [histories(user, int(data.offsets[user]), cut) for user, own in cuts.items() for cut in own]
            users = self._vectors(rows, inputs, "Training features")
        evaluated = {}
        for split in ("valid", "test"):
            owners, ends = data.instances(split)
            evaluated[split] = [
                histories(user, int(data.offsets[user]), end)
                for user, end in zip(owners.tolist(), ends.tolist(), strict=True)
            ]
        numbers = np.arange(data.n_items)
        parts = np.array_split(numbers, -(-len(numbers) // ITEMS_AT_ONCE))
        return {
            "users": users,
            "owners": torch.tensor([user for user, own in cuts.items() for _ in own]),
            "targets": torch.from_numpy(items[np.concatenate(list(cuts.values()))]),
            **{split: self._vectors(rows, own, f"{split} features") for split, own in evaluated.items()},
            "items": torch.cat([self._read(rows.items(part)) for part in parts]),
        }

    def _histories(self, kind: Feature) -> Callable[[int, int, int], np.ndarray]:
        """What stands for a user before the interaction at ``end``: item numbers from 0, of both catalogs in a row."""
        items = (self.data.sequence - 1).numpy()
        if kind == "specific":
            return lambda user, begin, end: items[begin:end]
        if kind == "agnostic":
            return lambda user, begin, end: self._elsewhere(user, end)
        return lambda user, begin, end: np.concatenate([self._elsewhere(user, end), items[begin:end]])

    def _elsewhere(self, user: int, end: int) -> np.ndarray:
        """What the user had done in the other service before the interaction at ``end``, as item numbers."""
        items, times = self.others[user]
        return items[: np.searchsorted(times, self.times[end])]

    def _rows(self) -> TextRows:
        if self.model is None:
            try:
                decoder = AutoModelForCausalLM.from_pretrained(str(self.path), dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise UserError(f"{self.path} is no causal LM: {str(error).strip().splitlines()[0]}") from error
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = JointModel(decoder).eval().requires_grad_(False).to(device)
        context = getattr(self.model.decoder.config, "max_position_embeddings", None) or LONGEST
        return TextRows(ItemTokens(self.tokenizer, self.texts, context - 1), context)

    def _vectors(self, rows: TextRows, histories: list[np.ndarray], title: str) -> Tensor:
        """[len(histories), D]; equal histories are read once, an empty one is a vector of zeros."""
        number, which = {}, []
        for own in histories:
            which.append(number.setdefault(own.tobytes(), len(number)))
        distinct = [np.frombuffer(own, dtype=np.int64) for own in number]
        order = sorted((row for row in range(len(distinct)) if len(distinct[row])), key=lambda row: len(distinct[row]))
        found = torch.zeros(len(distinct), self.model.decoder.config.hidden_size)
        with progress(title, len(order)) as advance:
            for begin in range(0, len(order), HISTORIES_AT_ONCE):
                part = order[begin : begin + HISTORIES_AT_ONCE]
                found[part] = self._read(rows.histories([distinct[row] for row in part]))
                advance(begin + len(part))
        return found[which]

    def _of_prefixes(self, rows: TextRows, windows: list[np.ndarray], counts: list[np.ndarray]) -> Tensor:
        """[sum of cuts, D] after the first ``counts`` items of each window; whatever fits is read in one pass."""
        ends = np.cumsum([len(own) for own in counts])
        fit = [rows.fits(window, own) for window, own in zip(windows, counts, strict=True)]
        found = torch.zeros(int(ends[-1]), self.model.decoder.config.hidden_size)
        order = sorted(np.flatnonzero(fit).tolist(), key=lambda number: len(windows[number]))
        with progress("Training features", len(order)) as advance:
            for begin in range(0, len(order), HISTORIES_AT_ONCE):
                part = order[begin : begin + HISTORIES_AT_ONCE]
                places = np.concatenate([np.arange(ends[n] - len(counts[n]), ends[n]) for n in part])
                read = rows.prefixes([windows[n] for n in part], [counts[n] for n in part])
                found[places] = self._read(read)
                advance(begin + len(part))
        rest = [number for number, fits in enumerate(fit) if not fits]
        if rest:
            inputs = [windows[number][:count] for number in rest for count in counts[number]]
            places = np.concatenate([np.arange(ends[n] - len(counts[n]), ends[n]) for n in rest])
            found[places] = self._vectors(rows, inputs, "Long histories")
        return found

    @torch.no_grad()
    def _read(self, made: tuple[Any, Tensor]) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model.features(made[0].to(device), made[1].to(device)).float().cpu()


def _matched(data: Prepared, other: Prepared) -> list[tuple[np.ndarray, np.ndarray]]:
    """[users] each user's history in the other service, as item numbers behind the task's own, and its times; empty if
    unknown there.

    Raises:
        UserError: if no user is known there, or it is the same service.
    """
    if data.meta["content_hash"] == other.meta["content_hash"]:
        raise UserError(f"llm.agnostic.data: {other.folder} is the task's own data, not another service's")
    place = {user: number for number, user in enumerate(other.user_ids)}
    items, times = (other.sequence - 1 + data.n_items).numpy(), other.timestamps.numpy()
    found = []
    for user in data.user_ids:
        number = place.get(user)
        span = slice(*((0, 0) if number is None else other.offsets[number : number + 2].tolist()))
        found.append((items[span], times[span]))
    if not any(len(own) for own, _ in found):
        raise UserError(f"{other.folder} knows none of the users of {data.folder}: a task-agnostic feature needs them")
    return found
