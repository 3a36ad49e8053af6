"""Studies: what is shared, what is summed up, and what a closed world tells; the main jobs themselves are elsewhere."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import yaml
from worlds import prepare_anew

from align.config import Stages
from launch.alignment import closed_world, study, study_plot
from launch.alignment.study import BY, StudyRun
from launch.seeds import means
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.data.readers import closed_world as world
from rec.runtime.arrow_files import write_table
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]
BEFORE = ("base", "llm", "na")


class Pretended:
    """Instead of a main job: notes what it did, and leaves what one leaves behind."""

    ran: ClassVar[list[tuple[str, bool]]] = []

    def __init__(self, job) -> None:
        self.job = job

    def execute(self, command: str, stop_before_alignment: bool = False) -> dict[str, Any] | None:
        stages = Stages(self.job.run)
        for name in BEFORE:
            path = self.job.run / name / "finished.json"
            if not path.exists():
                self.ran.append((f"{self.job.run.parent.name} {name}", stop_before_alignment))
                path.parent.mkdir(parents=True)
                path.write_text(str(self.job.rec.train.seed))
        write_table(stages.na_knowledge, pa.table({"text": ["a"], "draw": [0]}))
        if stop_before_alignment:
            return None
        rows = [{"model": "SASRec", "method": method, "HR@10": 0.1 * n + self.job.rec.train.seed, "NDCG@10": 0.0}
                for n, method in enumerate(("Base", "Base+SeRALM"))]  # fmt: skip
        result = {"rows": rows, "protocol": {"hash": "x"}, "wall_s": 1.0}
        (self.job.run / "result.json").write_text(json.dumps(result))
        return result


@pytest.fixture
def recipe(tmp_path, small_data, monkeypatch) -> Path:
    monkeypatch.setattr(study, "MainJobRun", Pretended)
    monkeypatch.setattr(Pretended, "ran", [])
    job = {"data": str(small_data.folder), "run": "unused", "rec": {"model": {"max_length": 8}}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    variants = {
        "plain": [],
        "slow": ["align.refresh_every=100"],
        "dropout": ["align.id_dropout=0.5"],
        "aside": ["align.reward_users=0.2"],
        "aside and slow": ["align.reward_users=0.2", "align.refresh_every=100"],
    }
    path = tmp_path / "study.yaml"
    content = {"job": "job.yaml", "run": str(tmp_path / "out"), "seeds": [3, 4], "variants": variants}
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_comes_before_alignment_is_done_once_for_those_that_have_it_in_common(recipe, tmp_path):
    result = StudyRun(recipe).execute("test")
    # plain and slow; dropout; with users aside, twice. What reads texts is trained three times a seed, the LLM and the
    # recommender without texts once, and all of it before alignment.
    assert Pretended.ran == [(f"seed-{seed} {name}", True) for seed in (3, 4) for name in (*BEFORE, "na", "na")]
    for seed in (3, 4):
        for variant in ("plain", "slow", "dropout", "aside", "aside and slow"):
            run = tmp_path / "out" / f"seed-{seed}" / variant
            assert (run / "na" / "finished.json").read_text() == str(seed)
            assert not list(run.glob(".*"))
    assert {(row["seed"], row["variant"]) for row in result["rows"]} >= {(3, "plain"), (4, "aside and slow")}
    assert StudyRun(recipe).execute("test")["rows"] == result["rows"]
    fewer = StudyRun(recipe, ["seeds=[4]", "variants={plain: []}"]).execute("test")
    assert fewer["rows"] == [row for row in result["rows"] if (row["seed"], row["variant"]) == (4, "plain")]
    with pytest.raises(UserError, match="holds a run of another recipe"):
        StudyRun(recipe, ["seeds=[4]", "job.rec.train.epochs=7"]).execute("test")


def test_a_study_does_not_go_on_with_data_that_were_prepared_anew(recipe, small_data, tmp_path):
    shutil.copytree(small_data.folder, tmp_path / "data")
    overrides = [f"job.data={tmp_path / 'data'}", "seeds=[3]"]
    StudyRun(recipe, [*overrides, "variants={plain: []}"]).execute("test")
    prepare_anew(tmp_path / "data")
    for variants in ("{plain: []}", "{slow: [align.refresh_every=100]}"):  # done already; what comes before is
        with pytest.raises(UserError, match=r"reads were made anew since it was begun"):
            StudyRun(recipe, [*overrides, f"variants={variants}"]).execute("test")


def test_a_new_variant_takes_no_stage_of_data_that_there_were_before(recipe, small_data, tmp_path):
    shutil.copytree(small_data.folder, tmp_path / "data")
    overrides = [f"job.data={tmp_path / 'data'}", "seeds=[3]"]
    StudyRun(recipe, [*overrides, "variants={small: []}"]).execute("test")
    prepare_anew(tmp_path / "data")
    before = len(Pretended.ran)
    StudyRun(recipe, [*overrides, "variants={wide: [rec.model.dim=32]}"]).execute("test")
    assert [name for name, _ in Pretended.ran[before:]] == [f"seed-3 {name}" for name in BEFORE]


def test_another_recommender_shares_the_llm_and_another_llm_the_recommender(recipe):
    variants = "{small: [], wide: [rec.model.dim=32], other: [llm.train.epochs=7], few: [train_users=0.5]}"
    StudyRun(recipe, ["seeds=[3]", f"variants={variants}"]).execute("test")
    assert [name for name, _ in Pretended.ran] == [
        f"seed-3 {name}" for name in (*BEFORE, "base", "na", "llm", "na", *BEFORE)
    ]


def test_the_result_says_on_which_data_if_all_are_on_the_same(recipe):
    assert "data" not in StudyRun(recipe).execute("test")
    found = StudyRun(recipe)
    for job in found.jobs.values():
        path = job.run / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "data": {"content_hash": "f00"}}))
    assert found.execute("test")["data"] == {"content_hash": "f00"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": {"content_hash": "ba2"}}))
    assert "data" not in found.execute("test")


def test_a_study_that_is_finished_costs_nothing_more(recipe, tmp_path):
    first = StudyRun(recipe).execute("test")
    again = StudyRun(recipe).execute("test")
    assert {**first, "peak_rss_bytes": 0} == {**again, "peak_rss_bytes": 0}
    assert len(RunFolder(tmp_path / "out" / "seed-3" / "slow").events("studied")) == 1


def test_means_and_standard_errors_over_seeds(recipe):
    found = StudyRun(recipe).execute("test")["means"]
    [row] = [row for row in found if row["variant"] == "slow" and row["method"] == "Base+SeRALM"]
    assert row["seeds"] == 2
    assert row["HR@10"] == pytest.approx(3.6)
    assert row["HR@10_se"] == pytest.approx(0.5)  # of 3.1 and 4.1
    [alone] = means([{"variant": "v", "model": "m", "method": "x", "HR@10": 0.5, "NDCG@10": 0.25}], BY)
    assert (alone["HR@10"], alone["HR@10_se"], alone["seeds"]) == (0.5, None, 1)


def test_overrides_of_the_study_and_of_its_jobs(recipe, tmp_path):
    found = StudyRun(recipe, ["seeds=[5]", "variants={one: [align.trainer.steps=7]}", "job.rec.train.epochs=2"])
    [(key, job)] = found.jobs.items()
    assert key == (5, "one")
    assert (job.align.trainer.steps, job.rec.train.epochs, job.align.trainer.seed) == (7, 2, 5)
    assert job.run == tmp_path / "out" / "seed-5" / "one"


def test_a_variant_that_is_null_is_left_out(recipe):
    found = {name for _, name in StudyRun(recipe, ["variants.slow=null", "variants.aside=null"]).jobs}
    assert found == {"plain", "dropout", "aside and slow"}
    with pytest.raises(UserError, match=r"variants\.slwo=null: there is none to leave out; there are: "):
        StudyRun(recipe, ["variants.slwo=null"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seeds=[]", "seeds: List should have at least 1 item"),
        ("variants={a/b: []}", "variant 'a/b'"),
        ("variants={a: [align.trainer.stepz=1]}", "unknown key 'stepz'"),
        ("jbo=1", "unknown key 'jbo'"),
    ],
)
def test_a_mistake_in_any_variant_is_found_before_anything_runs(recipe, override, message):
    with pytest.raises(UserError, match=message):
        StudyRun(recipe, [override])
    assert Pretended.ran == []


def test_a_closed_world_has_the_seed_of_its_study(recipe, tmp_path):
    of_a_world = ["job.data=closed-world", "seeds=[1, 2]", "variants={a: [], b: []}"]
    with pytest.raises(UserError, match=r"align\.watch needs all of its facts"):
        StudyRun(recipe, of_a_world)
    found = StudyRun(recipe, [*of_a_world, "job.align.watch=[taste, look, origin, company]"])
    assert found.worlds == set(found.jobs)
    assert found.jobs[2, "a"].data == found.jobs[2, "b"].data == str(tmp_path / "out" / "seed-2" / "world")
    assert not StudyRun(recipe).worlds


@pytest.fixture
def small_world(tmp_path) -> Prepared:
    prepare("closed-world", world.make(world.World(items=40, values=4, users=60)), tmp_path / "w", Filters(k_core=0))
    return Prepared.load(tmp_path / "w")


def test_shares_count_the_first_text_of_each_item(small_world, tmp_path):
    taste, look = (small_world.items[name].to_pylist() for name in ("taste", "look"))
    half = small_world.n_items // 2
    first = [*taste[:half], *look[half:-1], "nothing"]
    texts = [text for pair in zip(first, look, strict=True) for text in pair]
    path = tmp_path / "k.parquet"
    write_table(path, pa.table({"text": texts, "draw": [0, 1] * small_world.n_items}))
    found = closed_world.shares(small_world, path)
    assert found["taste"] == pytest.approx(half / small_world.n_items)
    assert found["look"] == pytest.approx((small_world.n_items - half - 1) / small_world.n_items)
    assert found["origin"] == found["company"] == 0


def test_steps_to_a_level_by_the_mean_of_a_window():
    rows = [{"said": 0.5}] * 10 + [{"said": 1.0}] * 40
    assert closed_world.steps_to(rows, "said", 0.9) == 10 + 16
    assert closed_world.steps_to(rows, "said", 1.1) is None
    assert closed_world.steps_to(rows[:5], "said", 0.1) is None


GOOD = {"oracle": 0.3, "na": 0.1, "relevant_before": 0.26, "relevant_after": 0.95, "gap_closed": 0.9,
        "shared_s": 60.0, "wall_s": 240.0}  # fmt: skip


def test_where_the_oracle_is_no_better_there_is_no_gap_to_close():
    assert closed_world.gap_closed(0.1, 0.25, 0.3) == pytest.approx(0.75)
    assert math.isnan(closed_world.gap_closed(0.1, 0.08, 0.09))
    assert math.isnan(closed_world.gap_closed(0.1, 0.1, 0.1))


def test_claims_are_about_the_worst_seed():
    assert [claim["holds"] for claim in closed_world.claims([GOOD, GOOD])] == [True] * 5
    bad = {"oracle": 0.19, "na": 0.1, "relevant_before": 0.1, "relevant_after": 0.89, "gap_closed": 0.79,
           "shared_s": 600.0, "wall_s": 660.0}  # fmt: skip
    found = closed_world.claims([GOOD, bad])
    assert [claim["holds"] for claim in found] == [False] * 5
    assert [claim["figure"] for claim in found] == [1.9, 0.89, 0.79, 0.1, 21]


@pytest.mark.parametrize("order", [1, -1])
def test_a_figure_that_is_no_number_never_holds_whichever_seed_has_it(order):
    found = closed_world.claims([GOOD, {**GOOD, "gap_closed": math.nan}][::order])
    assert [claim["holds"] for claim in found] == [True, True, False, True, True]
    assert found[2]["figure"] == "no number"


def test_the_curve_is_drawn_of_runs_that_have_gaps_unknown(recipe, small_world, tmp_path):
    job = StudyRun(recipe, [f"job.data={small_world.folder}"]).jobs[3, "plain"]
    driving = small_world.meta["options"]["driving"]
    for step in range(30):
        row = {f"said_{driving}": step / 30, f"gap_{driving}": None if step % 3 else 0.2, "kl": 0.1}
        RunFolder(job.run).log("train", step=step, **row)
    path = closed_world.draw(tmp_path, {(3, "plain"): job})
    assert path.stat().st_size > 10_000


def test_variants_are_drawn_where_a_method_lacks_in_one_and_errors_are_unknown(tmp_path):
    figures = {"model": "SASRec", "HR@10": 0.2, "HR@10_se": None, "NDCG@10": 0.1, "NDCG@10_se": 0.01}
    means = [{**figures, "variant": name, "method": "Base"} for name in ("few users", "all")]
    path = study_plot.draw(tmp_path, [*means, {**figures, "variant": "all", "method": "Base+SeRALM"}])
    assert path.stat().st_size > 10_000


STUDIES = [path for path in sorted((ROOT / "launch/recipes/reproduce").glob("*.yaml")) if "job" in read_recipe(path)]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_is_in_order_and_says_how_it_is_run(path, tmp_path):
    found = StudyRun(path, [f"run={tmp_path}"])
    assert len(found.jobs) == len(found.study.seeds) * len(found.study.variants)
    assert path.read_text().startswith(f"# recalign reproduce {path.stem}\n")
