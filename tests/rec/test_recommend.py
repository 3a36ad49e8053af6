"""Recommendations of finished runs: every model, every way to name a history, every mistake in one line."""

import csv
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from rec.catalog import Catalog, split_ids
from rec.data.prepared import Prepared
from rec.histories import answer_file, user_number
from rec.job import FinishedRun, open_run
from rec.models import MODELS
from rec.recommend import Request, recommend, remarks, request_for_user
from rec.runtime.errors import UserError


@pytest.fixture
def sasrec(finished_run) -> FinishedRun:
    return open_run(finished_run("SASRec"))


def with_items(data: Prepared, **columns: list[str]) -> Prepared:
    """``data`` with other texts, or ids."""
    return replace(data, items=pa.table({"item_id": data.items["item_id"], **columns}))


def answers(run: FinishedRun, *history: int, **options) -> list[str]:
    return [item.item_id for item in recommend(run, Catalog(run.data), [Request(list(history))], **options)[0]]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_recommends_its_best_unseen_items(finished_run, name):
    run = open_run(finished_run(name))
    catalog, users = Catalog(run.data), [0, 7, 39]
    requests = [request_for_user(run.data, user) for user in users]
    found = recommend(run, catalog, requests, 5)
    for user, request, items in zip(users, requests, found, strict=True):
        window = torch.tensor([request.history[-run.model.config.max_length :]])
        with torch.no_grad():
            scores = run.model.score_all(torch.tensor([user]), window, torch.tensor([window.shape[1]]))[0].tolist()
        unseen = [number for number in range(1, run.data.n_items + 1) if number not in request.history]
        best = sorted(unseen, key=lambda number: -scores[number - 1])[:5]
        assert [item.number for item in items] == best
        assert [item.rank for item in items] == [1, 2, 3, 4, 5]
        assert [item.item_id for item in items] == [catalog.ids[number - 1] for number in best]
        assert [item.title for item in items] == [f"Thing number {item.item_id[1:]}" for item in items]
        assert [item.score for item in items] == pytest.approx([scores[number - 1] for number in best], abs=1e-5)


def test_a_history_of_many_lengths_in_one_call_changes_no_answer(sasrec):
    catalog, requests = Catalog(sasrec.data), [Request([3]), Request([1, 2, 3, 4, 5, 6, 7]), Request([9, 9])]
    together = recommend(sasrec, catalog, requests, 4)
    for request, items in zip(requests, together, strict=True):
        alone = recommend(sasrec, catalog, [request], 4)[0]
        assert [item.item_id for item in items] == [item.item_id for item in alone]
    assert recommend(sasrec, catalog, [], 4) == []


def test_items_of_the_history_are_left_out_unless_wanted(sasrec):
    assert not {"i1", "i4"} & set(answers(sasrec, *Catalog(sasrec.data).numbers(["i1", "i4"]), k=30))
    everything = answers(sasrec, 1, 2, k=30, include_seen=True)
    assert sorted(everything) == sorted(Catalog(sasrec.data).ids)


def test_only_the_last_items_of_a_long_history_are_read_and_that_is_said(sasrec):
    history = [*range(1, 13)]
    assert sasrec.model.config.max_length == 8
    read = answers(sasrec, *history[-8:], include_seen=True, k=30)
    assert answers(sasrec, *history, include_seen=True, k=30) == read
    # What is not read is left out all the same.
    assert answers(sasrec, *history, k=30) == [item for item in read if item not in Catalog(sasrec.data).ids[:12]]
    assert remarks(sasrec, Request(history), 3, 3) == [
        "the history has 12 items, more than the model reads: only its last 8 count"
    ]
    assert remarks(sasrec, Request(history[:8]), 3, 3) == []


@pytest.mark.parametrize(("name", "reach"), [("SASRec", 8), ("BERT4Rec", 7), ("Caser", 5), ("LightGCN", None)])
def test_what_is_said_to_be_read_is_what_the_model_reads(finished_run, name, reach):
    found = open_run(finished_run(name))
    said = [f"the history has 9 items, more than the model reads: only its last {reach} count"] if reach else []
    assert remarks(found, Request([*range(1, 10)], user=0), 3, 3) == said
    if reach:
        assert answers(found, *range(1, 10), include_seen=True) == answers(
            found, 20, *range(10 - reach, 10), include_seen=True
        )


