"""``recalign recommend`` and ``recalign export`` as they are typed: what they print, and how they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import assert_one_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(finished_run) -> Path:
    return finished_run("SASRec")


def test_a_history_prints_a_table(recalign, run):
    code, out, _ = recalign("recommend", run, "--history", "i3, i4", "-k", "4")
    assert code == 0
    lines = out.splitlines()
    assert "SASRec, after 2 items" in lines[0]
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│")] == ["seen", "seen", *"1234"]
    assert sum("Thing number" in line for line in lines) == 6
    assert "note:" not in out


def test_json_is_the_same_answer(recalign, run):
    code, out, _ = recalign("recommend", run, "--history", "i3,i4", "-k", "3", "--json")
    content = json.loads(out)
    assert code == 0
    assert content["history"] == ["i3", "i4"]
    assert content["notes"] == []
    assert [item["rank"] for item in content["items"]] == [1, 2, 3]
    assert all(item["title"] == f"Thing number {item['item_id'][1:]}" for item in content["items"])
    table = recalign("recommend", run, "--history", "i3,i4", "-k", "3")[1]
    assert [item["item_id"] for item in content["items"]] == [
        line.split("│")[2].strip() for line in table.splitlines() if line.startswith("│") and "seen" not in line
    ]
    seen = json.loads(recalign("recommend", run, "--history", "i3,i4", "-k", "99", "--json", "--include-seen")[1])
    assert len(seen["items"]) == 30
    assert seen["notes"] == ["99 were asked for, only 30 can be recommended"]


def test_titles_say_what_they_took(recalign, run):
    code, out, _ = recalign("recommend", run, "--titles", "thing number 12; NUMBER; ", "-k", "2")
    assert code == 0
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert notes[0] == "note: 'thing number 12': took Thing number 12 [i12]"
    assert notes[1].startswith("note: 'NUMBER': took Thing number ")
    assert ", not Thing number " in notes[1]
    assert notes[1].endswith("(and 26 more)")
    assert_one_line(recalign("recommend", run, "--titles", "thing nubmer 12"), "nearest titles: 'Thing number 12'")
    assert_one_line(recalign("recommend", run, "--titles", " ; "), "the history is empty")


def test_a_user_is_answered_with_a_note_on_a_long_history(recalign, run):
    code, out, _ = recalign("recommend", run, "--user", "u4", "-k", "2")
    assert code == 0
    assert "after 14 items" in out
    assert "note: the history has 14 items, more than the model reads: only its last 8 count" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--history", "i3,i44"], ["unknown item 'i44'; did you mean 'i4'"]),
        (["--history", ""], ["the history is empty"]),
        (["--history", "i1", "-k", "0"], ["-k is 0"]),
        (["--user", "u99"], ["unknown user 'u99'; did you mean"]),
        (["--history", "i1", "--out", "x.csv"], ["--out belongs to --histories only"]),
        (["--histories", "x.csv"], ["--histories needs --out FILE"]),
        (["--histories", "x.csv", "--out", "y.csv"], ["histories not found: x.csv"]),
        (["--histories", "x.csv", "--out", "y.csv", "--json"], ["--json belongs to a single answer"]),
    ],
)
def test_mistakes_are_one_line(recalign, run, arguments, parts):
    assert_one_line(recalign("recommend", run, *arguments), *parts)


def test_a_folder_without_a_run_is_one_line(recalign, tmp_path):
    assert_one_line(recalign("recommend", tmp_path, "--history", "i1"), "is no run folder of a recommender")
    assert_one_line(recalign("export", tmp_path, "--to", "torch"), "is no run folder of a recommender")


def test_a_way_to_name_the_history_must_be_given(recalign, run):
    code, _, err = recalign("recommend", run)
    assert code == 2
    assert "one of the arguments --history --titles --user --histories is required" in err


def test_a_model_of_users_answers_users_alone(recalign, finished_run):
    run = finished_run("LightGCN")
    assert_one_line(recalign("recommend", run, "--history", "i1"), "LightGCN", "name one with --user")
    code, out, _ = recalign("recommend", run, "--user", "u4", "-k", "2")
    assert code == 0
    assert "LightGCN, after 14 items" in out


def test_a_file_is_answered_into_a_file(recalign, run, tmp_path):
    (tmp_path / "carts.csv").write_text('history\n"i1,i2"\n"i3,what"\n')
    options = ("--histories", tmp_path / "carts.csv", "--out", tmp_path / "out.jsonl", "-k", "29")
    assert_one_line(recalign("recommend", run, *options), "carts.csv, data row 2: unknown item 'what'")
    assert not (tmp_path / "out.jsonl").exists()
    code, out, _ = recalign("recommend", run, *options, "--skip-unknown")
    assert code == 0
    assert out.splitlines() == [
        f"{tmp_path / 'out.jsonl'}: recommendations for 2 histories",
        "  unknown item ids left out: 1",
        "  histories with fewer than 29 items to recommend: 1",
    ]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_export_says_what_it_wrote_and_measured(recalign, run):
    code, out, err = recalign("export", run, "--to", "onnx", "--index")
    assert code == 0
    assert err == ""
    assert out.startswith("SASRec: tower.onnx (reads histories of up to 8 items); items.safetensors (30 x 16)\n")
    assert "100.0% of the lists are the same" in out
    assert "recall@10" in out
    assert "exact" in out
    names = "config.json, items.faiss, items.parquet, items.safetensors, tower.onnx"
    assert f"Everything is in {run / 'export' / 'onnx'}: {names}" in out
    # The run folder is still one.
    assert recalign("recommend", run, "--history", "i1")[0] == 0


def test_export_refuses_what_cannot_be(recalign, finished_run, tmp_path):
    assert_one_line(recalign("export", finished_run("BST"), "--to", "torch"), "BST", "has no user state to export")
    (tmp_path / "out").write_text("x")
    run = finished_run("SASRec")
    assert_one_line(recalign("export", run, "--to", "torch", "--out", tmp_path / "out"), "is no earlier export")
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("command", ["recommend", "export"])
def test_help_has_examples_and_needs_no_heavy_import(command):
    heavy = "import sys; from launch import cli; sys.argv = ['recalign', sys.argv[1], '--help']\n"
    heavy += "try: cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", heavy, command], cwd=ROOT, capture_output=True, text=True, timeout=900, check=True
    )
    assert "examples:" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
