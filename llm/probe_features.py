"""Frozen features of a pretrained decoder, computed once and kept in the run folder, part by part: one [EOS] vector an
item, one a history or prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm.corpus import ItemTokens
from llm.fingerprint import fingerprint
from llm.joint import JointModel
from llm.lmrec_evaluation import HISTORIES_AT_ONCE, ITEMS_AT_ONCE
from llm.lmrec_run import starting_model
from llm.packing import require_packable
from llm.probe_job import Feature, ProbeJob
from llm.prompts import item_texts
from llm.recommendation import TextRows
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.job import open_data
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.progress import progress

LONGEST = 2048
"""Tokens of a history that are read by a decoder without a bound of its own: the paper's context."""


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


class FeatureReader:
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
        self.texts, self.model, self.rows = texts, None, None
        known = [data] if other is None else [data, self.agnostic]
        self.hashes = {"model": fingerprint(self.path), "data": [own.meta["content_hash"] for own in known]}

    def features(self, kind: Feature, folder: Path) -> Features:
        """Of one kind, from the cache if they are there."""
        probe = self.job.llm.probe
        key = hash_of([self.hashes, self.texts, kind, probe.prefixes, probe.seed])
        found, own = {}, folder / f"{kind}-{key}"
        own.mkdir(parents=True, exist_ok=True)
        for name, compute in self._parts(kind).items():
            path = own / f"{name}.safetensors"
            if not path.exists():
                temporary = files.beside(path)
                save_file(compute(), temporary)
                files.fsync(temporary)
                temporary.replace(path)
            found |= load_file(path)
        return Features(**found)

    def _parts(self, kind: Feature) -> dict[str, Callable[[], dict[str, Tensor]]]:
        """What makes each part of the features; a part that is there need not be made again after a kill."""
        return {
            "training": lambda: self._of_training(kind),
            "valid": lambda: {"valid": self._of_instances(kind, "valid")},
            "test": lambda: {"test": self._of_instances(kind, "test")},
            "items": lambda: {"items": self._of_items()},
        }

    def _of_training(self, kind: Feature) -> dict[str, Tensor]:
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
        return {
            "users": users,
            "owners": torch.tensor([user for user, own in cuts.items() for _ in own]),
            "targets": torch.from_numpy(items[np.concatenate(list(cuts.values()))]),
        }

    def _of_instances(self, kind: Feature, split: str) -> Tensor:
        histories = self._histories(kind)
        owners, ends = (numbers.tolist() for numbers in self.data.instances(split))
        inputs = [histories(user, int(self.data.offsets[user]), end) for user, end in zip(owners, ends, strict=True)]
        return self._vectors(self._rows(), inputs, f"{split} features")

    def _of_items(self) -> Tensor:
        rows, numbers = self._rows(), np.arange(self.data.n_items)
        parts = np.array_split(numbers, -(-len(numbers) // ITEMS_AT_ONCE))
        return torch.cat([self._read(rows.items(part)) for part in parts])

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
            require_packable(decoder, str(self.path), self._context(decoder), "llm.model")
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = JointModel(decoder).eval().requires_grad_(False).to(device)
            context = self._context(decoder)
            self.rows = TextRows(ItemTokens(self.tokenizer, self.texts, context - 1), context)
        return self.rows

    @staticmethod
    def _context(decoder: PreTrainedModel) -> int:
        return getattr(decoder.config, "max_position_embeddings", None) or LONGEST

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
