"""A real generator with a real vLLM: texts that are nothing are counted, and no bad weights are ever sampled from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.config import MainJob, Stages
from align.generator import Generator
from align.samples import SampleLog
from align.snapshots import LLM, RECOMMENDER, Snapshot, SnapshotStore
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from llm.tokenizer import train_tokenizer
from rec.item_encoder import IDTable, KnowledgeConcat
from rec.models.sasrec import SASRec
from rec.runtime.config import build
from rec.runtime.runfolder import RunFolder

pytestmark = pytest.mark.vllm

CANARY, STEPS, BATCH = list(range(5, 29)), 3, 4


def spread(end: int, words: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build_lmrec(LMRecConfig(dim=64, heads=2, layers=1, context=64), words, end)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def says_nothing(end: int, words: int) -> PreTrainedModel:
    """Whatever it reads, the end comes next."""
    model = spread(end, words, seed=1)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(30 * model.transformer.wte.weight[end])
    return model


def publish(
    stages: Stages, version: int, model: PreTrainedModel, harm: Callable[[Path], None] = lambda _: None
) -> Snapshot:
    """As the trainer does, with the canary of ``model``; then ``harm`` is done to the file of its weights."""
    ids = torch.tensor([CANARY])
    with torch.no_grad():
        scored = model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)

    def write(folder: Path) -> None:
        model.save_pretrained(folder / LLM)
        harm(folder / LLM / "model.safetensors")
        SASRec.from_pretrained(stages.na / "model").save_pretrained(folder / RECOMMENDER)

    return SnapshotStore(stages.snapshots).publish(version, 10 * version, write, CANARY, scored.tolist())


@pytest.fixture(scope="module")
def generator(small_data, tmp_path_factory) -> Generator:
    """One that has written all of its batches under an LLM that says nothing."""
    run = tmp_path_factory.mktemp("generator") / "run"
    job = build(
        MainJob,
        {
            "data": str(small_data.folder),
            "run": str(run),
            "rec": {"model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8}},
            "llm": {"item_text": "{title}", "knowledge": {"max_new_tokens": 6}},
            "align": {"refresh_every": 10, "max_lag_steps": 10, "wait_timeout_s": 5,
                      "trainer": {"steps": STEPS, "batch_size": BATCH}},
        },
    )  # fmt: skip
    stages, titles = Stages(run), small_data.items["title"].to_pylist()
    tokenizer = train_tokenizer(titles, 320, 64)
    tokenizer.save_pretrained(stages.llm / "model")
    model = says_nothing(tokenizer.eos_token_id, len(tokenizer))
    model.save_pretrained(stages.llm / "model")
    SASRec(job.rec.model, IDTable(small_data.n_items, 16)).save_pretrained(stages.base / "model")
    SASRec(job.rec.model, KnowledgeConcat(small_data.n_items, 16, 64)).save_pretrained(stages.na / "model")
    publish(stages, 0, model)
    generator = Generator(job)
    generator.loop()
    return generator


def test_texts_that_are_nothing_are_samples_and_counted(generator):
    log, rows = SampleLog(generator.stages.samples), RunFolder(generator.job.run).events("generated")
    texts = [text for step in range(STEPS) for one in log.read(step) for draw in one.draws for text in draw]
    assert len(texts) == STEPS * BATCH
    assert {text.text for text in texts} == {""}
    assert all(len(text.token_ids) == 1 for text in texts)
    assert sum(row["empty_texts"] for row in rows) == sum(row["texts"] for row in rows) == len(texts)


def another_tensor(path: Path) -> None:
    weights = load_file(path)
    name = next(name for name in weights if "attn" in name and weights[name].dim() > 1)
    save_file({**weights, name: weights[name] + 0.1}, path, {"format": "pt"})


def no_tensor(path: Path) -> None:
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith("ln_f.bias"))]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(("version", "harm"), [(1, another_tensor), (3, no_tensor)])
def test_weights_that_are_not_the_trainers_are_never_sampled_from(generator, version, harm):
    """The manifest vouches for the files, vLLM takes them without a word: the canary is what tells."""
    stages, end = generator.stages, generator.sources.encoder.tokenizer.eos_token_id
    words = AutoModelForCausalLM.from_pretrained(stages.llm / "model").config.vocab_size
    bad = publish(stages, version, spread(end, words, seed=10 + version), harm)
    written = SampleLog(stages.samples).next_step()
    with pytest.raises(RuntimeError, match=rf"canary differ from the trainer's by .*v00000{version}"):
        generator._refresh(bad.step)
    assert SampleLog(stages.samples).next_step() == written
    good = publish(stages, version + 1, spread(end, words, seed=10 + version))
    generator._load(good)
    assert bad.version < good.version == generator.snapshot.version
