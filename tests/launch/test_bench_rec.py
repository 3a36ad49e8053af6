"""What ``recalign bench rec`` makes of its measurements, and that it measures each thing once."""

import shutil
from dataclasses import replace

import pytest

from launch.bench import rec
from launch.bench.rec_rows import claims_of, rows_of, seconds_to_reach
from launch.bench.rec_tasks import Settings, tasks
from launch.tables import print_bench
from rec.protocol import Protocol
from rec.runtime import files
from rec.runtime.errors import UserError

PLACE = {"data": "d", "max_length": 50, "precision": "fp32"}


def epoch(name: str, peer: str, seconds: float, loss: str = "cross-entropy", **more) -> dict:
    row = {"stage": "epoch", "name": name, "peer": peer, "loss": loss, "seconds_per_epoch": seconds}
    return {**PLACE, **row, **more}


def convergence(name: str, peer: str, *curve: tuple[float, float]) -> dict:
    epochs = [{"spent": spent, "valid": {"NDCG@10": ndcg}} for spent, ndcg in curve]
    return {**PLACE, "stage": "convergence", "name": name, "peer": peer, "loss": "ce", "epochs": epochs}


def test_epochs_are_compared_with_the_same_work_of_ours():
    measured = [
        epoch("recalign-50-fp32-cross-entropy", "recalign", 4.0),
        epoch("recalign-50-fp32-sampled-softmax", "recalign", 1.0, "sampled-softmax"),
        epoch("recalign-50-fp32-all-windows", "recalign", 8.0),
        epoch("recalign-50-bf16-cross-entropy", "recalign", 2.0, precision="bf16"),
        epoch("recalign-200-fp32-cross-entropy", "recalign", 16.0, max_length=200),
        epoch("replay-50-fp32-cross-entropy", "replay", 44.0, "ce"),
        epoch("replay-50-fp32-sampled-softmax", "replay", 5.0, "sampled"),
        epoch("replay-50-bf16-cross-entropy", "replay", 18.0, "ce", precision="bf16"),
        epoch("recbole-50-fp32-cross-entropy", "recbole", 160.0, "ce"),
    ]
    rows = {row["name"]: row for row in rows_of(measured)}
    assert rows["replay-50-fp32-cross-entropy"]["ratio"] == 11
    assert rows["replay-50-fp32-sampled-softmax"]["ratio"] == 5
    assert rows["replay-50-bf16-cross-entropy"]["ratio"] == 9
    assert rows["recbole-50-fp32-cross-entropy"]["ratio"] == 20
    claims = {claim["id"]: claim["holds"] for claim in claims_of(list(rows.values()))}
    assert claims == {
        "epoch: replay fp32, d, length 50: at least 10x": True,
        "epoch: replay bf16, d, length 50: at least 10x": False,
        "epoch: recbole fp32, d, length 50: at least 25x": False,
    }


def test_convergence_counts_to_the_same_quality():
    ours = convergence("recalign-cross-entropy", "recalign", (10, 0.02), (20, 0.0396), (30, 0.06))
    worse = convergence("recalign-sampled-softmax", "recalign", (1, 0.01), (2, 0.03))
    peer = convergence("replay-sampled-softmax", "replay", (50, 0.03), (100, 0.0397), (150, 0.04))
    rows = {row["name"]: row for row in rows_of([ours, worse, peer])}
    row = rows["replay-sampled-softmax"]
    assert (row["seconds"], row["best"], row["ratio"]) == (100, 0.04, 5)
    (claim,) = claims_of(list(rows.values()))
    assert (claim["holds"], claim["figure"]) == (True, 5)


def test_never_getting_where_the_peer_gets_is_a_missed_claim():
    ours = convergence("recalign-sampled-softmax", "recalign", (1, 0.01), (2, 0.03))
    peer = convergence("replay-sampled-softmax", "replay", (50, 0.03), (100, 0.04))
    rows = rows_of([ours, peer])
    assert rows[1]["ratio"] is None
    assert not claims_of(rows)[0]["holds"]
    assert seconds_to_reach(ours["epochs"], 0.04) is None


def test_without_a_sasrec_to_compare_with_a_model_has_met_nothing(capsys):
    alone = {**epoch("LightSANs-50", "recalign", 9.0), "stage": "models", "model": "LightSANs"}
    killed = {"stage": "models", "name": "SASRec-50", "peer": "recalign", "data": "d", "failed": "killed"}
    [claim] = claims_of(rows_of([killed, alone]))
    assert (claim["holds"], claim["figure"]) == (False, None)
    print_bench({"rows": [], "claims": [claim]})
    assert capsys.readouterr().out.endswith(": -\n")


def test_folders_of_one_name_are_refused(small_data, tmp_path):
    with pytest.raises(UserError, match="two folders are called 'prepared'"):
        rec.run(Settings([small_data.folder, tmp_path / "prepared"], names=()), tmp_path / "out", "bench")


def test_seeds_become_one_row():
    runs = [
        {**PLACE, "stage": "quality", "name": f"SASRec-seed-{seed}", "peer": "recalign", "loss": "cross-entropy",
         "test": {"HR@10": hit, "NDCG@10": hit / 2}, "train_seconds": 10.0 * seed, "best_epoch": 5}
        for seed, hit in ((1, 0.1), (2, 0.2), (3, 0.3))
    ]  # fmt: skip
    (row,) = rows_of(runs)
    assert (row["name"], row["seeds"], row["seconds"]) == ("SASRec", 3, 20)
    assert row["HR@10"] == pytest.approx(0.2)
    assert row["HR@10_se"] == pytest.approx(0.1 / 3**0.5)


def test_a_failed_peer_is_a_row_and_not_the_end():
    failed = {"stage": "epoch", "name": "replay-50", "peer": "replay", "data": "d", "failed": "out of time"}
    rows = rows_of([epoch("recalign-50-fp32-cross-entropy", "recalign", 4.0), failed])
    assert failed in rows
    assert claims_of(rows) == []


def test_every_stage_asks_every_system(small_data):
    settings = Settings([small_data.folder], lengths=(8,), stages=("epoch", "quality"))
    asked = {(task.stage, task.peer) for task in tasks(settings)}
    assert asked == {(stage, peer) for stage in ("epoch", "quality") for peer in ("recalign", *settings.names)}


@pytest.mark.slow
def test_each_thing_is_measured_once(small_data, tmp_path, monkeypatch):
    settings = Settings([small_data.folder], lengths=(8,), names=(), seconds=0.2, stages=("floor", "evaluation"))
    first = rec.run(settings, tmp_path, "bench")
    assert [row["stage"] for row in first["rows"]] == ["floor", "floor", "evaluation"]
    assert all(row["seconds"] > 0 for row in first["rows"])
    assert first["rows"][2]["evaluated"] == small_data.n_users
    assert first["rows"][2]["protocol_hash"] == Protocol().of_run(small_data, "train").hash
    monkeypatch.setattr(rec, "_ours", lambda arguments: pytest.fail("measured again"))
    assert rec.run(settings, tmp_path, "bench")["rows"] == first["rows"]
    elsewhere = shutil.copytree(small_data.folder, tmp_path / "elsewhere" / small_data.folder.name)
    assert rec.run(replace(settings, data=[elsewhere]), tmp_path, "bench")["rows"] == first["rows"]
    kept = tmp_path / "measured" / "evaluation-prepared-recalign.json"
    files.write_json(kept, {**files.read_json(kept), "asked": "of other data"})
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        rec.run(settings, tmp_path, "bench")
