"""What the Elephant's study found: means, the paper's claims with their figures, the cost of serving, the table."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from launch import seeds
from launch.elephant.config import Cell
from launch.tables import console, with_error
from rec.compare import bootstrap, paired
from rec.evaluate import rank_run
from rec.evaluation import Metrics, load_ranks, save_ranks
from rec.job import open_run
from rec.protocol import Protocol

METRIC, RECFORMER = "NDCG@10", "RECFORMER"
REQUESTS = 100


def ranks_of(run: Path, protocols: Mapping[str, Protocol]) -> dict[str, Metrics]:
    """The test ranks of a finished recommender under every protocol, computed once and kept in its folder."""
    found = {}
    for name, protocol in protocols.items():
        path = run / "ranks" / f"{name}-{protocol.hash}.safetensors"
        if not path.exists():
            metrics = rank_run(open_run(run), {name: protocol})[name]
            save_ranks(metrics, path)
        found[name] = load_ranks(path, protocol.cutoffs)
    return found


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every cell's mean over its seeds, with the standard error over seeds, or over users where there is one seed."""
    ranked = [row for row in rows if "protocol" in row]
    first = next(iter(ranked), {})
    metrics = [name for name in first if f"{name}_se" in first and name.partition("@")[0] in ("HR", "NDCG")]
    return seeds.means(ranked, ("model", "variant", "recformer", "protocol"), metrics, users_se=True)


def claims(
    ranks: Mapping[Cell, dict[str, Metrics]], serving: Mapping[str, dict[str, Any]], first: str, margin: float = 0.0
) -> list[dict[str, Any]]:
    """The paper's claims of every model under every protocol, as far as the study has what they compare.

    A figure is a difference of NDCG@10, every user's averaged over the seeds that both variants have; ``low`` and
    ``high`` are its 95 % interval by a paired bootstrap over users. To beat is to differ by more than 0. "Does not
    beat" and "reaches" say that a difference is none that matters, which no test of 0 can confirm: their bound is the
    margin above and below 0. The whole interval has to lie on one side; ``undecided`` is true where it holds the bound.

    Args:
        ranks: of the test items, by cell and protocol; RECFORMER's too.
        serving: from ``serving``.
        first: the RECFORMER whose variants are compared; of the others, those on PT vectors and stage-FT2 itself.
        margin: a difference that does not matter, as a share of the NDCG@10 that is compared with.
    """
    found: list[dict[str, Any]] = []
    for protocol in next(iter(ranks.values()), ()):
        own = [_Compared(name, ranks, protocol, first) for name in dict.fromkeys(cell.model for cell in ranks)]
        pairs = [pair for model in own for pair in model.pairs()]
        if pairs:
            intervals = _intervals(pairs)
            found += [_row(pair, intervals[pair.name], margin) for pair in pairs]
    for model, figures in serving.items():
        same = figures["parameters"][0] == figures["parameters"][1]
        name = f"{model}: serving costs what the plain recommender does: as many parameters, latency within 10 %"
        held = same and abs(figures["latency_ratio"] - 1) < 0.1
        found.append({"id": name, "holds": held, "figure": figures["latency_ratio"]})
    return found


class _Pair(NamedTuple):
    """Two variants of which a claim says something."""

    name: str
    claim: Literal["beats", "does not beat", "reaches"]
    differences: Tensor
    other: float
    """What the second of them is worth."""
    users: Tensor


def _intervals(pairs: Sequence[_Pair]) -> dict[str, dict[str, float]]:
    """One bootstrap for all pairs of the same users, so that they meet the same draws."""
    alike: dict[bytes, list[_Pair]] = {}
    for pair in pairs:
        alike.setdefault(pair.users.numpy().tobytes(), []).append(pair)
    found = {}
    for own in alike.values():
        found |= bootstrap({pair.name: pair.differences for pair in own}, own[0].users)
    return found


def _row(pair: _Pair, interval: Mapping[str, float], margin: float) -> dict[str, Any]:
    low, high, figure = (round(interval[key], 5) for key in ("low", "high", "difference"))
    bound = {"beats": 0.0, "does not beat": margin, "reaches": -margin}[pair.claim] * pair.other
    holds, fails = low > bound, high < bound
    if pair.claim == "does not beat":
        holds, fails = fails, holds
    told = {"id": pair.name, "holds": holds, "figure": figure, "low": low, "high": high, "bound": round(bound, 5)}
    return told | ({} if holds or fails else {"undecided": True})


