"""Items as key-value text, histories as token sequences, and the parts in which they are encoded."""

import copy
import logging
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from backbones import make_tokenizer

from llm.recformer import text
from llm.recformer.batches import SequenceMaker, pad, parts_of
from llm.recformer.config import SizeConfig, TextConfig
from llm.recformer.mlm import mask_tokens
from llm.recformer.text import CLS, KEY, PADDING, VALUE, ItemTokens, item_tokens, tokenise
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c"],
        "title": ["Thing number 1", "Thing", ""],
        "brand": ["", "of a toy", "odd"],
    }
)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def words(tokenizer, ids) -> str:
    return tokenizer.decode(ids).replace(" ##", "")


def test_a_worked_example_of_token_types_and_item_positions(tokenizer):
    tokens = tokenise(ITEMS, ["title", "brand"], 32, tokenizer)
    maker = SequenceMaker(tokens, SizeConfig(max_items=5, max_tokens=32), tokenizer.cls_token_id)
    batch = pad(maker([np.array([1, 2]), np.array([3])]), np.array([0, 1]), tokenizer.pad_token_id)
    # The newest item, number 2, is first; an empty attribute has no key either.
    told = [tokenizer.convert_ids_to_tokens(int(token)) for token in batch.ids[0]]
    assert told == ["[CLS]", "title", "thing", "brand", "of", "a", "toy", "title", "thing", "number", "1"]
    k, v = KEY, VALUE
    assert batch.types[0].tolist() == [CLS, k, v, k, v, v, v, k, v, v, v]
    assert batch.items[0].tolist() == [0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert words(tokenizer, batch.ids[1][:3]) == "[CLS] brand odd"
    assert batch.types[1].tolist() == [CLS, k, v, *[PADDING] * 8]
    assert batch.mask[1].tolist() == [True] * 3 + [False] * 8
    assert batch.items[1].tolist() == [0, 1, 1, *[0] * 8]


def naive_sequence(tokens: ItemTokens, history, size: SizeConfig, cls: int) -> tuple[list, list, list]:
    ids, types, items = [cls], [CLS], [0]
    for place, item in enumerate(list(reversed(history))[: size.max_items], start=1):
        for at in range(tokens.offsets[item - 1], tokens.offsets[item]):
            ids.append(int(tokens.ids[at]))
            types.append(int(tokens.types[at]))
            items.append(place)
    return ids[: size.max_tokens], types[: size.max_tokens], items[: size.max_tokens]


@pytest.mark.parametrize("size", [SizeConfig(max_items=3, max_tokens=64), SizeConfig(max_items=9, max_tokens=17)])
def test_sequences_equal_those_of_a_loop(size):
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 9, size=20)
    total = int(lengths.sum())
    tokens = ItemTokens(
        rng.integers(10, 90, size=total).astype(np.int32), rng.integers(1, 3, size=total).astype(np.int8),
        rng.integers(0, 3, size=total).astype(np.int32), np.cumsum([0, *lengths]),
    )  # fmt: skip
    histories = [rng.integers(1, 21, size=length) for length in (1, 7, 4, 12, 0)]
    made = SequenceMaker(tokens, size, 5)(histories)
    for row, history in enumerate(histories):
        own = slice(made.offsets[row], made.offsets[row + 1])
        expected = naive_sequence(tokens, history.tolist(), size, 5)
        assert (made.ids[own].tolist(), made.types[own].tolist(), made.items[own].tolist()) == expected
    rows = np.array([3, 0, 2])
    taken = made.take(rows)
    for at, row in enumerate(rows):
        own = slice(made.offsets[row], made.offsets[row + 1])
        assert taken.ids[taken.offsets[at] : taken.offsets[at + 1]].tolist() == made.ids[own].tolist()


