import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.config import LLMConfig, PretrainConfig
from llm.pretrain import learning_rate, pretrain
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.runfolder import RunFolder

CONFIG = build(
    LLMConfig,
    {
        "item_text": "{title}",
        "lmrec": {"vocabulary": 400, "context": 48, "dim": 32, "layers": 1, "heads": 1},
        "train": {"epochs": 3, "batch_size": 16, "lr": 5e-3, "checkpoint_every": 4},
    },
)


def test_the_schedule_is_a_function_of_the_step():
    config = PretrainConfig(lr=1.0, warmup_fraction=0.1)
    assert learning_rate(0, 100, config) == pytest.approx(0.1)
    assert learning_rate(9, 100, config) == pytest.approx(1.0)
    assert learning_rate(55, 100, config) == pytest.approx(0.55)
    assert learning_rate(100, 100, config) == pytest.approx(0.1)


def test_a_killed_and_resumed_pretraining_equals_an_undisturbed_one(small_data, tmp_path, monkeypatch):
    whole = pretrain(small_data, CONFIG, RunFolder(tmp_path / "a"))
    saved, count = Checkpoints.save, []

    def save_twice_then_die(self, *args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return saved(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_twice_then_die)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small_data, CONFIG, RunFolder(tmp_path / "b"))
    resumed = pretrain(small_data, CONFIG, RunFolder(tmp_path / "b"))
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (whole, resumed)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    losses = [[row["loss"] for row in RunFolder(tmp_path / name).steps("lm_step")] for name in "ab"]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.75 * losses[0][0]
