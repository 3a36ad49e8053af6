"""Tables about RECFORMER for the terminal."""

from pathlib import Path
from typing import Any

from rich.table import Table

from launch.tables import console, with_error


def print_stages(result: dict[str, Any], run: Path) -> None:
    """What the stages found, and how fast they were."""
    out = console()
    rows = [row for row in result["rows"] if row["part"] == "test"]
    if rows:
        names = [name for name in rows[0] if name.partition("@")[0] in ("HR", "NDCG") and not name.endswith("_se")]
        table = Table("stage", "protocol", *names, title="RECFORMER, test items")
        for row in rows:
            table.add_row(row["stage"], row["protocol"], *(with_error(row, name) for name in names))
        out.print(table)
    for row in result["rows"]:
        if row["part"] == "valid":
            out.print(
                f"stage-PT: {row['users']:,} users, {row['steps']:,} steps; best in-batch accuracy"
                f" {row['valid_accuracy'] or 0:.3f} after step {row['best_step']:,}"
            )
    for stage, speed in result["speed"].items():
        out.print(f"stage-{stage.upper()}: {speed['tokens']:,.0f} tokens, {speed['tokens_per_s']:,.0f} a second")
    out.print(f"Everything is in {run}: result.json, metrics.jsonl, pretrain/, finetune/", soft_wrap=True)


def print_bench(result: dict[str, Any]) -> None:
    """One row a way of cutting up the encoder's work, then the claim."""
    out = console()
    table = Table("way", "useful tokens/s", "places computed a token", "s a step", title="stage-PT")
    for row in result["rows"]:
        figures = f"{row['tokens_per_s']:,.0f}", f"{row['places_per_token']:.2f}", f"{row['seconds_per_step']:.2f}"
        table.add_row(row["way"], *figures)
    out.print(table)
    for claim in result["claims"]:
        out.print(f"{claim['id']}: {'yes' if claim['holds'] else 'NO'} ({claim['figure']})")
