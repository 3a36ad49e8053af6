"""Studies and benchmarks of LMRec, end to end on a tiny world."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from launch.bench.lmrec import padded_batches
from launch.bench.machine import processor
from launch.controls import Popularity, Transitions
from launch.lmrec import study
from launch.lmrec.study import LMRecStudyRun, claims
from llm.corpus import IGNORED
from rec.config import EvaluateConfig
from rec.evaluation import evaluate
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]
JOB = {
    "llm": {
        "lmrec": {"vocabulary": 400, "context": 48, "dim": 32, "layers": 1, "heads": 2},
        "recommend": {"pairs": 16, "prefixes": 2, "negatives": 8},
        "train": {"zero_stage": 0, "steps": 4, "rows": 4, "micro_rows": 4, "validate_every": 2, "precision": "fp32"},
    },
}
STUDY = {
    "pretrain": "job.yaml", "run": "unused", "seeds": [0, 1], "packing_steps": 1,
    "sizes": True, "inference_users": 8, "curvature_batches": 2,
    "variants": {
        "LMRec -lm": ["llm.language=false"],
        "LMRec": [],
        "SelfPretrain": {"first": ["llm.recommend=null"], "then": ["llm.language=false"]},
        "LM probed": {"first": ["llm.recommend=null"], "probe": ["llm.probe.steps=20"]},
    },
    "paper": {"LMRec": {"HR@10": 0.3, "NDCG@10": 0.2}, "BST": {"HR@10": 0.2, "NDCG@10": 0.1}},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path, small_data):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump({"data": str(small_data.folder), "run": "unused", **JOB}))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**STUDY, "run": str(tmp_path / "study")}, sort_keys=False))
    return tmp_path / "study.yaml"


def recalign(*words: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_study_runs_its_variants_once_and_says_what_holds(tmp_path, recipe):
    done = recalign("reproduce", recipe, "seeds=[0]")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "study" / "result.json").read_text())
    assert [row["variant"] for row in result["rows"]] == list(STUDY["variants"])
    assert all(0 < row["HR@10"] <= 1 for row in result["rows"])
    by_name = {row["variant"]: row for row in result["means"]}
    assert all(row["HR@10_se"] > 0 for row in result["means"] if row["seeds"])  # of one seed, over users
    assert by_name["LMRec"]["paper"] == STUDY["paper"]["LMRec"]
    assert {"popularity", "last-item transitions"} <= set(by_name)
    assert (by_name["BST"]["seeds"], by_name["BST"]["paper"]) == (0, STUDY["paper"]["BST"])
    assert result["packing"]["packed"] > 0 < result["packing"]["padded"]
    assert result["claims"][0]["id"] == "LMRec beats LMRec -lm in HR@10"
    assert len({claim["id"] for claim in result["claims"]}) == len(result["claims"])
    for name in ("lmrec", "sizes", "inference", "eigenvalues"):
        assert (tmp_path / "study" / f"{name}.png").stat().st_size > 5_000
    assert [row["model"] for row in result["inference"]][1:] == ["LightGCN", "LMRec^TL on user features"]
    assert result["inference"][0]["parameters"] > result["inference"][2]["parameters"] == 2 * 32 * (32 + 1)
    assert [row["variant"] for row in result["eigenvalues"]] == list(STUDY["variants"])
    assert all(row["smallest"] <= row["median"] <= row["largest"] for row in result["eigenvalues"])
    assert "0.3000 / 0.2000" in done.stdout
    assert "last-item transitions" in done.stdout
    own = tmp_path / "study" / "seed-0"
    assert (own / "SelfPretrain" / "then" / "model" / "model.safetensors").exists()
    before = (own / "LMRec" / "metrics.jsonl").read_bytes()
    lines = (tmp_path / "study" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "study" / "metrics.jsonl").write_text("".join(lines[:-1]))  # killed in the last batch
    again = recalign("reproduce", recipe, "seeds=[0]", "variants.SelfPretrain=null")
    assert again.returncode == 0, again.stderr[-3000:]
    assert (own / "LMRec" / "metrics.jsonl").read_bytes() == before
    kept = RunFolder(tmp_path / "study").events("eigenvalues")
    assert len(kept) == 2 * len(STUDY["variants"])
    assert kept[-1]["values"] == json.loads(lines[-1])["values"]


def test_kinds_of_user_features_are_rows_of_their_own(recipe, monkeypatch):
    facts = {"steps": 4, "parameters": 9, "tokens": 100, "seconds": 2.0}
    monkeypatch.setattr(study.pretraining, "pretrain", lambda job: {"rows": [], "training": facts})
    kinds = [{"feature": kind, "HR@10": 0.1, "NDCG@10": 0.1} for kind in ("specific", "agnostic")]
    monkeypatch.setattr(study.probe, "run", lambda job, command: {"rows": kinds})
    found = LMRecStudyRun(recipe)._run(0, "LM probed")
    assert [row["variant"] for row in found] == ["LM probed, specific", "LM probed, agnostic"]


def test_a_variant_that_is_null_is_left_out(recipe):
    names = list(LMRecStudyRun(recipe).study.variants)
    assert "LMRec -lm" in names
    fewer = LMRecStudyRun(recipe, ["variants.LMRec -lm=null"])
    assert list(fewer.study.variants) == [name for name in names if name != "LMRec -lm"]
    assert not any(name == "LMRec -lm" for _, name in fewer.jobs)
    with pytest.raises(UserError, match=r"variants\.LMRec -ml=null: there is none to leave out; there are: "):
        LMRecStudyRun(recipe, ["variants.LMRec -ml=null"])


def test_impossible_studies_are_refused_before_anything_runs(tmp_path, recipe):
    with pytest.raises(UserError, match="unknown key 'langage'"):
        LMRecStudyRun(recipe, ["variants.LMRec=[llm.langage=false]"])
    with pytest.raises(UserError, match="exactly one of then and probe"):
        LMRecStudyRun(recipe, ["variants.LMRec={first: []}"])
    with pytest.raises(UserError, match="it names a folder"):
        LMRecStudyRun(recipe, ["variants={a/b: []}"])
    with pytest.raises(UserError, match="other than specific need agnostic"):
        LMRecStudyRun(recipe, ["variants={probed: {first: [], probe: ['llm.probe.features=[agnostic]']}}"])
    with pytest.raises(UserError, match=r"llm.train.seed"):
        LMRecStudyRun(recipe, ["seeds=[-1]"])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch" / "recipes" / "reproduce").glob("lmrec-*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_study_is_possible_and_begins_with_its_command(path):
    study = LMRecStudyRun(path)
    assert {name for _, name in study.jobs} == set(study.study.variants)
    assert path.read_text().startswith(f"# recalign reproduce {path.stem}\n")


def test_claims_are_held_to_means_over_seeds():
    rows = [
        row_of("LMRec", 1, 0.15, 0.05), row_of("LMRec", 2, 0.17, 0.07),
        row_of("LMRec -lm", 1, 0.13, 0.08), row_of("LMRec -lm", 2, 0.15, 0.07),
    ]  # fmt: skip
    found = {claim["id"]: claim for claim in claims(rows, {"LMRec": {"HR@10": 0.2}}, {"packed": 3.0, "padded": 2.0})}
    assert found["LMRec beats LMRec -lm in HR@10"] == {
        "id": "LMRec beats LMRec -lm in HR@10",
        "holds": True,
        "figure": 0.02,
        "se": 0.0,
    }
    within = found["LMRec beats LMRec -lm in NDCG@10"]
    assert (within["holds"], within["undecided"], within["figure"], within["se"]) == (False, True, -0.015, 0.015)
    near = found["LMRec is within 10% of the paper's HR@10 (ratio)"]
    assert (near["holds"], near["figure"]) == (False, 0.8)
    assert found["packed rows train more useful tokens a second than padded ones (ratio)"]["figure"] == 1.5


@pytest.mark.parametrize(
    ("difference", "holds", "undecided"), [(0.007, True, None), (0.005, False, True), (-0.007, False, None)]
)
def test_one_seeds_difference_is_held_against_the_error_over_users(difference, holds, undecided):
    rows = [row_of("LMRec, Eq. 5", 0, 0.1 + difference, 0.1), row_of("LMRec -lm, Eq. 5", 0, 0.1, 0.1)]
    claim = claims(rows, {}, {})[0]
    assert claim["id"] == "LMRec, Eq. 5 beats LMRec -lm, Eq. 5 in HR@10"
    assert claim["se"] == pytest.approx(0.002 * 2**0.5, rel=0.01)
    assert (claim["holds"], claim.get("undecided")) == (holds, undecided)


def test_more_seeds_do_not_make_a_difference_from_a_control_any_surer():
    """All of them are tested on the same users."""
    control = {"variant": "popularity", "HR@10": 0.095, "NDCG@10": 0.1, "HR@10_se": 0.002, "NDCG@10_se": 0.002}
    for seeds in (1, 3):
        rows = [row_of("LMRec", seed, 0.1, 0.1) for seed in range(seeds)]
        claim = claims(rows, {}, {}, [control])[0]
        assert claim["id"] == "LMRec beats popularity in HR@10"
        assert (claim["holds"], claim["undecided"], claim["se"]) == (False, True, 0.00283)


def test_two_seeds_are_few_and_transfer_is_held_against_transfer():
    rows = [
        row_of("LMRec^TL, combine", 1, 0.12, 0.1), row_of("LMRec^TL -lm, combine", 1, 0.1, 0.1),
        row_of("LMRec^TL, combine", 2, 0.13, 0.1), row_of("LMRec^TL -lm, combine", 2, 0.1, 0.1),
    ]  # fmt: skip
    claim = claims(rows, {}, {})[0]
    assert claim["id"] == "LMRec^TL, combine beats LMRec^TL -lm, combine in HR@10"
    assert (claim["holds"], claim["undecided"]) == (False, True)  # t of one degree of freedom is 5, 95 % need 12.7


def row_of(variant: str, seed: int, hits: float, gain: float) -> dict:
    return {"variant": variant, "seed": seed, "HR@10": hits, "NDCG@10": gain, "HR@10_se": 0.002, "NDCG@10_se": 0.002}


def test_controls_score_what_they_say(small_data):
    users, items = torch.tensor([0, 1]), torch.tensor([[3, 5, 0], [2, 4, 9]])
    lengths = torch.tensor([2, 3])
    popular, following = Popularity(small_data), Transitions(small_data)
    counts = small_data.train_counts[1:]
    assert popular.score_all(users, items, lengths).argsort(descending=True)[0, 0] == counts.argmax()
    naive = torch.zeros(2, small_data.n_items)
    for user in range(small_data.n_users):
        own = small_data.sequence[small_data.offsets[user] : small_data.train_ends[user]].tolist()
        for earlier, later in itertools.pairwise(own):
            for row, last in enumerate((5, 9)):
                naive[row, later - 1] += earlier == last
    scores = following.score_all(users, items, lengths)
    torch.testing.assert_close(scores.floor(), naive)
    assert (scores - naive < 1).all()
    found = evaluate(following, small_data, "test", EvaluateConfig())["HR@10"]
    assert found > 0.7 > evaluate(popular, small_data, "test", EvaluateConfig())["HR@10"]


@pytest.mark.parametrize("by_length", [False, True])
def test_padded_batches_hold_every_document_once_and_keep_to_their_places(by_length):
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 90, size=rng.integers(2, 40)).tolist() for _ in range(200)]
    batches = padded_batches(documents, 120, 0, 7, by_length)
    assert all(batch.ids.numel() <= 120 for batch in batches)
    found = [row[row != IGNORED].tolist() for batch in batches for row in batch.labels]
    assert sorted(found) == sorted(documents)
    padding = sum(batch.ids.numel() for batch in batches) / sum(map(len, documents))
    assert (padding < 1.15) == by_length
    lengths = [batch.ids.shape[1] for batch in batches]
    assert lengths != sorted(lengths)


@pytest.mark.slow
def test_the_bench_measures_each_thing_once(tmp_path, recipe):
    words = ("bench", "lmrec", tmp_path / "job.yaml", "--steps", "1", "--out", tmp_path / "bench", "--only")
    done = recalign(*words, "packed,padded,padded-by-length,trainer,matmul,gpu")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "bench" / "result.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert all(rows[name]["tokens_per_s"] > 0 for name in ("packed", "padded", "padded-by-length", "trainer"))
    assert rows["gpu"]["not_measured"] == "no NVIDIA GPU here"
    assert all(row["machine"].startswith(f"{processor()}, ") for row in rows.values())
    assert len(result["claims"]) == 3
    before = (tmp_path / "bench" / "metrics.jsonl").read_bytes()
    assert recalign(*words, "packed,trainer").returncode == 0
    assert (tmp_path / "bench" / "metrics.jsonl").read_bytes() == before
    refused = recalign(*words, "speed")
    assert refused.returncode == 2
    assert "unknown measurement 'speed'" in refused.stderr
