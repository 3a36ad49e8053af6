"""The commands that answer from a finished recommender: recommend and export."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands import add_command
from rec.runtime.errors import UserError

if TYPE_CHECKING:
    from rec.catalog import Catalog, Found
    from rec.job import FinishedRun
    from rec.recommend import Recommendation, Request

OTHERS_SHOWN, HISTORY_SHOWN, TITLE_SHOWN = 3, 5, 60


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    recommend = add_command(commands, "recommend", _recommend, "recommend items from a finished run", """\
examples:
  recalign recommend runs/demo/seralm --titles "toy story; alien"
  recalign recommend runs/sasrec-beauty --history "B0000YUXI0,B000142FVW" -k 5
  recalign recommend runs/sasrec-beauty --user A1YJEY40YUW4SE --json
  recalign recommend runs/sasrec-beauty --histories carts.csv --out recommendations.csv
""")  # fmt: skip
    recommend.add_argument("run", type=Path, help="run folder of a recommender")
    whom = recommend.add_mutually_exclusive_group(required=True)
    whom.add_argument("--history", metavar="IDS", help='item ids, oldest first: "id1,id2"; quote an id with a comma')
    whom.add_argument("--titles", help='words of item texts, oldest first: "toy story; alien"')
    whom.add_argument("--user", metavar="ID", help="a user of the data, with everything known of them")
    whom.add_argument("--histories", type=Path, metavar="FILE", help="a csv, jsonl or parquet with a column history")
    recommend.add_argument("-k", type=int, default=10, help="how many items (default: 10)")
    recommend.add_argument("--include-seen", action="store_true", help="recommend items of the history too")
    recommend.add_argument("--json", action="store_true", help="print JSON")
    recommend.add_argument("--out", type=Path, help="--histories: the csv or jsonl to write")
    recommend.add_argument("--skip-unknown", action="store_true", help="--histories: leave unknown item ids out")

    export = add_command(commands, "export", _export, "write a finished run as files for serving", """\
examples:
  recalign export runs/sasrec-beauty --to onnx
  recalign export runs/sasrec-beauty --to onnx --ann --out serving/    # with an index for approximate search
  recalign export runs/sasrec-beauty --to torch