def test_more_than_can_be_recommended_gives_all_there_are_and_says_so(sasrec):
    assert len(answers(sasrec, 1, 2, 2, k=1000)) == 28
    assert remarks(sasrec, Request([1, 2]), 1000, 28) == ["1,000 were asked for, only 28 can be recommended"]
    everything = Request([*range(1, 31)])
    assert recommend(sasrec, Catalog(sasrec.data), [everything], 3) == [[]]
    assert "nothing to recommend" in remarks(sasrec, everything, 3, 0)[-1]


def test_empty_histories_and_an_impossible_k_are_refused(sasrec):
    with pytest.raises(UserError, match="the history is empty"):
        answers(sasrec)
    with pytest.raises(UserError, match="k is 0"):
        answers(sasrec, 1, k=0)
    for nothing in ("", "  ", ",", " , "):
        with pytest.raises(UserError, match="the history is empty"):
            split_ids(nothing)


def test_a_model_of_users_takes_no_history(finished_run):
    run = open_run(finished_run("LightGCN"))
    with pytest.raises(UserError, match=r"LightGCN .* cannot read a history: name one with --user .*SASRec") as error:
        answers(run, 1, 2)
    assert "LightGCN," not in str(error.value)
    # However long the history is: it is not read, so there is nothing to remark.
    assert remarks(run, request_for_user(run.data, 3), 2, 2) == []
    vars(run.data)["train_ends"] = run.data.offsets[:-1]
    assert "was trained on nothing of this user" in remarks(run, request_for_user(run.data, 3), 2, 2)[0]


def test_a_diverged_model_is_one_line(sasrec):
    with torch.no_grad():
        sasrec.model.items.ids.weight[5] = math.nan
    with pytest.raises(UserError, match="it has diverged"):
        answers(sasrec, 1)


def test_ids_may_hold_spaces_and_commas(small_data):
    items = small_data.items.set_column(0, "item_id", pa.array(["red cup", "a, b", "Thé", *map(str, range(27))]))
    catalog = Catalog(replace(small_data, items=items))
    assert catalog.numbers(split_ids('red cup, "a, b",Thé , 5')) == [1, 2, 3, 9]
    with pytest.raises(UserError, match="a double quote is left open"):
        split_ids('red cup, "a, b')
    with pytest.raises(UserError, match=r"unknown item 'Red Cup'; did you mean 'red cup'\?"):
        catalog.numbers(["Red Cup"])
    with pytest.raises(UserError, match=r"unknown item 'red cpu'; did you mean 'red cup'\?"):
        catalog.numbers(["red cpu"])


def test_an_unknown_id_without_a_near_one_shows_what_ids_look_like(small_data):
    catalog = Catalog(small_data)
    with pytest.raises(UserError, match=r"unknown item 'zzzz'; ids look like 'i\d+'$"):
        catalog.numbers(["zzzz"])
    with pytest.raises(UserError, match="to name items by title use --titles"):
        catalog.numbers(["number 12"])


def titled(data: Prepared, *titles: str) -> Catalog:
    """A catalog whose first items have these titles."""
    rest = [f"Nothing {number}" for number in range(len(titles), data.n_items)]
    return Catalog(with_items(data, title=[*titles, *rest]))


@pytest.mark.parametrize(
    "titles",
    [
        ("alien", "Alien 3"),
        ("Alien: Resurrection", "My Alien"),
        ("My alien friend", "Aliens"),
        ("Those Aliens", "Lien of Al"),
    ],
)
def test_a_better_match_goes_before_popularity(small_data, titles):
    better, worse = titles
    counts = small_data.train_counts[1:]
    unpopular, popular = int(counts.argmin()), int(counts.argmax())
    texts = ["Nothing"] * small_data.n_items
    texts[unpopular], texts[popular] = better, worse
    assert Catalog(with_items(small_data, title=texts)).search("ALIEN").number == unpopular + 1


