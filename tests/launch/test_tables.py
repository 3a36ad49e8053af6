"""What the terminal shows of figures."""

from launch import tables


def figures(**values: float) -> dict[str, float]:
    named = {name.replace("_at_", "@"): value for name, value in values.items()}
    return named | {f"{name}_se": 0.001 for name in named}


def content(name: str, **values: float) -> dict:
    protocol = {
        "hash": "0123", "candidates": "all", "seen": "mask", "ties": "mean", "cold_targets": "rank",
    }  # fmt: skip
    groups = {"cold": {"instances": 7, **figures(HR_at_10=0.25, NDCG_at_10=0.125, MRR=0.2)}}
    return {
        "name": name, "model": "SASRec", "part": "test", "instances": 22363, "metrics": figures(**values),
        "protocol": protocol, "remarks": ["meant for something else"], "groups": groups,
    }  # fmt: skip


def test_every_protocol_is_a_column_and_metrics_stand_in_order(capsys):
    one = content("strict", MRR=0.05, NDCG_at_10=0.0554, HR_at_10=0.0913)
    other = content("recbole", HR_at_5=0.05, HR_at_10=0.082, NDCG_at_10=0.0396, MRR=0.0326)
    tables.print_evaluations([one, other], groups=True)
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert rows[:5] == [
        ["instances", "22,363", "22,363"],
        ["HR@5", "-", "0.0500 ± 0.0010"],
        ["HR@10", "0.0913 ± 0.0010", "0.0820 ± 0.0010"],
        ["NDCG@10", "0.0554 ± 0.0010", "0.0396 ± 0.0010"],
        ["MRR", "0.0500 ± 0.0010", "0.0326 ± 0.0010"],
    ]
    assert rows[5] == ["cold", "7", "0.2500 ± 0.0010", "0.1250 ± 0.0010", "0.2000 ± 0.0010"]
    assert "…" not in said
    assert said.count("note: meant for something else") == 2


def test_a_run_without_a_better_epoch_says_so():
    training = {"best_epoch": -1, "trained_on": "train"}
    assert tables._best_epoch(training) == "none: the model as it came"
    assert tables._best_epoch({**training, "trained_on": "train+valid"}) == "the last"
    assert tables._best_epoch({**training, "best_epoch": 4}) == "5"


def test_a_study_of_worlds_shows_means_worlds_and_claims(capsys):
    world = {
        "variant": "SeRALM", "seed": 3, "relevant_before": 0.25, "relevant_after": 0.985, "true_after": 0.99,
        "steps_to_relevant": None, "base": 0.08, "na": 0.1, "aligned": 0.28, "oracle": 0.3, "gap_closed": 0.9,
        "shared_s": 60.0, "wall_s": 270.0,
        "precondition": {
            "gap": 0.06, "gap_se": 0.004, "signal_to_noise": 0.39, "pairs": 1250,
            "best_share": {"1.0": 0.43, "11.3137": 1.0},
        },
    }  # fmt: skip
    mean = {"variant": "SeRALM", "model": "SASRec", "method": "Base", "seeds": 1, "HR@10": 0.08, "HR@10_se": None}
    claims = [{"id": "it works", "holds": True, "figure": 0.9}, {"id": "it flies", "holds": False, "figure": 0.1},
              {"id": "it sings", "holds": False, "figure": "no number"}]  # fmt: skip
    tables.print_study({"means": [mean], "world": [world], "claims": claims})
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert rows[0] == ["SeRALM", "SASRec Base", "1", "0.0800"]
    assert rows[1] == [
        "SeRALM", "3", "0.25 → 0.98", "0.99", "never", "0.080", "0.100", "0.280", "0.300", "90%", "5.5",
    ]  # fmt: skip
    assert "43% at temperature 1, 100% at temperature 11.3" in said
    assert "holds  it works: 0.900" in said
    assert "MISSED  it flies: 0.100" in said
    assert "MISSED  it sings: no number" in said
