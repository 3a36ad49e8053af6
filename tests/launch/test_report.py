"""One page about runs: everything of them is there, nothing is fetched, and like is compared with like only."""

import json
import re
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import pytest

from launch import report
from launch.cli import main
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

PROTOCOL = {"hash": "abc", "candidates": "all", "seen": "rank", "ties": "mean", "cold_targets": "rank"}


class Page(HTMLParser):
    """The cells of every table, and every tag's attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.attributes: list[tuple[str, str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.tables[-1][-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")


def row(method: str, hit: float) -> dict:
    return {
        "method": method,
        "model": "SASRec",
        "HR@10": hit,
        "HR@10_se": 0.01,
        "NDCG@10": hit / 2,
        "NDCG@10_se": 0.005,
    }


DATA = {"name": "world", "users": 1234, "content_hash": "f00"}


def finished(folder, hit: float, protocol: dict = PROTOCOL, data: dict | None = DATA, **more: object):
    run = RunFolder(folder)
    more |= {} if data is None else {"data": data}
    claims = [{"id": name, "holds": holds, "figure": 0.5} for name, holds in (("it works", True), ("fast", False))]
    run.write_result("recalign align x", "hash", protocol, [row("Base", hit)], 61.0, claims=claims, **more)
    return folder


def page(*runs, out) -> tuple[str, Page]:
    report.write(runs, out)
    text = out.read_text()
    return text, Page(text)


def test_a_run_is_told_whole_and_nothing_is_fetched(tmp_path):
    case = {
        "user": "<u1>", "target": "a & b", "likelihood": [0.1, 0.2], "rank": [7.0, 1.0], "users_gaining": 0.5,
        "users_losing": 0.25, "history": [{"item": "i1", "texts": ["said before", "<script>after</script>"]}],
    }  # fmt: skip
    folder = finished(tmp_path / "one", 0.25, case_study=case, asynchronous={"steps": 1200, "verdict": "balanced"})
    (folder / "plots").mkdir()
    plt.figure().savefig(folder / "plots" / "curve.png")
    text, found = page(folder, out=tmp_path / "deep" / "report.html")
    [rows, history] = found.tables
    assert rows == [["method", "model", "HR@10", "NDCG@10"], ["Base", "SASRec", "0.2500 ± 0.0100", "0.1250 ± 0.0050"]]
    assert history[1] == ["i1", "said before", "<script>after</script>"]
    assert "<script>" not in text
    for part in ("recalign align x", "1,200", "balanced", "it works", "missed", "&lt;u1&gt;", "a &amp; b"):
        assert part in text
    sources = [value for name, value in found.attributes if name in ("src", "href")]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?://", text)


def test_only_like_is_compared_with_like(tmp_path):
    runs = [finished(tmp_path / name, hit) for name, hit in (("one", 0.1), ("two", 0.2))]
    runs.append(finished(tmp_path / "three", 0.9, {**PROTOCOL, "hash": "other"}))
    runs.append(finished(tmp_path / "four", 0.9, data={**DATA, "content_hash": "ba2"}))
    runs += [finished(tmp_path / name, 0.9, data=data) for name, data in (("five", None), ("six", "a/folder"))]
    _, found = page(*runs, out=tmp_path / "report.html")
    together = found.tables[0]
    assert [cells[0] for cells in together] == ["run", "one", "two"]
    assert [cells[-2] for cells in together[1:]] == ["0.1000 ± 0.0100", "0.2000 ± 0.0100"]
    assert len(found.tables) == 7


def test_a_run_that_is_not_finished_says_how_far_it_is(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.log("train", step=17)
    text, _ = page(run.path, out=tmp_path / "report.html")
    assert "not finished: its last event was" in text
    assert "of step 17, 0 minutes ago" in text


def test_rows_of_different_keys_share_a_table():
    names, cells = report.table_of([{"a": 1, "x": 0.5, "x_se": 0.1}, {"b": None, "x": 1e-7, "much": {"n": 1}}])
    assert names == ["a", "x", "b"]
    assert cells == [["1", "0.5000 ± 0.1000", ""], ["", "1e-07", "–"]]


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_what_is_no_result_is_one_clear_line(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)) as caught:
        report.write([path], tmp_path / "report.html")
    assert "\n" not in str(caught.value)


def test_a_path_that_is_none_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"nope\.json is not there"):
        report.write([tmp_path / "nope.json"], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a folder: name the page"):
        report.write([finished(tmp_path / "one", 0.25)], tmp_path)


def test_the_command(tmp_path, monkeypatch, capsys):
    folder, out = finished(tmp_path / "one", 0.25), tmp_path / "page.html"
    monkeypatch.setattr("sys.argv", ["recalign", "report", str(folder / "result.json"), "--out", str(out)])
    main()
    assert capsys.readouterr().out == f"{out}\n"
    assert "result" in out.read_text()
    assert json.loads((folder / "result.json").read_text())["rows"]
    monkeypatch.setattr("sys.argv", ["recalign", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "is no run folder" in capsys.readouterr().err
