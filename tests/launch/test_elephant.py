"""The Elephant's study end to end on a tiny catalog, and the vectors of its RECFORMERs."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "llm" / "recformer"))
from backbones import save_bert
from tiny_elephant import recipe_of

from launch import vectors
from launch.elephant import cells, claims
from launch.elephant.cells import train_cell
from launch.elephant.config import TABLE_3, family_of
from launch.elephant.rates import Chosen
from launch.elephant.study import ElephantRun
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from llm.lmrec_job import LMRecJob
from llm.tokenizer import train_tokenizer
from rec.items import load_vectors, principal_components
from rec.job import RecJob, open_run
from rec.models.base import Recommender
from rec.protocol import Protocol
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def study(small_data, backbone, tmp_path_factory):
    path = recipe_of(tmp_path_factory.mktemp("elephant"), small_data.folder, backbone)
    run = ElephantRun(path)
    return path, run, run.execute("recalign reproduce test")


@pytest.mark.slow
@pytest.mark.distributed
def test_every_cell_of_the_table_is_there_with_its_seeds(study):
    _, run, result = study
    cells = {(row["model"], row["variant"], row.get("seed")) for row in result["rows"] if "protocol" in row}
    for model in ("SASRec", "BERT4Rec"):
        for variant in TABLE_3:
            seeds = (1, 2) if variant in ("random", "further items") else (1,)
            assert {seed for name, own, seed in cells if (name, own) == (model, variant)} == set(seeds)
    assert ("RECFORMER", "RECFORMER FT2", 1) in cells
    [row] = [row for row in result["means"] if (row["model"], row["variant"]) == ("SASRec", "random")]
    own = [row["NDCG@10"] for row in result["rows"] if (row["model"], row["variant"]) == ("SASRec", "random")]
    assert row["NDCG@10"] == pytest.approx(sum(own) / 2)
    assert row["NDCG@10_se"] == pytest.approx(abs(own[0] - own[1]) / 2)
    letters = {claim["id"].partition("(")[2][0] for claim in result["claims"] if claim["id"].startswith("SASRec: (")}
    assert letters == set("abcde")
    assert set(result["attention"]) == {"backbone", "tuned"}
    assert (run.out / "attention.png").is_file()
    for figures in result["serving"].values():
        assert figures["parameters"][0] == figures["parameters"][1]
    assert set(result["serving"]) == {"SASRec", "BERT4Rec"}
    assert result["diverged"] == []
    claims.print_study(result)


@pytest.mark.slow
@pytest.mark.distributed
def test_tables_begin_as_the_vectors_that_they_are_named_after(study):
    _, run, _ = study
    vectors_of = {what: load_file(run.out / "vectors" / f"{what}.safetensors")["vectors"] for what in ("PT", "FT")}
    assert not torch.equal(vectors_of["PT"], vectors_of["FT"])
    frozen = Recommender.from_pretrained(run.out / "SASRec/frozen-FT/seed-1/model")
    chosen = json.loads((run.out / "SASRec/chosen/frozen/chosen.json").read_text())
    deviation = vectors_of["FT"].std(0, correction=0).square().mean().sqrt()
    expected = vectors_of["FT"] * (1 if chosen["std"] is None else chosen["std"] / deviation)
    torch.testing.assert_close(frozen.items.vectors.weight[1:], expected)
    further = open_run(run.out / "SASRec/further-items/seed-1")
    assert further.rec.train.tune == "items"
    assert str(further.rec.train.start).endswith("SASRec/frozen-FT/seed-1")
    table = load_file(run.out / "finetuned/RECFORMER/finetune/FT1/item_vectors.safetensors")["vectors"]
    assert torch.equal(table, vectors_of["FT"])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_familys_rate_and_deviation_are_chosen_once_and_told(study):
    _, run, result = study
    for model in ("SASRec", "BERT4Rec"):
        families = {path.name for path in (run.out / model / "chosen").iterdir()}
        assert families == {"random", "frozen", "trainable", "further-all", "further-items"}
        for family in families:
            folder = run.out / model / "chosen" / family
            chosen = json.loads((folder / "chosen.json").read_text())
            tried = {path.name for path in folder.iterdir() if path.is_dir()}
            scaled = {name for name in tried if name.endswith("-std=None")}
            assert tried - scaled == {"lr=0.001", "lr=0.005"}
            assert bool(scaled) == (family in ("frozen", "trainable"))
            rows = [row for row in result["rows"] if row["model"] == model]
            rows = [row for row in rows if family_of(row["variant"]).replace(" ", "-") == family]
            assert rows
            assert {row["lr"] for row in rows} == {chosen["lrs"][0]}
            assert {row["std"] for row in rows} == {None if family == "random" else chosen["std"]}
            assert all(-1 <= row["best_epoch"] < row["epochs"] <= 2 for row in rows)
        stds = {
            json.loads((run.out / model / "chosen" / name / "chosen.json").read_text())["std"]
            for name in ("frozen", "further-all", "further-items")
        }
        assert len(stds) == 1


def test_a_recommender_that_diverges_takes_the_next_rate_and_blocks_nothing(small_data, tmp_path):
    rec = {"model": {"dim": 16, "blocks": 1, "max_length": 8}, "train": {"epochs": 1, "batch_size": 16}}
    job = build(RecJob, {"data": str(small_data.folder), "run": str(tmp_path / "seed-1"), "rec": rec})
    protocols = {"own": Protocol()}
    train_cell(job, Chosen([1e30, 1e-3], None), protocols)
    facts = json.loads((tmp_path / "seed-1/finished.json").read_text())
    assert (facts["lr"], facts["std"]) == (1e-3, None)
    assert json.loads((tmp_path / "seed-1-diverged.json").read_text()) == [1e30]
    train_cell(job, Chosen([1e30, 1e-3], None), protocols)  # which tries the diverged one no more
    other = job.model_copy(update={"run": tmp_path / "seed-2"})
    train_cell(other, Chosen([1e30], None), protocols)
    assert not (tmp_path / "seed-2").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_study_that_is_killed_goes_on_where_it_was(study, small_data, backbone, tmp_path, monkeypatch):
    _, before, _ = study
    model = {"dim": 32, "heads": 2, "blocks": 1, "max_length": 8}
    more = {
        "models": {"SASRec": {"model": model, "train": {"batch_size": 16, "epochs": 1}}},
        "variants": ["random", "frozen PT", "trainable PT"],
        "headline": {},
        "pretrained": str(before.study.run),
    }
    results, ranked = {}, cells.ranks_of
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        path = recipe_of(tmp_path / name, small_data.folder, backbone, **more)
        content = yaml.safe_load(path.read_text())
        content["recformer"]["finetune"] = None
        path.write_text(yaml.safe_dump(content))
        run, calls = ElephantRun(path), []

        def die_at_the_second(folder, protocols, calls=calls):
            calls.append(folder)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return ranked(folder, protocols)

        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(cells, "ranks_of", die_at_the_second)
                with pytest.raises(KeyboardInterrupt):
                    run.execute("test")
            kept = [path for path in run.out.rglob("model.safetensors") if "seed-1" in path.parts]
            times = {path: path.stat().st_mtime_ns for path in kept}
            assert len(times) == 2
        results[name] = run.execute("test")
        assert not list(run.study.run.glob("pretrained-*"))  # stage-PT is the other study's
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert results["killed"]["rows"][1:] == results["whole"]["rows"][1:]
    assert len(results["whole"]["rows"]) == 1 + 3


@pytest.mark.slow
@pytest.mark.distributed
def test_a_finished_study_says_what_it_found_and_trains_nothing(study, monkeypatch):
    path, _, result = study
    monkeypatch.setattr("launch.recformer._watch", None)
    monkeypatch.setattr("rec.train.train", None)
    again = ElephantRun(path).execute("recalign reproduce test")
    assert again["rows"] == result["rows"]
    # Latencies are measured again.
    first, second = ([claim for claim in found["claims"] if "low" in claim] for found in (result, again))
    assert first == second


@pytest.mark.slow
@pytest.mark.distributed
def test_vectors_of_a_recformers_run_by_stage(study, small_data, tmp_path, capsys):
    _, run, _ = study
    [pretrained] = run.study.run.glob("pretrained-*")
    finetuned = run.out / "finetuned" / "RECFORMER"
    found = {}
    for stage, source in (("vanilla", pretrained), ("PT", pretrained), ("FT", finetuned)):
        out = tmp_path / f"{stage}.safetensors"
        assert vectors.write(str(source), small_data.folder, out, stage)["stage"] == stage
        found[stage] = load_file(out)["vectors"]
        torch.testing.assert_close(found[stage], load_file(run.out / "vectors" / f"{stage}.safetensors")["vectors"])
    assert not torch.equal(found["vanilla"], found["PT"])
    # A saved model folder is as good as a run.
    vectors.write(str(pretrained / "pretrain/model"), small_data.folder, tmp_path / "folder.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "folder.safetensors")["vectors"], found["PT"])
    with pytest.raises(UserError, match=r"stage-FT of .* is not finished"):
        vectors.write(str(pretrained), small_data.folder, tmp_path / "x", "FT")
    out = tmp_path / "default.safetensors"
    assert vectors.write(str(finetuned), small_data.folder, out)["stage"] == "FT"
    # Its backbone is the model of stage-PT.
    with pytest.raises(UserError, match="is a RECFORMER that was trained"):
        vectors.write(str(finetuned), small_data.folder, tmp_path / "x", "vanilla")
    with pytest.raises(UserError, match=r"--item-text .* has no meaning here"):
        vectors.write(str(pretrained), small_data.folder, tmp_path / "x", item_text="{title}")


def test_the_vectors_of_an_lmrecs_run_begin_a_recommender_of_the_study(small_data, backbone, tmp_path):
    torch.manual_seed(0)
    texts = [f"{row['title']}, {row['kind']}" for row in small_data.items.to_pylist()]
    tokenizer = train_tokenizer(texts, 400, 48)
    model = build_lmrec(LMRecConfig(dim=32, heads=2, layers=1, context=48), len(tokenizer), tokenizer.eos_token_id)
    job = build(
        LMRecJob, {"data": str(small_data.folder), "run": str(tmp_path / "lm"), "llm": {"item_text": "{title}"}}
    )
    RunFolder(job.run).claim(job)
    model.save_pretrained(job.run / "model")
    tokenizer.save_pretrained(job.run / "model")
    own = {"model": {"dim": 32, "heads": 2, "blocks": 1, "max_length": 8}, "train": {"batch_size": 16, "epochs": 1}}
    more = {"models": {"SASRec": own}, "variants": ["random", "frozen lmrec", "trainable lmrec"], "headline": {}}
    more |= {"more": {"lmrec": str(job.run)}, "item_text": "{title}, {kind}", "lrs": [1e-3], "stds": [None]}
    path = recipe_of(tmp_path, small_data.folder, backbone, **more)
    content = yaml.safe_load(path.read_text())
    content["recformer"] |= {"pretrain": None, "finetune": None}
    path.write_text(yaml.safe_dump(content))
    run = ElephantRun(path)
    rows = run.execute("test")["rows"]
    assert [row["variant"] for row in rows] == ["random", "frozen lmrec", "trainable lmrec"]
    frozen = Recommender.from_pretrained(run.out / "SASRec/frozen-lmrec/seed-1/model").items.vectors.weight[1:]
    ids = torch.tensor([[*tokenizer(texts[7])["input_ids"], tokenizer.eos_token_id]])
    expected = model.eval().transformer(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(frozen[7], expected, rtol=1e-4, atol=1e-5)

    narrow = ElephantRun(path, ["models.SASRec.model.dim=16", "pca=true", f"run={tmp_path / 'narrow'}"])
    found = {row["variant"]: row["parameters"] for row in narrow.execute("test")["rows"]}
    assert found["trainable lmrec"] == found["random"]
    table = Recommender.from_pretrained(narrow.out / "SASRec/frozen-lmrec/seed-1/model").items.table()[1:]
    expected = principal_components(load_vectors(narrow.out / "vectors/lmrec.safetensors", small_data), 16)
    torch.testing.assert_close(table, expected)


@pytest.mark.slow
@pytest.mark.distributed
def test_recformers_that_differ_share_what_they_have_in_common(study, small_data, backbone, tmp_path):
    _, before, _ = study
    more = {
        "recformers": {
            "fixed table": [],
            "trained table": ["finetune.train_table=true"],
            "less": ["pretrain.share=0.5"],
        },
        "models": {"SASRec": {"model": {"dim": 32, "heads": 2, "blocks": 1, "max_length": 8}, "train": {"epochs": 1}}},
        "variants": ["random", "trainable PT", "id+PT"],
        "headline": {},
        "lrs": [1e-3],
        "stds": [0.02],
        "parallel": 2,
    }
    more |= {"run": str(before.study.run), "target": "other", "targets": {"other": str(small_data.folder)}}
    run = ElephantRun(recipe_of(tmp_path, small_data.folder, backbone, **more))
    result = run.execute("test")
    assert len(list(run.study.run.glob("pretrained-*"))) == 2
    first, second = (run.out / "finetuned" / name / "finetune" for name in ("fixed table", "trained table"))
    for name in ("finished.json", "item_vectors.safetensors"):
        assert (first / "FT1" / name).read_bytes() == (second / "FT1" / name).read_bytes()
    assert not RunFolder(second.parent).events("ft1_step")
    cells = [(row["variant"], row["recformer"]) for row in result["means"] if row["model"] == "SASRec"]
    # The same vectors are tried once.
    of_each = [(variant, name) for name in ("fixed table", "less") for variant in ("trainable PT", "id+PT")]
    assert sorted(cells) == sorted([("random", "fixed table"), *of_each])
    assert (run.out / "sizes.png").is_file()
