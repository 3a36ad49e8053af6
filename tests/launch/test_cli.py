"""The command as a newcomer meets it: help, and one clear line for every mistake, before anything heavy starts."""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from refusals import assert_one_line

from launch.cli import entry
from launch.commands import delete_run
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from rec.job import RecJob
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]


def write_recipe(folder: Path, data: Path | str, **sections: dict) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": str(data), "run": str(folder / "run"), **sections}))
    return recipe


def test_help_of_every_command_has_examples_that_it_would_read():
    words = [sys.executable, "-m", "launch.cli", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0
    assert "recalign" in done.stdout
    parser, commands = entry._parser(), list(_leaves(entry._parser()))
    assert len(commands) > 20
    for command in commands:
        assert "examples:" in command.epilog, command.prog
        lines = re.findall(r"^  (recalign .*?)(?:  +#.*)?$", command.epilog.replace("\\\n", " "), re.MULTILINE)
        assert lines, command.prog
        for line in lines:
            _, rest = parser.parse_known_args(shlex.split(line)[1:])
            assert all("=" in word for word in rest), line


def _leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for command in {id(found): found for action in below for found in action.choices.values()}.values():
        yield from _leaves(command)


def test_prepare_prints_what_it_kept_and_says_what_is_missing(recalign, tmp_path):
    raw = tmp_path / "raw"
    assert_one_line(
        recalign("prepare", "table", "--raw", raw, "--out", tmp_path / "out"), "raw data not found", str(raw)
    )
    raw.mkdir()
    rows = [f"u{user},i{(user + step) % 8},{step}" for user in range(8) for step in range(6)]
    (raw / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (raw / "items.csv").write_text("\n".join(["item_id,title", *(f"i{item},Item {item}" for item in range(8))]) + "\n")
    code, out, _ = recalign("prepare", "table", "--raw", raw, "--out", tmp_path / "out")
    assert code == 0
    assert "8 users, 8 items, 48 interactions" in out
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\nu1,i1,5\nu1,i2")
    truncated = recalign("prepare", "table", "--raw", raw, "--out", tmp_path / "other")
    assert_one_line(truncated, "interactions.csv", "Row #3")
    (raw / "interactions.csv").write_text("user_id,item_id,timestamp\nu1,i1,5\n")
    assert_one_line(recalign("prepare", "table", "--raw", raw, "--out", tmp_path / "other"), "left after filtering")
    assert not (tmp_path / "other").exists()


def test_an_unknown_key_names_the_nearest(recalign, tmp_path):
    recipe = write_recipe(tmp_path, "ml-100k", rec={"train": {"lr_rate": 0.1}})
    assert_one_line(recalign("align", recipe), "unknown key 'lr_rate' in rec.train; did you mean 'lr'?")
    assert not (tmp_path / "run").exists()


def test_impossible_settings_are_refused(recalign, tmp_path):
    recipe = write_recipe(tmp_path, "ml-100k", align={"refresh_every": 50, "max_lag_steps": 10})
    assert_one_line(recalign("align", recipe), "max_lag_steps 10 is below refresh_every 50 - 1")
    recipe = write_recipe(tmp_path, "ml-100k", align={"trainer": {"batch_size": 5}})
    assert_one_line(recalign("align", recipe), "batch_size 5 is not divisible by trainer.processes 2")

    recipe = write_recipe(tmp_path, "ml-100k", rec={"model": {"dim": 64, "heads": 3}})
    assert_one_line(recalign("align", recipe), "dim 64 is not divisible by heads 3")
    recipe = write_recipe(tmp_path, "ml-100k", align={"trainer": {"bf16": True}})
    assert_one_line(recalign("align", recipe), "canary_tolerance")


def test_overrides_may_follow_options(recalign, tmp_path):
    recipe = write_recipe(tmp_path, "ml-100k")
    assert_one_line(recalign("align", recipe, "--fresh", "rec.train.lr=-1"), "rec.train.lr", "greater than 0")


def test_data_that_is_not_there_is_one_line(recalign, tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "nothing")
    assert_one_line(recalign("align", recipe), "nothing is no prepared folder", "recalign prepare")


def test_mistakes_about_text_come_before_any_training(recalign, tmp_path, small_data):
    recipe = write_recipe(tmp_path, small_data.folder, llm={"item_text": "{titel}"})
    assert_one_line(recalign("align", recipe), "titel", "item_id, title, kind")
    recipe = write_recipe(tmp_path, small_data.folder, llm={"knowledge": {"prompt": "movies please"}})
    assert_one_line(recalign("align", recipe, "--fresh"), "{item}")
    text = {"item_text": "{title}", "lmrec": {"context": 20}}
    recipe = write_recipe(tmp_path, small_data.folder, llm=text)
    assert_one_line(recalign("align", recipe, "--fresh"), "llm.lmrec.context is 20")


@pytest.mark.parametrize("model", ["BST", "LightGCN"])
def test_a_recommender_that_cannot_be_aligned_with_is_refused_early(recalign, tmp_path, small_data, model):
    recipe = write_recipe(tmp_path, small_data.folder, rec={"model": model})
    assert_one_line(recalign("align", recipe), f"rec.model {model} cannot be aligned with", "SASRec", "GRU4Rec")
    assert not (tmp_path / "run" / "base").exists()


def test_an_llm_folder_without_tokenizer_is_one_line(recalign, tmp_path, small_data):
    build_lmrec(LMRecConfig(dim=64, heads=2, layers=1, context=32), 300, 0).save_pretrained(tmp_path / "model")
    recipe = write_recipe(tmp_path, small_data.folder, llm={"model": str(tmp_path / "model")})
    assert_one_line(recalign("align", recipe), "has no usable tokenizer")
    assert not (tmp_path / "run" / "base").exists()


def test_fresh_deletes_nothing_but_a_run(recalign, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    recipe = write_recipe(tmp_path, "ml-100k")
    assert_one_line(recalign("align", recipe, "--fresh"), "is no run folder")
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_fresh_empties_what_a_link_leads_to(tmp_path):
    RunFolder(tmp_path / "scratch").claim(RecJob(data="x", run=tmp_path / "run"))
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    delete_run(tmp_path / "run")
    assert not (tmp_path / "scratch").exists()
    assert (tmp_path / "run").is_symlink()
    RunFolder(tmp_path / "run").claim(RecJob(data="x", run=tmp_path / "run"))


def test_debug_shows_where_a_mistake_was_noticed(recalign, tmp_path):
    with pytest.raises(UserError, match="recipe not found"):
        recalign("--debug", "align", tmp_path / "absent.yaml")
    assert_one_line(recalign("align", tmp_path / "absent.yaml"), "recipe not found")
