"""``recalign report``: run folders as one HTML page that needs nothing beside itself."""

import base64
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from launch.tables import describe
from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, METRICS, RESULT, RunFolder

TEMPLATE = "report.html.j2"
METRIC_NAMES = ("HR@10", "NDCG@10")
# Parts of result.json that are tables, with what they are, in the order in which a reader wants them.
TABLES = {
    "means": "Means over seeds, ± the standard error over them",
    "rows": "Rows",
    "ablations": "One half of the aligned system with the other half of the not-aligned one (SeRALM, Fig. 5)",
    "world": "What a closed world can tell",
}
FACTS = {"asynchronous": "Asynchronous training", "training": "Training", "data": "Data", "machine": "Machine"}
DATA = ("content_hash", "users", "items", "interactions")  # as little as tells data sets apart
SHOWN_ELSEWHERE = {*TABLES, *FACTS, "claims", "case_study", "protocol", "command", "config_hash"}


def write(runs: Sequence[Path], out: Path) -> None:
    """Write the page.

    Args:
        runs: run folders, or ``result.json`` files of their own; a run that is not finished is shown as far as it is.
        out: the HTML file.

    Raises:
        UserError: if one of them is no run, or a result cannot be read.
    """
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: name the page, e.g. {out / 'report.html'}")
    sections = [_section(path) for path in runs]
    source = resources.files("launch").joinpath(TEMPLATE).read_text()
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    page = template.render(sections=sections, comparisons=compare(sections), made=time.strftime("%Y-%m-%d %H:%M"))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(out, page)


def _section(path: Path) -> dict[str, Any]:
    """Everything about one run, ready to be shown."""
    folder = path if path.is_dir() else path.parent
    is_run = path.is_dir() and any((path / name).is_file() for name in (CONFIG, RESULT, METRICS))
    if not is_run and path.suffix != ".json":
        raise UserError(f"{path} is no run folder: it holds neither {CONFIG} nor {RESULT}")
    if not path.exists():
        raise UserError(f"{path} is not there")
    result = _result(path / RESULT if path.is_dir() else path)
    run = RunFolder(folder) if path.is_dir() else None
    case = result.get("case_study")
    return {
        "name": folder.resolve().name if path.is_dir() else path.stem,
        "path": str(path),
        "result": result,
        "protocol": _protocol(result.get("protocol", {})),
        "claims": result.get("claims", []),
        "tables": [(title, *table_of(result[key])) for key, title in TABLES.items() if result.get(key)],
        "facts": [(title, _flat(result[key])) for key, title in FACTS.items() if isinstance(result.get(key), dict)],
        "case": case,
        "plots": [(image.stem, _embedded(image)) for image in _plots(folder)] if run else [],
        "status": "" if result or run is None else _status(run),
        "recipe": (folder / CONFIG).read_text() if run and (folder / CONFIG).is_file() else "",
        "more": _flat({key: value for key, value in result.items() if key not in SHOWN_ELSEWHERE}),
    }


def _result(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows", []), list):
        raise UserError(f"{path} is not the result of a run")
    return found


def _protocol(protocol: dict[str, Any]) -> str:
    try:
        return describe(protocol)
    except KeyError:  # none, or one that an older version wrote
        return text_of({key: value for key, value in protocol.items() if key != "hash"})


def compare(sections: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """One table for all runs under the same protocol on the same data; figures of others do not belong there, nor of
    runs that do not say on which data they are.

    Returns:
        For each of them that holds more than one run: what they have in common, column names and cells.
    """
    groups: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for section in sections:
        result = section["result"]
        told = result.get("data")
        data = text_of({key: told[key] for key in told if key in DATA}) if isinstance(told, dict) else ""
        common = result.get("protocol", {}).get("hash", ""), data
        if not data:
            continue
        for row in result.get("means") or result.get("rows", []):
            if all(name in row for name in METRIC_NAMES):
                groups.setdefault(common, []).append((section["name"], row))
    found = []
    for (protocol, data), rows in groups.items():
        if len({name for name, _ in rows}) < 2:
            continue
        told = [{"run": name, **_identity(row), **_metrics(row)} for name, row in rows]
        found.append((f"protocol {protocol}; {data}", *table_of(told)))
    return found


def table_of(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of rows that need not have the same keys; NAME and NAME_se make one column.

    What is no single figure or word, a table within a row, is left out.
    """
    errors = {f"{name}_se" for row in rows for name in row if f"{name}_se" in row}
    nested = {name for row in rows for name, value in row.items() if isinstance(value, dict | list)}
    names = list(dict.fromkeys(name for row in rows for name in row if name not in errors | nested))
    return names, [[_cell(row, name) for name in names] for row in rows]


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row:
        return ""
    error = row.get(f"{name}_se")
    return text_of(row[name]) if error is None else f"{text_of(row[name])} ± {text_of(error)}"


def text_of(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 100 or not value else f"{value:,.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(own)}" for key, own in value.items())
    if isinstance(value, list):
        return ", ".join(map(text_of, value))
    return str(value)


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: row[key]
        for key in ("variant", "model", "method", "recformer", "protocol", "part", "trained_on")
        if key in row
    }


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for name in METRIC_NAMES for key in (name, f"{name}_se") if key in row}


def _flat(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), text_of(value)) for name, value in facts.items()]


def _plots(folder: Path) -> list[Path]:
    return [*sorted(folder.glob("*.png")), *sorted((folder / "plots").glob("*.png"))]


def _embedded(image: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"


def _status(run: RunFolder) -> str:
    """How far a run got that has no result yet."""
    events = run.events()
    if not events:
        return "not finished: nothing is logged yet"
    last = events[-1]
    step = f" of step {last['step']}" if "step" in last else ""
    ago = max(0.0, time.time() - last["time_s"])
    return f"not finished: its last event was {last['event']!r}{step}, {ago / 60:,.0f} minutes ago"