class _Compared:
    """The cells of one model under one protocol, by variant; those of a RECFORMER but the first by its name too."""

    def __init__(self, name: str, ranks: Mapping[Cell, dict[str, Metrics]], protocol: str, first: str) -> None:
        self.name, self.protocol = name, protocol
        self.found: dict[str, dict[int, Metrics]] = {}
        for cell, own in ranks.items():
            if cell.recformer == first and cell.model in (name, RECFORMER):
                self.found.setdefault(cell.variant, {})[cell.seed] = own[protocol]
            elif cell.model == name:
                self.found.setdefault(f"{cell.variant} of {cell.recformer}", {})[cell.seed] = own[protocol]

    def pairs(self) -> list[_Pair]:
        """What the paper compares, and the study has."""
        asked: list[tuple[str, str, str, Literal["beats", "does not beat", "reaches"]]] = [
            ("a", "trainable vanilla", "random", "does not beat"),
            ("a", "frozen vanilla", "random", "does not beat"),
            *(
                ("b", own, other, "beats")
                for own in self.found
                if own.startswith("trainable PT")
                for other in ("random", "trainable vanilla")
            ),
            ("c", "trainable PT", "frozen PT", "beats"),
            ("c", "trainable FT", "frozen FT", "beats"),
            *(("d", "further items", other, "beats") for other in self._next_best("further items")),
            ("e", "frozen FT", "RECFORMER FT2", "reaches"),
            ("e", "trainable FT", "RECFORMER FT2", "reaches"),
            ("f", "id+vanilla", "random", "does not beat"),
            ("f", "id+PT", "random", "beats"),
            ("f", "id+FT", "random", "beats"),
            *(
                ("g", own, "RECFORMER FT2", claim)
                for own in self.found
                if own.startswith("RECFORMER FT2 of ")
                for claim in ("beats", "reaches")
            ),
        ]
        return [
            _Pair(
                f"{self.name}: ({letter}) {one} {claim} {other} ({METRIC}, {self.protocol})",
                claim,
                *self._differences(one, other),
            )
            for letter, one, other, claim in asked
            if self._comparable(one, other)
        ]

    def _next_best(self, own: str) -> list[str]:
        """The variant that comes nearest to ``own``, or leaves it behind most."""
        others = [one for one in self.found if one not in (own, "RECFORMER FT2") and self._comparable(own, one)]
        if not others:
            return []
        return [min(others, key=lambda other: self._differences(own, other)[0].mean().item())]

    def _seeds(self, one: str, other: str) -> list[int]:
        """Those that both variants have, one of which may have diverged at some; RECFORMER has one for all."""
        ones, others = self.found.get(one, {}), self.found.get(other, {})
        return [seed for seed in ones if seed in others or (other == "RECFORMER FT2" and others)]

    def _comparable(self, one: str, other: str) -> bool:
        return bool(self._seeds(one, other))

    def _differences(self, one: str, other: str) -> tuple[Tensor, float, Tensor]:
        """[M] differences, each value the mean over the seeds that both have; what the other is worth; [M] the users.

        A RECFORMER that ranked a sample of the test items (``finetune.test_users``) is compared on those alone.
        """
        ones, others, seeds = self.found[one], self.found[other], self._seeds(one, other)
        if other == "RECFORMER FT2":
            others = dict.fromkeys(ones, next(iter(others.values())))
        pairs = [paired(ones[seed], others[seed]) for seed in seeds]
        first, second = (torch.stack([pair[side].values()[METRIC] for pair in pairs]).mean(0) for side in (0, 1))
        return first - second, second.mean().item(), pairs[0][0].users


def serving(folders: Mapping[Cell, Path]) -> dict[str, dict[str, Any]]:
    """Parameters and single-request latency of every model with a table of its own, and with one that text began.

    Models of which the study has not both are left out.
    """
    found = {}
    for model in dict.fromkeys(cell.model for cell in folders):
        own = {cell.variant: path for cell, path in reversed(folders.items()) if cell.model == model}
        tuned = next((name for name in ("further items", "trainable FT", "trainable PT") if name in own), None)
        if tuned is not None and "random" in own:
            found[model] = {"compared": ["random", tuned], **_cost(own["random"], own[tuned])}
    return found


def _cost(*runs: Path) -> dict[str, Any]:
    models = [open_run(run) for run in runs]
    data, seconds = models[0].data, ([], [])
    longest = models[0].model.config.max_length
    items, lengths = data.histories("test", torch.arange(min(REQUESTS, len(data.targets("test")))), longest)
    with torch.no_grad():
        for row, length in enumerate(lengths.tolist()):
            # Turn and turn about, so that both meet the same machine.
            for which, run in enumerate(models):
                begin = time.perf_counter()
                run.model.score_all(torch.tensor([0]), items[row : row + 1, :length], torch.tensor([length]))
                seconds[which].append(time.perf_counter() - begin)
    medians = [torch.tensor(own).median().item() for own in seconds]
    return {
        "parameters": [sum(p.numel() for p in run.model.parameters()) for run in models],
        "latency_ms": [round(1000 * value, 3) for value in medians],
        "latency_ratio": round(medians[1] / medians[0], 3),
    }


def print_study(result: dict[str, Any]) -> None:
    """One table a protocol, then the claims."""
    out = console()
    for protocol in dict.fromkeys(row["protocol"] for row in result["means"]):
        own = [row for row in result["means"] if row["protocol"] == protocol]
        names = [name for name in own[0] if name.partition("@")[0] in ("HR", "NDCG") and not name.endswith("_se")]
        table = Table("model", "variant", "seeds", *names, title=protocol)
        for row in own:
            label = (
                row["variant"] if len({r["recformer"] for r in own}) == 1 else f"{row['variant']}, {row['recformer']}"
            )
            figures = (with_error(row, name) for name in names)
            table.add_row(row["model"], label, str(row["seeds"]), *figures)
        out.print(table)
    out.print("± is the standard error over seeds, or over users where there is one seed")
    for claim in result["claims"]:
        interval = f" [{claim['low']:+.4f}, {claim['high']:+.4f}]" if "low" in claim else ""
        answer = "yes" if claim["holds"] else "undecided" if claim.get("undecided") else "NO"
        out.print(f"{claim['id']}: {answer} ({claim['figure']:+.4f}{interval})", soft_wrap=True)
    for cell in result["diverged"]:
        out.print(f"diverged at every learning rate: {cell['model']}, {cell['variant']}, seed {cell['seed']}")
    for name, speeds in result["speed"].items():
        for stage, speed in speeds.items():
            out.print(f"{name}, stage-{stage.upper()}: {speed['tokens_per_s']:,.0f} useful tokens/s")
