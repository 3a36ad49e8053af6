"""A catalog's knowledge, by the real vLLM: whole after any interruption, and only what is new is generated."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from worlds import make_raw

from llm import knowledge
from llm.config import EngineConfig, LLMConfig, LMRecConfig
from llm.engine import Engine
from llm.fingerprint import fingerprint
from llm.knowledge import KnowledgeFile, Said, generate_knowledge, text_keys
from llm.lmrec import build_lmrec
from llm.tokenizer import train_tokenizer
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.runtime.config import build
from rec.runtime.errors import UserError

SETTINGS = build(LLMConfig, {"knowledge": {"max_new_tokens": 6}, "engine": {"max_num_seqs": 2}})


def make_model(folder: Path, seed: int) -> Path:
    tokenizer = train_tokenizer(["Thing number 17", "odd even"], 320, 64)
    torch.manual_seed(seed)
    model = build_lmrec(LMRecConfig(dim=64, heads=2, layers=1, context=64), len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def catalog(folder: Path, n_items: int) -> Prepared:
    prepare("test", make_raw(folder / "raw", n_items=n_items), folder / "prepared", Filters(k_core=0))
    return Prepared.load(folder / "prepared")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(scope="module")
def engine(model) -> Iterator[Engine]:
    with closing(Engine(model, EngineConfig(), max_length=64)) as engine:
        yield engine


@pytest.fixture
def asked(engine, monkeypatch) -> list[int]:
    """Makes every run use the one engine, in calls of eight prompts; collects how many prompts each call had."""
    calls: list[int] = []

    class Counted:
        def __init__(self, *_: object) -> None:
            pass

        def generate(self, prompts, *rest):
            calls.append(len(prompts))
            return engine.generate(prompts, *rest)

    monkeypatch.setattr(knowledge, "Engine", Counted)
    return calls


def texts(path: Path) -> dict[str, str]:
    table = parquet.read_table(path)
    return dict(zip(table["item_id"].to_pylist(), table["text"].to_pylist(), strict=True))


@pytest.mark.vllm
def test_a_killed_run_goes_on_and_ends_with_the_same_file(small_data, model, asked, tmp_path, monkeypatch):
    generate_knowledge(small_data, model, SETTINGS, tmp_path / "whole.parquet", "v1")
    assert asked == [8, 8, 8, 6]
    asked.clear()
    keep, kept = KnowledgeFile.keep, []

    def keep_twice_then_die(self, *arguments):
        keep(self, *arguments)
        kept.append(1)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KnowledgeFile, "keep", keep_twice_then_die)
        with pytest.raises(KeyboardInterrupt):
            generate_knowledge(small_data, model, SETTINGS, tmp_path / "killed.parquet", "v1")
    assert not (tmp_path / "killed.parquet").exists()
    generate_knowledge(small_data, model, SETTINGS, tmp_path / "killed.parquet", "v1")
    assert asked == [8, 8, 8, 6], "no text is generated twice"
    assert parquet.read_table(tmp_path / "killed.parquet").equals(parquet.read_table(tmp_path / "whole.parquet"))
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.vllm
def test_a_second_run_generates_new_items_alone(model, asked, tmp_path):
    old, new = catalog(tmp_path / "old", 30), catalog(tmp_path / "new", 34)
    out = tmp_path / "knowledge.parquet"
    generate_knowledge(old, model, SETTINGS, out, "v1")
    before = texts(out)
    asked.clear()
    generate_knowledge(new, model, SETTINGS, out, "v1")
    after = texts(out)
    assert asked == [4]
    assert len(after) == 34
    assert before.items() <= after.items()
    asked.clear()
    generate_knowledge(new, model, SETTINGS, out, "v1")
    assert asked == []
    assert texts(out) == after


@pytest.mark.vllm
def test_items_with_one_prompt_share_one_text(small_data, model, asked, tmp_path):
    settings = build(LLMConfig, {"item_text": "{kind}", "knowledge": {"max_new_tokens": 6}})
    generate_knowledge(small_data, model, settings, tmp_path / "k.parquet", "v1")
    assert asked == [2]
    assert len(set(texts(tmp_path / "k.parquet").values())) <= 2


@pytest.mark.vllm
def test_several_texts_an_item_are_rows_of_their_own_and_the_first_is_the_one_of_one(
    small_data, model, asked, tmp_path
):
    out, settings = tmp_path / "k.parquet", build(LLMConfig, {"knowledge": {"max_new_tokens": 6, "texts": 3}})
    generate_knowledge(small_data, model, SETTINGS, out, "v1")
    first = parquet.read_table(out)
    asked.clear()
    generate_knowledge(small_data, model, settings, out, "v1")
    assert sum(asked) == 2 * small_data.n_items, "the first ones are kept"
    table = parquet.read_table(out)
    assert table["item_id"].to_pylist()[::3] == first["item_id"].to_pylist()
    assert table["draw"].to_pylist() == [0, 1, 2] * small_data.n_items
    assert table["text"].to_pylist()[::3] == first["text"].to_pylist()
    assert len(set(table["key"].to_pylist())) == 3 * small_data.n_items
    assert len(set(table["text"].to_pylist())) > small_data.n_items


@pytest.mark.vllm
def test_a_text_depends_on_its_key_alone(small_data, model, asked, engine, tmp_path):
    generate_knowledge(small_data, model, SETTINGS, tmp_path / "k.parquet", "v1")
    row = parquet.read_table(tmp_path / "k.parquet").slice(11, 1).to_pylist()[0]
    prompt = engine.llm.get_tokenizer()(row["prompt"])["input_ids"]
    [alone] = engine.generate([prompt], [int(row["key"][:15], 16)], 6)
    assert alone.text.strip() == row["text"]


def test_keys_change_with_everything_that_decides_a_text(model, tmp_path):
    other = fingerprint(make_model(tmp_path / "other", 2))
    assert fingerprint(model) != other
    assert fingerprint(make_model(tmp_path / "same", 1)) == fingerprint(model)
    base = SETTINGS.knowledge
    variants = [
        (fingerprint(model), SETTINGS),
        (other, SETTINGS),
        (other, SETTINGS.model_copy(update={"engine": SETTINGS.engine.model_copy(update={"dtype": "bfloat16"})})),
        *(
            (other, SETTINGS.model_copy(update={"knowledge": base.model_copy(update=changed)}))
            for changed in ({"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 7})
        ),
    ]
    keys = [text_keys([[1, 2], [1, 2, 3], [1, 2]], *variant) for variant in variants]
    assert all(own[0] == own[2] != own[1] for own in keys)
    assert len({key for own in keys for key in own}) == 2 * len(variants)


def test_a_damaged_file_is_named(small_data, model, tmp_path):
    (tmp_path / "k.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"k\.parquet is damaged .*; delete it"):
        generate_knowledge(small_data, model, SETTINGS, tmp_path / "k.parquet", "v1")


def test_a_damaged_part_can_be_deleted_and_no_other_is_lost(tmp_path):
    file = KnowledgeFile(tmp_path / "k.parquet")
    for key in "abc":
        file.keep([key], [Said(key, False)])
    sorted(file.parts.iterdir())[1].write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"part-0000-000001\.parquet is damaged"):
        file.texts()
    (file.parts / "part-0000-000001.parquet").unlink()
    file.keep(["b"], [Said("b", False)])
    assert sorted(file.texts()) == ["a", "b", "c"]


def test_other_weights_are_another_model_in_any_file_that_transformers_reads(model, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"one")
        before = fingerprint(tmp_path)
        (tmp_path / name).write_bytes(b"two")
        assert fingerprint(tmp_path) != before


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="is no language model"):
        fingerprint(str(tmp_path / "none"))


@pytest.mark.vllm
def test_shards_are_done_in_any_order_and_end_with_the_same_file(small_data, model, asked, tmp_path):
    whole, out = tmp_path / "whole.parquet", tmp_path / "out.parquet"
    generate_knowledge(small_data, model, SETTINGS, whole, "v0")
    alone = sum(asked)
    asked.clear()
    for shard in (2, 0, 0):
        generate_knowledge(small_data, model, SETTINGS, out, "v0", (shard, 3))
        assert not out.exists()
    assert sum(asked) == round(alone * 2 / 3)
    generate_knowledge(small_data, model, SETTINGS, out, "v0", (1, 3))
    assert sum(asked) == alone
    assert parquet.read_table(out).equals(parquet.read_table(whole))
    assert not KnowledgeFile(out).parts.exists()


@pytest.mark.parametrize("text", ["3", "1/0", "2/2", "-1/2", "a/b", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011 - the command says what is wrong with which text
        knowledge.shard_of(text)
    assert knowledge.shard_of("1/3") == (1, 3)