def test_equal_matches_are_told_apart_by_popularity_and_the_others_named(small_data):
    order = small_data.train_counts[1:].argsort(descending=True, stable=True).tolist()
    texts = ["Nothing"] * small_data.n_items
    for place in (2, 10, 20):
        texts[order[place]] = f"Toy Story {place}"
    found = Catalog(with_items(small_data, title=texts)).search(" toy  STORY ")
    assert [found.number, *found.others] == [order[place] + 1 for place in (2, 10, 20)]
    assert Catalog(with_items(small_data, title=texts)).search("toy story 10").others == []


def test_a_title_goes_before_other_text_and_all_words_may_stand_anywhere(small_data):
    rest = ["Nothing"] * 28
    data = with_items(small_data, brand=["Acme", "", *rest], title=["Anvil", "The great Acme story", *rest])
    catalog = Catalog(data)
    assert catalog.title_column == "title"
    assert catalog.search("acme").number == 2
    assert catalog.search("story acme").number == 2
    assert (
        Catalog(with_items(data, brand=["Acme", "", *rest], title=["Anvil", "Saw", *rest])).search("acme").number == 1
    )


def test_a_search_takes_words_as_they_are(small_data):
    catalog = titled(small_data, "What? (1999)", "What Else", "C++ [2nd]")
    assert catalog.search("what? (").number == 1
    assert catalog.search("c++ [2nd]").number == 3


def test_titles_that_are_nowhere_name_the_nearest(small_data):
    catalog = titled(small_data, "Toy Story", "Alien")
    with pytest.raises(UserError, match=r"no item's text contains 'toi storey'; nearest titles: 'Toy Story'"):
        catalog.search("toi storey")
    with pytest.raises(UserError, match="try fewer words"):
        catalog.search("qqqqqqqqqqq")


@pytest.mark.parametrize("columns", [{}, {"title": [""] * 30}])
def test_items_without_text_are_recommended_by_id_and_not_searched(sasrec, columns):
    run = replace(sasrec, data=with_items(sasrec.data, **columns))
    items = recommend(run, Catalog(run.data), [Request([1])], 3)[0]
    assert [item.title for item in items] == [""] * 3
    assert [item.item_id for item in items] == answers(sasrec, 1, k=3)
    with pytest.raises(UserError, match=r"have no text to search; name them by id with --history"):
        Catalog(run.data).search("thing")


def test_a_user_has_everything_that_is_known(small_data):
    number = user_number(small_data, "u17")
    request = request_for_user(small_data, number)
    assert len(request.history) == 14
    assert request.history[-1] == int(small_data.targets("test")[number])
    with pytest.raises(UserError, match=r"unknown user 'U17'; did you mean 'u17'"):
        user_number(small_data, "U17")


# Files of histories.

HISTORIES = [["i1", "i2"], ["i5"], ["i9", "i9", "i10"]]


def write_csv(path: Path) -> None:
    lines = ["user_id,history", *(f'v{row},"{", ".join(ids)}"' for row, ids in enumerate(HISTORIES))]
    path.write_text("\n".join(lines) + "\n")


def write_gzip(path: Path) -> None:
    write_csv(path)
    path.write_bytes(gzip.compress(path.read_bytes()))


