"""What RecBole's own evaluator says about small score matrices that anyone can make again.

The file that it writes holds the figures, the recipe of each matrix and checksums of it.
"""

import argparse
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch
from recbole.evaluator import Collector, Evaluator

USERS, ITEMS, CUTOFFS = 300, 97, [1, 5, 10, 20]
CASES = {
    "distinct": "no two scores of a user are equal",
    "ties": "nine distinct scores: RecBole ranks equal ones in whatever order torch.topk leaves them in, so that its"
    " figures lie between those of the worst and the best order, and need not be met",
    "masked": "a tenth of the items, never the positive one, are no candidates: -inf",
}


def make_case(name, seed):
    """Scores [300, 97] (float32) and the column of each user's positive item."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scores = generator.standard_normal((300, 97)).astype(np.float32)
    positives = generator.integers(0, 97, 300)
    scores[np.arange(300), positives] += 1
    if name == "ties":
        scores = np.clip(np.round(scores), -4, 4)
    if name == "masked":
        history = generator.random((300, 97)) < 0.1
        history[np.arange(300), positives] = False
        scores[history] = -np.inf
    return scores, positives


def by_recbole(scores, positives):
    """RecBole's figures; its column 0 is padding and never a candidate, as in its trainer."""
    config = {
        "metrics": ["Hit", "Recall", "NDCG", "MRR"],
        "topk": CUTOFFS,
        "metric_decimal_place": 10,
        "device": torch.device("cpu"),
        "eval_args": {"mode": "full"},
    }
    padded = np.concatenate([np.full((len(scores), 1), -np.inf, np.float32), scores], axis=1)
    collector = Collector(config)
    # In two batches, as a loader would hand them over.
    for rows in np.array_split(np.arange(len(scores)), 2):
        users, items = torch.arange(len(rows)), torch.from_numpy(positives[rows] + 1)
        collector.eval_batch_collect(torch.from_numpy(padded[rows]), None, users, items)
    metrics = Evaluator(config).evaluate(collector.get_data_struct())
    return {name: float(value) for name, value in metrics.items()}


def main():
    """Write the file, and its name as the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    cases = {}
    for name, meaning in CASES.items():
        scores, positives = make_case(name, arguments.seed)
        finite = scores[np.isfinite(scores)].astype(np.float64)
        cases[name] = {
            "meaning": meaning,
            "sum_of_finite_scores": float(finite.sum()),
            "finite_scores": len(finite),
            "sum_of_positives": int(positives.sum()),
            "metrics": by_recbole(scores, positives),
        }
    version = importlib.metadata.version("recbole")
    content = {
        "made_by": f"python -m launch.bench.peers --record-metrics FILE (RecBole {version})",
        "recbole": version,
        "seed": arguments.seed,
        "users": USERS,
        "items": ITEMS,
        "cutoffs": CUTOFFS,
        "make_case": inspect.getsource(make_case),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({"written": arguments.out.name, "cases": list(cases)}) + "\n")


if __name__ == "__main__":
    main()
