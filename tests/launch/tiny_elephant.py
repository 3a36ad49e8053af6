"""A study of the Elephant's question on a tiny catalog."""

import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "llm" / "recformer"))
from tiny_recformer import RECFORMER


def recipe_of(folder: Path, data: Path, backbone: Path, **more: object) -> Path:
    recformer = {**RECFORMER, "backbone": str(backbone)}
    recformer["pretrain"] = {**recformer["pretrain"], "sources": [str(data)], "epochs": 2}
    recformer["finetune"] = {**recformer["finetune"], "epochs": 5, "fixed_epochs": 1, "evaluate_every": 1}
    model = {"dim": 32, "heads": 2, "blocks": 1, "max_length": 8}
    train = {"batch_size": 16, "epochs": 2}
    evaluate = {"cutoffs": [5, 10]}
    content = {
        "run": str(folder / "out"),
        "target": "tiny",
        "targets": {"tiny": str(data)},
        "recformer": recformer,
        "models": {
            name: {"model": {"name": name, **model}, "train": train, "evaluate": evaluate}
            for name in ("SASRec", "BERT4Rec")
        },
        "lrs": [1e-3, 5e-3],
        "rate_epochs": 1,
        "seeds": [1, 2],
        "stds": [0.02, None],
        "headline": {name: ["random", "further items"] for name in ("SASRec", "BERT4Rec")},
        "protocols": ["elephant-full"],
        "cutoffs": [5, 10],
        **more,
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