""")  # fmt: skip
    export.add_argument("run", type=Path, help="run folder of a recommender")
    export.add_argument("--to", choices=("onnx", "torch"), required=True, help="format of the user tower")
    export.add_argument("--out", type=Path, help="folder to write (default: RUN/export/onnx or RUN/export/torch)")
    export.add_argument("--ann", "--index", action="store_true", help="also an HNSW index over the item vectors")


def _recommend(arguments: argparse.Namespace) -> None:
    _check(arguments)

    from rec.catalog import Catalog, split_ids
    from rec.histories import user_number
    from rec.job import open_run
    from rec.recommend import Request, recommend, remarks, request_for_user

    run = open_run(arguments.run)
    catalog = Catalog(run.data)
    if arguments.histories:
        _recommend_file(arguments, run, catalog)
        return
    found: list[Found] = []
    if arguments.user is not None:
        request = request_for_user(run.data, user_number(run.data, arguments.user))
    elif arguments.history is not None:
        request = Request(catalog.numbers(split_ids(arguments.history)))
    else:
        found = [catalog.search(query.strip()) for query in arguments.titles.split(";") if query.strip()]
        request = Request([one.number for one in found])
    items = recommend(run, catalog, [request], arguments.k, arguments.include_seen)[0]
    notes = [*_choices(found, catalog), *remarks(run, request, arguments.k, len(items))]
    if arguments.json:
        _print_json(run, catalog, request, items, notes)
    else:
        _print_items(run, catalog, request, items, notes)


def _check(arguments: argparse.Namespace) -> None:
    """What is wrong whatever the run holds; raises UserError."""
    if arguments.k < 1:
        raise UserError(f"-k is {arguments.k}; it must be at least 1")
    if not arguments.histories:
        for name in ("out", "skip_unknown"):
            if getattr(arguments, name):
                raise UserError(f"--{name.replace('_', '-')} belongs to --histories only")
        return
    if not arguments.out:
        raise UserError("--histories needs --out FILE, a csv or jsonl to write")
    if arguments.json:
        raise UserError("--json belongs to a single answer; for JSON from --histories name --out FILE.jsonl")

    from rec.histories import check_names

    check_names(arguments.histories, arguments.out)


def _recommend_file(arguments: argparse.Namespace, run: "FinishedRun", catalog: "Catalog") -> None:
    import torch

    from rec.histories import answer_file

    run.model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = (arguments.k, arguments.include_seen, arguments.skip_unknown)
    batch = answer_file(run, catalog, arguments.histories, arguments.out, *options)
    lines = [f"{arguments.out}: recommendations for {batch.answered:,} histories"]
    if batch.unknown:
        lines.append(f"  unknown item ids left out: {batch.unknown:,}")
    if batch.empty:
        lines.append(f"  histories without any known item, not answered: {batch.empty:,}")
    if batch.cut:
        lines.append(f"  histories longer than the model reads, of which the last items count: {batch.cut:,}")
    if batch.short:
        lines.append(f"  histories with fewer than {arguments.k} items to recommend: {batch.short:,}")
    sys.stdout.write("\n".join(lines) + "\n")


def _choices(found: list["Found"], catalog: "Catalog") -> list[str]:
    """What each search took, and what else it might have meant."""
    lines = []
    for one in found:
        line = f"{one.query!r}: took {_name(catalog, one.number)}"
        if one.others:
            others = "; ".join(_name(catalog, number) for number in one.others[:OTHERS_SHOWN])
            more = f" (and {len(one.others) - OTHERS_SHOWN:,} more)" if len(one.others) > OTHERS_SHOWN else ""
            line += f", not {others}{more}"
        lines.append(line)
    return lines


def _name(catalog: "Catalog", number: int) -> str:
    title, item = catalog.title(number), catalog.ids[number - 1]
    title = title if len(title) <= TITLE_SHOWN else f"{title[:TITLE_SHOWN]}…"
    return f"{title} [{item}]" if title else item


def _print_json(
    run: "FinishedRun", catalog: "Catalog", request: "Request", items: list["Recommendation"], notes: list[str]
) -> None:
    from rec.histories import entry

    content = {
        "model": run.model.architecture,
        "history": [catalog.ids[number - 1] for number in request.history],
        "items": [entry(item, catalog.has_text) for item in items],
        "notes": notes,
    }
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _print_items(
    run: "FinishedRun", catalog: "Catalog", request: "Request", items: list["Recommendation"], notes: list[str]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from launch.tables import console

    out, length = console(), len(request.history)
    for note in notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)
    table = Table(title=f"{run.model.architecture}, after {length:,} item{'' if length == 1 else 's'}")
    table.add_column("rank", justify="right")
    table.add_column("item", no_wrap=True)
    if catalog.has_text:
        table.add_column(catalog.title_column, overflow="fold")
    table.add_column("score", justify="right")
    # As Text: rich would take brackets in a title for its own markup.
    for number in request.history[-HISTORY_SHOWN:]:
        title = [Text(catalog.title(number), style="dim")] if catalog.has_text else []
        table.add_row("seen", Text(catalog.ids[number - 1], style="dim"), *title, "")
    table.add_section()
    for item in items:
        title = [Text(item.title)] if catalog.has_text else []
        table.add_row(str(item.rank), Text(item.item_id), *title, f"{item.score:.3f}")
    out.print(table)


def _export(arguments: argparse.Namespace) -> None:
    from rec.export import check_packages, export_run

    check_packages(arguments.to, arguments.ann)

    from rec.job import open_run

    run = open_run(arguments.run)
    out = arguments.out or run.path / "export" / arguments.to
    content = export_run(run, arguments.to, out, arguments.ann)
    _print_export(content, out)


def _print_export(content: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    from launch.tables import console

    printer, parity = console(), content["parity"]
    if "tower" in content:
        what = f"{content['tower']['file']} (reads histories of up to {content['max_length']} items)"
    else:
        what = f"{content['users']['vectors']} (a table: {content['model']} reads no histories)"
    lines = [
        f"{content['model']}: {what}; {content['items']['vectors']} ({content['n_items']:,} x {content['dim']})",
        f"Compared with the model on {parity['histories']:,} real histories (tolerance {parity['tolerance']:.0e}):"
        f" states differ by at most {parity['state']:.1e}, scores in the top 10 by {parity['top']:.1e};"
        f" {parity['same_lists']:.1%} of the lists are the same",
    ]
    for line in lines:
        printer.print(line, markup=False, soft_wrap=True)
    if "index" in content:
        index = content["index"]
        title = f"{index['file']}: {index['queries']:,} real queries, {index['threads']} threads"
        table = Table("search", "recall@10", "queries/s", "ms a query alone", title=title)
        for row in index["measured"]:
            figures = f"{row['recall']:.4f}", f"{row['queries_per_s']:,.0f}", f"{row['one_query_ms']:.3f}"
            table.add_row(row["name"], *figures)
        printer.print(table)
        printer.print(f"The index is set to efSearch {index['efSearch']}.")
    printer.print(f"Everything is in {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", soft_wrap=True)