def test_parts_hold_every_row_once_and_keep_to_their_size():
    lengths = np.random.default_rng(0).integers(1, 60, size=100)
    parts = parts_of(lengths, 128, multiple=8)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    for part in parts:
        padded = -(-lengths[part].max() // 8) * 8
        assert len(part) == 1 or len(part) * padded <= 128
    assert [len(part) for part in parts_of(np.array([300, 2]), 128)] == [1, 1]
    # What is much shorter does not wait for what is long, though all of it would fit.
    long_and_short = np.array([200] * 8 + [30] * 8)
    parts = parts_of(long_and_short, 8192)
    assert [long_and_short[part].tolist() for part in parts] == [[200] * 8, [30] * 8]
    spread = np.random.default_rng(0).integers(20, 250, size=128)
    places = sum(len(part) * spread[part].max() for part in parts_of(spread, 8192))
    assert places < 1.2 * spread.sum()


def test_attributes_that_are_too_long_are_cut_and_said(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        tokens = tokenise(ITEMS, ["title", "brand"], 3, tokenizer)
    assert "2 attributes have more than 3 tokens" in caplog.text
    assert tokens.lengths.tolist() == [3, 2 + 3, 2]
    assert words(tokenizer, tokens.ids[:3]) == "title thing number"


def test_items_without_any_text_are_one_clear_line_or_taken_as_they_are(small_data, tokenizer, tmp_path):
    items = small_data.items.set_column(1, "title", pa.array(["", *["Thing"] * (small_data.n_items - 1)]))
    data = replace(small_data, items=items.drop_columns(["kind"]))
    with pytest.raises(UserError, match=r"1 of 30 items .* no text in title, e\.g\. i\d+: .*allow_empty=true"):
        item_tokens(data, TextConfig(), tokenizer, tmp_path)
    tokens = item_tokens(data, TextConfig(allow_empty=True), tokenizer, tmp_path)
    assert words(tokenizer, tokens.ids[: tokens.offsets[1]]) == "title"
    with pytest.raises(UserError, match=r"none of llm\.recformer\.text\.attributes \(brand\); its items have: item_id"):
        item_tokens(data, TextConfig(attributes=["brand"]), tokenizer, tmp_path)


def test_what_cannot_be_seen_is_no_text(small_data, tokenizer, tmp_path):
    titles = ["\u200b \n\u200e", None, *["Thing"] * (small_data.n_items - 2)]
    data = replace(small_data, items=small_data.items.set_column(1, "title", pa.array(titles)).drop_columns(["kind"]))
    with pytest.raises(UserError, match=r"2 of 30 items .* have no text in title"):
        item_tokens(data, TextConfig(), tokenizer, tmp_path)
    # A character that the tokenizer leaves out leaves no key behind either.
    items = pa.table({"title": ["Thing", "Thing"], "brand": ["\ufffd", "toy"]})
    tokens = tokenise(items, ["title", "brand"], 32, tokenizer)
    assert words(tokenizer, tokens.ids[: tokens.offsets[1]]) == "title thing"


def test_special_tokens_that_a_title_spells_out_are_unknown_words(tokenizer):
    tokens = tokenise(pa.table({"title": ["Thing [MASK] [PAD] toy"]}), ["title"], 32, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["title", "thing", "[UNK]", "[UNK]", "toy"]


def test_tokens_are_made_once_for_what_decides_them(small_data, tokenizer, tmp_path, monkeypatch):
    config = TextConfig(attributes=["title", "kind"])
    made = item_tokens(small_data, config, tokenizer, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(text, "tokenise", None)  # calling it would fail
        again = item_tokens(small_data, config, tokenizer, tmp_path)
    for name, value in vars(made).items():
        np.testing.assert_array_equal(value, vars(again)[name])
    cut = TextConfig(attributes=["title", "kind"], attribute_tokens=2)
    assert item_tokens(small_data, cut, tokenizer, tmp_path / "cut").lengths.max() < made.lengths.max()
    names = {path.name for folder in (tmp_path, tmp_path / "cut") for path in folder.glob("items-*")}
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["number"])
    item_tokens(small_data, config, other, tmp_path / "other")
    names |= {path.name for path in (tmp_path / "other").iterdir()}
    assert len(names) == 3  # no two of them are taken for each other
    for folder in ("cut", "other"):
        shutil.rmtree(tmp_path / folder)
    item_tokens(small_data, TextConfig(attributes=["kind"]), tokenizer, tmp_path)
    [kept] = [path for path in tmp_path.iterdir() if len(ItemTokens(**text.load_file(path)).ids) == len(made.ids)]
    assert len(list(tmp_path.iterdir())) == 2
    swapped = item_tokens(small_data, TextConfig(attributes=["kind", "title"]), tokenizer, tmp_path)
    assert sorted(swapped.ids) == sorted(made.ids)
    assert swapped.ids.tolist() != made.ids.tolist()
    kept.write_bytes(kept.read_bytes()[:50])  # as a kill of another program might leave it
    np.testing.assert_array_equal(item_tokens(small_data, config, tokenizer, tmp_path).ids, made.ids)


def test_the_limits_that_a_tokenizer_comes_with_do_not_decide(small_data, tokenizer, tmp_path):
    """all-MiniLM's tokenizer.json cuts and pads to 128, which the first call takes off."""
    config = TextConfig(attributes=["title", "kind"])
    plain = item_tokens(small_data, config, tokenizer, tmp_path)
    limited = copy.deepcopy(tokenizer)
    limited.backend_tokenizer.enable_truncation(4)
    limited.backend_tokenizer.enable_padding(length=4)
    for _ in range(2):
        np.testing.assert_array_equal(item_tokens(small_data, config, limited, tmp_path / "limited").ids, plain.ids)
    assert [path.name for path in tmp_path.glob("*/items-*")] == [path.name for path in tmp_path.glob("items-*")]


def test_ranks_read_the_file_that_the_first_one_names(small_data, tokenizer, tmp_path):
    config = TextConfig(attributes=["title", "kind"])
    made = item_tokens(small_data, config, tokenizer, tmp_path)
    [path] = tmp_path.glob("items-*")

    class Second(Ranks):
        def from_first(self, compute):
            return path

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["number"])  # whatever this rank would have made of its own tokenizer
    again = item_tokens(small_data, config, other, tmp_path, Second(1, 2))
    np.testing.assert_array_equal(again.ids, made.ids)


def test_catalogs_are_joined_one_after_the_other(tokenizer):
    one, two = tokenise(ITEMS, ["title"], 9, tokenizer), tokenise(ITEMS, ["brand"], 9, tokenizer)
    both = ItemTokens.join([one, two])
    assert both.n_items == 6
    assert both.ids[both.offsets[4] : both.offsets[5]].tolist() == two.ids[two.offsets[1] : two.offsets[2]].tolist()


def test_fifteen_percent_are_masked_eighty_ten_ten(tokenizer):
    rng = np.random.default_rng(0)
    n = 30_000
    tokens = ItemTokens(
        rng.integers(5, 1000, size=n).astype(np.int32), np.full(n, VALUE, dtype=np.int8),
        np.tile(np.arange(10), n // 10).astype(np.int32), np.arange(0, n + 1, 10),
    )  # fmt: skip
    maker = SequenceMaker(tokens, SizeConfig(max_items=50, max_tokens=512), 1)
    sequences = maker(np.split(np.arange(1, n // 10 + 1), 100))
    masked = mask_tokens(sequences, 0.15, True, 3, 1000, np.random.default_rng(1))
    chosen = masked.labels >= 0
    assert chosen.sum() / n == pytest.approx(0.15, abs=0.01)
    assert not chosen[sequences.words < 0].any()  # [CLS]
    np.testing.assert_array_equal(masked.labels[chosen], sequences.ids[chosen])
    np.testing.assert_array_equal(masked.ids[~chosen], sequences.ids[~chosen])
    became = masked.ids[chosen]
    kept = became == sequences.ids[chosen]
    assert (became == 3).mean() == pytest.approx(0.8, abs=0.02)
    assert kept.mean() == pytest.approx(0.1, abs=0.02)
    assert (~kept & (became != 3)).mean() == pytest.approx(0.1, abs=0.02)


def test_the_tokens_of_a_word_are_masked_together():
    words_of = np.array([0, 0, 1, 2, 2, 2, 0, 1, 1], dtype=np.int32)
    tokens = ItemTokens(
        np.arange(10, 19, dtype=np.int32), np.full(9, VALUE, dtype=np.int8), words_of, np.array([0, 6, 9])
    )
    maker = SequenceMaker(tokens, SizeConfig(max_items=9, max_tokens=64), 1)
    sequences = maker([np.array([1, 2, 2, 1])] * 50)
    chosen = mask_tokens(sequences, 0.3, True, 3, 20, np.random.default_rng(2)).labels >= 0
    inside = sequences.words >= 0
    for owner, word in {
        *zip(np.repeat(np.arange(50), sequences.lengths)[inside], sequences.words[inside], strict=True)
    }:
        own = (np.repeat(np.arange(50), sequences.lengths) == owner) & (sequences.words == word)
        assert len(set(chosen[own].tolist())) == 1
    each = mask_tokens(sequences, 0.3, False, 3, 20, np.random.default_rng(2)).labels >= 0
    assert (chosen != each).any()