def write_jsonl(path: Path) -> None:
    rows = [{"user_id": f"v{row}", "history": ids, "more": 1} for row, ids in enumerate(HISTORIES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.table({"user_id": ["v0", "v1", "v2"], "history": HISTORIES}), path)


WRITERS = {".csv": write_csv, ".csv.gz": write_gzip, ".jsonl": write_jsonl, ".parquet": write_parquet}


def answer(run: FinishedRun, source: Path, out: Path, k: int = 3, skip_unknown: bool = False) -> list[int]:
    return list(vars(answer_file(run, Catalog(run.data), source, out, k, False, skip_unknown)).values())


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_gets_the_answers_that_single_histories_get(sasrec, tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"carts{suffix}")
    catalog = Catalog(sasrec.data)
    wanted = [recommend(sasrec, catalog, [Request(catalog.numbers(ids))], 3)[0] for ids in HISTORIES]
    assert answer(sasrec, tmp_path / f"carts{suffix}", tmp_path / "new" / "out.jsonl") == [3, 0, 0, 0, 0]
    found = [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == [1, 2, 3]
    assert [row["user_id"] for row in found] == ["v0", "v1", "v2"]
    for row, items in zip(found, wanted, strict=True):
        assert [item["item_id"] for item in row["items"]] == [item.item_id for item in items]
        assert [item["score"] for item in row["items"]] == pytest.approx([item.score for item in items], abs=1e-5)
    answer(sasrec, tmp_path / f"carts{suffix}", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == ["row", "user_id", "rank", "item_id", "title", "score"]
    assert [line["item_id"] for line in lines] == [item.item_id for items in wanted for item in items]
    assert [line["title"] for line in lines] == [item.title for items in wanted for item in items]


def test_many_rows_go_through_in_batches(sasrec, tmp_path):
    rows = [{"history": [f"i{step % 30}", f"i{(step * 7 + 1) % 30}"]} for step in range(41)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate = sasrec.rec.evaluate.model_copy(update={"batch_size": 8})
    run = replace(sasrec, rec=sasrec.rec.model_copy(update={"evaluate": evaluate}))
    answer(sasrec, tmp_path / "in.jsonl", tmp_path / "whole.jsonl")
    answer(run, tmp_path / "in.jsonl", tmp_path / "parts.jsonl")
    whole, parts = ((tmp_path / name).read_text().splitlines() for name in ("whole.jsonl", "parts.jsonl"))
    assert len(whole) == 41
    for one, other in zip(map(json.loads, whole), map(json.loads, parts), strict=True):
        assert [item["item_id"] for item in one["items"]] == [item["item_id"] for item in other["items"]]
        assert "user_id" not in one


@pytest.mark.parametrize("name", ["SASRec", "LightGCN"])
def test_a_file_of_users_means_their_known_histories(finished_run, tmp_path, name):
    run = open_run(finished_run(name))
    # The history of u3 is an empty field: not there.
    (tmp_path / "in.csv").write_text("user_id\nu3\nu12\n" if name == "LightGCN" else "user_id,history\nu3,\nu12,\n")
    answer(run, tmp_path / "in.csv", tmp_path / "out.jsonl", k=2, skip_unknown=True)
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, user in zip(found, ("u3", "u12"), strict=True):
        request = request_for_user(run.data, user_number(run.data, user))
        wanted = recommend(run, Catalog(run.data), [request], 2)[0]
        assert row["user_id"] == user
        assert [item["item_id"] for item in row["items"]] == [item.item_id for item in wanted]


MISTAKES: list[tuple[str, str, str]] = [
    ("a.csv", "history\ni1\n\"i2,i77\"\n", r"a\.csv, data row 2: unknown item 'i77'; did you mean 'i7'"),
    ("a.csv", "history,more\ni1,x\n,x\n", r"a\.csv, data row 2: the history is empty"),
    ("a.csv", "items\ni1\n", r"a\.csv has neither a column 'history' nor 'user_id'; it has: items"),
    ("a.csv", "user_id\nu1\nnobody\n", r"a\.csv, data row 2: unknown user 'nobody'"),
    ("a.jsonl", '{"history": ["i1"]}\n\n{"history": []}\n', r"a\.jsonl, line 3: the history is empty"),
    ("a.jsonl", '{"history": ["i1", 2.5]}\n', r"a\.jsonl, line 1: '2.5' in history is no id"),
    ("a.jsonl", '{"history": 5}\n', r"a\.jsonl, line 1: history is '5', neither a list of ids nor text"),
    ("a.jsonl", '{"histories": ["i1"]}\n', r"a\.jsonl, line 1: neither 'history' nor 'user_id'"),
    ("a.jsonl", "[]\n", r"a\.jsonl, line 1: not a JSON object"),
    ("a.parquet", "no parquet", r"a\.parquet cannot be read"),
    ("a.txt", "i1", r"a\.txt: histories come as \.csv, \.jsonl, \.parquet"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_a_mistake_in_a_file_names_file_and_row_and_leaves_no_answers(sasrec, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        answer(sasrec, tmp_path / name, tmp_path / "out.csv")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_unknown_items_are_left_out_and_counted_when_asked(sasrec, tmp_path):
    (tmp_path / "in.csv").write_text('history\n"i1,new,i2"\nnew\n"newer,i5,newest"\n')
    assert answer(sasrec, tmp_path / "in.csv", tmp_path / "out.jsonl", skip_unknown=True) == [2, 4, 1, 0, 0]
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["row"] for row in found] == [1, 3]
    numbers = Catalog(sasrec.data).numbers(["i1", "i2"])
    assert [item["item_id"] for item in found[0]["items"]] == answers(sasrec, *numbers, k=3)


def test_empty_histories_are_counted_when_unknown_ones_are(sasrec, tmp_path):
    (tmp_path / "in.csv").write_text("history\ni1\n\nnowhere\ni2\n")
    with pytest.raises(UserError, match="data row 2: the history is empty"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv")
    assert answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv", skip_unknown=True) == [2, 1, 2, 0, 0]
    assert {line.partition(",")[0] for line in (tmp_path / "out.csv").read_text().splitlines()} == {"row", "1", "4"}
    (tmp_path / "in.csv").write_text('user_id,history\ncart1,i1\ncart2,\ncart3," "\ncart4,","\n')
    assert answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv", skip_unknown=True) == [1, 0, 3, 0, 0]
    (tmp_path / "in.jsonl").write_text('{"history": ["i1"]}\n{"history": null}\n{"history": []}\n')
    assert answer(sasrec, tmp_path / "in.jsonl", tmp_path / "out.csv", skip_unknown=True) == [1, 0, 2, 0, 0]
    with pytest.raises(UserError, match="data row 2: unknown user 'cart2'"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv")


@pytest.mark.parametrize("text", ['["i1", "i2"]', "['i1', 'i2']"])
def test_a_printed_list_is_no_history(text):
    with pytest.raises(UserError, match="is a list: write id1,id2 here"):
        split_ids(text)


def test_a_title_is_found_whatever_stands_before_it(small_data):
    ids = pa.array([f"i{number}" for number in range(small_data.n_items)])
    texts = {name: pa.array([name] * small_data.n_items) for name in ("brand_name", "subtitle", "title")}
    data = replace(small_data, items=pa.table({"item_id": ids, **texts}))
    assert Catalog(data).title_column == "title"
    assert Catalog(replace(data, items=data.items.drop(["title"]))).title_column == "subtitle"


def test_short_lists_are_counted(sasrec, tmp_path):
    (tmp_path / "in.csv").write_text("history\ni1\n")
    assert answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv", k=30) == [1, 0, 0, 1, 0]


def test_histories_that_the_model_cuts_are_counted(sasrec, finished_run, tmp_path):
    ids = ",".join(f"i{number}" for number in range(9))
    (tmp_path / "in.csv").write_text(f'history,user_id\n"{ids}",u1\n"{ids[3:]}",u2\n')
    assert sasrec.model.config.max_length == 8
    assert answer(sasrec, tmp_path / "in.csv", tmp_path / "out.csv")[4] == 1


def test_files_that_cannot_be_read_or_written_are_one_line(sasrec, tmp_path):
    write_csv(tmp_path / "in.csv")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"histories not found: .*absent.csv"):
        answer(sasrec, tmp_path / "absent.csv", tmp_path / "out.csv")
    with pytest.raises(UserError, match=r"out.parquet: recommendations are written as \.csv or \.jsonl"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "out.parquet")
    before = (tmp_path / "in.csv").read_bytes()
    with pytest.raises(UserError, match="is the file of histories itself"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "in.csv")
    assert (tmp_path / "in.csv").read_bytes() == before
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"folder\.csv is a folder"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "folder.csv")
    with pytest.raises(UserError, match="cannot be written"):
        answer(sasrec, tmp_path / "in.csv", tmp_path / "file" / "out.csv")
