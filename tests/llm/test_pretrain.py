import pytest
import torch
from transformers import AutoModelForCausalLM

from llm.config import LLMConfig
from llm.pretrain import _known, make_tokenizer, pretrain
from llm.prompts import item_texts, prompt_tokens
from llm.tokenizer import load_tokenizer
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

CONFIG = build(
    LLMConfig,
    {
        "item_text": "{title}",
        "lmrec": {"vocabulary": 400, "context": 48, "dim": 32, "layers": 1, "heads": 1},
        "train": {"epochs": 3, "batch_size": 16, "lr": 5e-3, "checkpoint_every": 4},
    },
)


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


def test_an_lm_learns_to_say_what_is_known_of_the_items_it_was_shown(small_data, tmp_path):
    config = build(
        LLMConfig,
        {
            "lmrec": {"vocabulary": 400, "context": 48, "dim": 64, "layers": 1, "heads": 2},
            "train": {"on": "knowledge", "knowledge_columns": ["kind"], "epochs": 60, "lr": 5e-3, "batch_size": 16},
        },
    )
    folder = pretrain(small_data, config, RunFolder(tmp_path))
    tokenizer, model = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = prompt_tokens(item_texts(small_data.items, "{title}"), "{item} →", tokenizer)
    said = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=4, pad_token_id=0)
        said.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    assert said == small_data.items["kind"].to_pylist()


def test_a_share_of_the_items_is_a_share_of_the_texts(small_data):
    def known(**train):
        config = build(LLMConfig, {"train": {"on": "knowledge", "knowledge_columns": ["kind", "title"], **train}})
        return _known(small_data, config)

    whole, third, again = known(), known(knowledge_share=1 / 3), known(knowledge_share=1 / 3)
    assert all(len(own) == 2 for own in whole)
    assert sum(bool(own) for own in third) == 10
    assert third == again != known(knowledge_share=1 / 3, seed=1)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"on": "knowledge"}, "go together"),
        ({"knowledge_columns": ["kind"]}, "go together"),
        ({"knowledge_share": 0.5}, "knowledge_share is for"),
    ],
)
def test_settings_of_knowledge_that_nothing_would_read_are_refused(train, message):
    with pytest.raises(UserError, match=message):
        build(LLMConfig, {"train": train})


def test_an_unknown_column_names_the_columns_there_are(small_data):
    config = build(LLMConfig, {"train": {"on": "knowledge", "knowledge_columns": ["colour"]}})
    with pytest.raises(UserError, match="names 'colour', the prepared items have: item_id, title, kind"):
        make_tokenizer(small_data, config)
