"""Tables about LMRec for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.seeds import METRICS
from launch.tables import console, describe, with_error


def print_pretraining(result: dict[str, Any], run: Path) -> None:
    """The figures of a finished run."""
    out, training = console(), result["training"]
    for row in result["rows"]:
        table = Table("metric", row["part"], title=f"{row['model']} on {result['data']['name']}")
        for name in [name for name in row if f"{name}_se" in row]:
            table.add_row(name, with_error(row, name))
        out.print(table)
    if result["rows"]:
        out.print(f"Protocol {result['protocol']['hash']}: {describe(result['protocol'])}", soft_wrap=True)
    rate = training["tokens"] / max(1e-9, training["seconds"])
    out.print(
        f"{training['parameters']:,} parameters, vocabulary {training['vocabulary']:,}; {training['steps']} steps,"
        f" best {training['best_step'] or training['steps']}; {rate:,.0f} tokens/s",
        soft_wrap=True,
    )
    out.print(f"Everything is in {run}: result.json, metrics.jsonl, model/", soft_wrap=True)


def print_probe(result: dict[str, Any], run: Path) -> None:
    """A line a kind of user feature."""
    table = Table("user feature", *METRICS, "seconds", title=f"linear probe on {result['data']['name']}")
    for row in result["rows"]:
        table.add_row(row["feature"], *_figures(row), f"{row['seconds']:.1f}")
    out = console()
    out.print(table)
    out.print(f"Protocol {result['protocol']['hash']}: {describe(result['protocol'])}", soft_wrap=True)
    out.print(f"Everything is in {run}: result.json, features/", soft_wrap=True)


def print_study(result: dict[str, Any]) -> None:
    """Means over seeds beside the paper's figures and simple controls; the analyses; then the claims."""
    table = Table(
        "variant",
        "seeds",
        *METRICS,
        "the paper's",
        caption="± is the standard error over seeds, of a single one and of controls over users",
    )
    for row in result["means"]:
        seeds = str(row["seeds"]) if row["seeds"] else "-"
        told = row.get("paper") or {}
        paper = " / ".join(f"{told[name]:.4f}" for name in METRICS if name in told) or "-"
        found = _figures(row) if METRICS[0] in row else ("-", "-")
        table.add_row(row["variant"], seeds, *found, paper)
    out = console()
    out.print(table)
    for name in ("inference", "eigenvalues"):
        if rows := result.get(name):
            table = Table(*rows[0], title=name)
            for row in rows:
                table.add_row(*map(_number, row.values()))
            out.print(table)
    _print_claims(result["claims"], out)


def print_bench(result: dict[str, Any]) -> None:
    """A line a measurement, then the aims."""
    out, table = console(), Table("measurement", "machine", "figures")
    for row in result["rows"]:
        figures = {name: value for name, value in row.items() if name not in ("name", "steps", "machine")}
        told = ", ".join(f"{name} {_number(value)}" for name, value in figures.items())
        table.add_row(row["name"], row["machine"], told)
    out.print(table)
    _print_claims(result["claims"], out)


def _print_claims(claims: Sequence[dict[str, Any]], out: Console) -> None:
    for claim in claims:
        verdict = "holds" if claim["holds"] else "within noise" if claim.get("undecided") else "not held"
        error = f" ± {claim['se']:.4g}" if "se" in claim else ""
        out.print(f"{verdict}  {claim['id']}: {claim['figure']:.4g}{error}", soft_wrap=True)


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _figures(row: dict[str, Any]) -> list[str]:
    errors = (row.get(f"{name}_se") for name in METRICS)
    return [
        f"{row[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
        for name, error in zip(METRICS, errors, strict=True)
    ]
