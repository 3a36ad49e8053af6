"""What the Elephant's study found: means, the paper's claims with their figures, the cost of serving, the table."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from launch.tables import console
from rec.compare import compare
from rec.evaluate import rank_run
from rec.evaluation import Metrics, load_ranks, save_ranks
from rec.job import open_run
from rec.protocol import Protocol

METRIC, FULL = "NDCG@10", "elephant-full"
REQUESTS = 100
Cell = tuple[str, str, str, int]  # model, variant, RECFORMER, seed


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
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "protocol" in row:
            groups.setdefault((row["model"], row["variant"], row["recformer"], row["protocol"]), []).append(row)
    found = []
    for (model, variant, recformer, protocol), own in groups.items():
        entry = {"model": model, "variant": variant, "recformer": recformer, "protocol": protocol, "seeds": len(own)}
        for name in [key for key in own[0] if key.partition("@")[0] in ("HR", "NDCG") and not key.endswith("_se")]:
            values = torch.tensor([row[name] for row in own], dtype=torch.double)
            entry[name] = values.mean().item()
            by_seed = values.std().item() / math.sqrt(len(own)) if len(own) > 1 else own[0][f"{name}_se"]
            entry[f"{name}_se"] = by_seed
        found.append(entry)
    return found


def claims(
    rows: Sequence[dict[str, Any]], ranks: Mapping[Cell, dict[str, Metrics]], serving: dict[str, Any], first: str
) -> list[dict[str, Any]]:
    """The paper's claims of every model, as far as the study has what they compare.

    Figures are differences of NDCG@10 under full ranking (or the study's first protocol), means over seeds; ``low`` and
    ``high`` bound the first seed's by a paired bootstrap over users. "Helps" means that ``low`` is above 0.
    """
    protocols = list(next(iter(ranks.values()))) if ranks else []
    if not protocols:
        return []
    protocol = FULL if FULL in protocols else protocols[0]
    table = {
        (row["model"], row["variant"]): row
        for row in means(rows)
        if row["protocol"] == protocol and row["recformer"] == first
    }
    found: list[dict[str, Any]] = []
    for model in dict.fromkeys(cell[0] for cell in ranks):
        compared = _Compared(model, table, ranks, protocol, first)
        for letter, one, other, helps in (
            ("a", "trainable vanilla", "random", False),
            ("b", "trainable PT", "random", True),
            ("c", "trainable PT", "frozen PT", True),
            ("c", "trainable FT", "frozen FT", True),
        ):
            found += compared.claim(letter, one, other, helps)
        found += compared.best() + compared.reaches_recformer()
    if serving:
        same = serving["parameters"][0] == serving["parameters"][1]
        held = same and abs(serving["latency_ratio"] - 1) < 0.1
        name = "serving costs what the plain recommender does: as many parameters, latency within 10 %"
        found.append({"id": name, "holds": held, "figure": serving["latency_ratio"]})
    return found


class _Compared:
    """The cells of one model."""

    def __init__(
        self,
        model: str,
        table: Mapping[tuple[str, str], dict[str, Any]],
        ranks: Mapping[Cell, dict[str, Metrics]],
        protocol: str,
        first: str,
    ) -> None:
        self.model, self.protocol = model, protocol
        self.means = {variant: row for (name, variant), row in table.items() if name == model}
        self.recformer = {variant: row for (name, variant), row in table.items() if name == "RECFORMER"}
        cells = {cell: found for cell, found in ranks.items() if cell[0] == model and cell[2] == first}
        self.ranks = {cell[1]: found[protocol] for cell, found in reversed(cells.items())}  # the first seed wins

    def claim(self, letter: str, one: str, other: str, helps: bool) -> list[dict[str, Any]]:
        """That ``one`` is better than ``other``, or that it is not."""
        if one not in self.means or other not in self.means:
            return []
        difference = self.means[one][METRIC] - self.means[other][METRIC]
        interval = compare(self.ranks[one], self.ranks[other])[METRIC]
        better = interval["low"] > 0 and difference > 0
        verb = "beats" if helps else "does not beat"
        return [self._row(f"({letter}) {one} {verb} {other}", better == helps, difference, interval)]

    def best(self) -> list[dict[str, Any]]:
        """That training the table of the frozen model on is the best of all."""
        own = "further items"
        others = {variant: row for variant, row in self.means.items() if variant != own}
        if own not in self.means or not others:
            return []
        next_best = max(others, key=lambda variant: others[variant][METRIC])
        difference = self.means[own][METRIC] - others[next_best][METRIC]
        interval = compare(self.ranks[own], self.ranks[next_best])[METRIC]
        return [self._row(f"(d) {own} is the best; next: {next_best}", difference > 0, difference, interval)]

    def reaches_recformer(self) -> list[dict[str, Any]]:
        """That a plain model on frozen FT vectors is not worse than RECFORMER by more than two standard errors."""
        plain, own = self.means.get("frozen FT"), self.recformer.get("RECFORMER FT2")
        if plain is None or own is None:
            return []
        difference = plain[METRIC] - own[METRIC]
        error = math.hypot(plain[f"{METRIC}_se"], own[f"{METRIC}_se"])
        interval = {"low": difference - 2 * error, "high": difference + 2 * error}
        return [self._row("(e) frozen FT reaches RECFORMER", interval["high"] >= 0, difference, interval)]

    def _row(self, name: str, holds: bool, difference: float, interval: Mapping[str, float]) -> dict[str, Any]:
        low, high = (round(interval[key], 5) for key in ("low", "high"))
        identity = f"{self.model}: {name} ({METRIC}, {self.protocol})"
        return {"id": identity, "holds": bool(holds), "figure": round(difference, 5), "low": low, "high": high}


def serving(folders: Mapping[Cell, Path]) -> dict[str, Any]:
    """Parameters and single-request latency of a model with a table of its own, and with one that text began.

    {} if the study has not both.
    """
    by_variant = {variant: (model, path) for (model, variant, _, _), path in reversed(folders.items())}
    tuned = next((name for name in ("further items", "trainable FT", "trainable PT") if name in by_variant), None)
    if tuned is None or "random" not in by_variant:
        return {}
    models = [open_run(by_variant[name][1]) for name in ("random", tuned)]
    data, seconds = models[0].data, ([], [])
    items, lengths = data.histories("test", torch.arange(min(REQUESTS, len(data.targets("test")))), 50)
    with torch.no_grad():
        for row in range(len(items)):
            # Turn and turn about, so that both meet the same machine.
            for which, run in enumerate(models):
                begin = time.perf_counter()
                length = min(int(lengths[row]), run.model.config.max_length)
                run.model.score_all(torch.tensor([0]), items[row : row + 1, :length], torch.tensor([length]))
                seconds[which].append(time.perf_counter() - begin)
    medians = [torch.tensor(own).median().item() for own in seconds]
    return {
        "compared": ["random", tuned],
        "model": by_variant[tuned][0],
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
            figures = (f"{row[name]:.4f} ± {row[f'{name}_se']:.4f}" for name in names)
            table.add_row(row["model"], label, str(row["seeds"]), *figures)
        out.print(table)
    out.print("± is the standard error over seeds, or over users where there is one seed")
    for claim in result["claims"]:
        interval = f" [{claim['low']:+.4f}, {claim['high']:+.4f}]" if "low" in claim else ""
        out.print(
            f"{claim['id']}: {'yes' if claim['holds'] else 'NO'} ({claim['figure']:+.4f}{interval})", soft_wrap=True
        )
    for name, speeds in result["speed"].items():
        for stage, speed in speeds.items():
            out.print(f"{name}, stage-{stage.upper()}: {speed['tokens_per_s']:,.0f} useful tokens/s")
