import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from worlds import make_raw

from llm import probe
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from llm.probe import run
from llm.probe_features import FeatureReader, Features
from llm.probe_job import ProbeConfig, load_job
from llm.prompts import item_texts
from llm.recommendation import TextRows
from llm.tokenizer import ARROW, train_tokenizer
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder


@pytest.fixture(scope="module")
def model(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "model"
    tokenizer = train_tokenizer(item_texts(small_data.items, "{kind} {title}"), 400, 64)
    torch.manual_seed(0)
    size = LMRecConfig(dim=32, heads=2, layers=1, context=64)
    build_lmrec(size, len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(folder, data, model, **llm):
    content = {
        "data": str(data.folder), "run": str(folder / "run"),
        "llm": {"model": str(model), "probe": {"steps": 300, "batch_size": 64, "lr": 1e-2, "negatives": 10}, **llm},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


AGNOSTIC = {"item_text": "{kind}"}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The same users in another service, at the same times."""
    folder = tmp_path_factory.mktemp("elsewhere")
    prepare("test", make_raw(folder / "raw", seed=3), folder / "data", Filters())
    return Prepared.load(folder / "data")


def test_features_are_eos_states_of_the_texts_and_computed_once(tmp_path, small_data, elsewhere, model, monkeypatch):
    features = ["specific", "agnostic", "combine"]
    path = recipe(
        tmp_path, small_data, model, agnostic={"data": str(elsewhere.folder), **AGNOSTIC},
        probe={"steps": 40, "features": features, "prefixes": 3},
    )  # fmt: skip
    result = run(load_job(path), "test")
    assert [row["feature"] for row in result["rows"]] == features
    decoder, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    titles, kinds = item_texts(small_data.items, "{title}"), item_texts(small_data.items, "{kind}")

    def state(text):
        # The whole text, or as much of its end as the model reads.
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        return decoder.transformer(torch.tensor([ids])).last_hidden_state[0, -1]

    found = saved_features(tmp_path / "run", "specific")
    assert len(found.users) == 3 * small_data.n_users
    with torch.no_grad():
        for number in (0, 7, 29):
            torch.testing.assert_close(found.items[number], state(titles[number]), atol=1e-5, rtol=0)
        for user in (0, 13):
            items = small_data.sequence[small_data.offsets[user] : small_data.offsets[user + 1]] - 1
            alone = f" {ARROW} ".join(titles[item] for item in items[: int(found_cut(found, items, user))].tolist())
            if len(tokenizer(alone)["input_ids"]) < 60:
                own = found.users[found.owners == user][0]
                torch.testing.assert_close(own, state(alone), atol=1e-5, rtol=0)
    agnostic = saved_features(tmp_path / "run", "agnostic")
    with torch.no_grad():
        user = elsewhere.user_ids.index(small_data.user_ids[3])
        span = slice(int(elsewhere.offsets[user]), int(elsewhere.offsets[user + 1]))
        for features, end in ((agnostic.test, small_data.offsets[4] - 1), (agnostic.valid, small_data.offsets[4] - 2)):
            before = elsewhere.timestamps[span] < small_data.timestamps[end]  # nothing of the target's future
            items = elsewhere.sequence[span][before] - 1
            assert 0 < len(items) < span.stop - span.start
            text = f" {ARROW} ".join(kinds[item] for item in items.tolist())
            torch.testing.assert_close(features[3], state(text), atol=1e-5, rtol=0)

    # Other heads on the same features: nothing is computed again.
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "config.yaml").unlink()
    monkeypatch.setattr(FeatureReader, "_read", None)
    again = run(load_job(path, ["llm.probe.lr=0.1"]), "test")
    assert len(again["rows"]) == 3


def test_prefixes_read_in_one_pass_are_those_read_one_by_one(tmp_path, small_data, model, monkeypatch):
    path, found, fits = recipe(tmp_path, small_data, model), [], TextRows.fits
    # As if every third history were too long; and as if all were.
    for too_long in (lambda items: items[0] % 3 == 0, lambda items: True):
        with monkeypatch.context() as patch:
            patch.setattr(
                TextRows, "fits", lambda self, items, cuts, t=too_long: not t(items) and fits(self, items, cuts)
            )
            found.append(FeatureReader(load_job(path), small_data)._of_training("specific"))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


def test_a_kill_loses_the_features_of_no_part_that_was_done(tmp_path, small_data, model, monkeypatch):
    reader, made = FeatureReader(load_job(recipe(tmp_path, small_data, model)), small_data), []
    whole = reader.features("specific", tmp_path / "whole")
    instances = FeatureReader._of_instances

    def killed(self, kind, split):
        made.append(split)
        if made == ["valid", "test"]:
            raise KeyboardInterrupt
        return instances(self, kind, split)

    monkeypatch.setattr(FeatureReader, "_of_instances", killed)
    with pytest.raises(KeyboardInterrupt):
        reader.features("specific", tmp_path / "killed")
    monkeypatch.setattr(FeatureReader, "_of_training", None)
    found = reader.features("specific", tmp_path / "killed")
    assert made == ["valid", "test", "test"]
    for name, value in vars(whole).items():
        assert torch.equal(vars(found)[name], value)


def saved_features(run, kind):
    parts = [load_file(path) for path in (run / "features").glob(f"{kind}-*/*.safetensors")]
    return Features(**{name: value for part in parts for name, value in part.items()})


def found_cut(features, items, user):
    """After how many items the user's first training pair stands: where its target follows; good enough if unique."""
    target = int(features.targets[features.owners == user][0])
    return int((items == target).nonzero()[0])


def test_heads_learn_what_frozen_features_hold(tmp_path, small_data, model, monkeypatch):
    """With features that say which item is the last one, the next item is to be had by a linear map."""
    path = recipe(tmp_path, small_data, model)
    one_hot = torch.eye(small_data.n_items, 32)  # as wide as the model
    monkeypatch.setattr(
        FeatureReader, "_vectors", lambda self, rows, histories, title: one_hot[[own[-1] for own in histories]]
    )
    # No history fits, so each prefix is read by itself.
    monkeypatch.setattr(TextRows, "fits", lambda self, items, cuts: False)
    monkeypatch.setattr(FeatureReader, "_read", lambda self, made: one_hot)
    [row] = run(load_job(path, ["llm.probe.loss=softmax", "llm.probe.negatives=30"]), "test")["rows"]
    assert row["HR@10"] > 0.8  # users walk one step along a ring four times out of five; chance is a third
    assert row["seconds"] < 60
    assert RunFolder(tmp_path / "run").result()["rows"] == [row]


def test_what_a_probe_cannot_do_is_one_line(tmp_path, small_data, model):
    with pytest.raises(UserError, match=r"other than specific need agnostic"):
        load_job(recipe(tmp_path, small_data, model, probe={"features": ["combine"]}))
    with pytest.raises(UserError, match="patience 10 ends training before the next validation"):
        load_job(recipe(tmp_path, small_data, model, probe={"patience": 10}))
    with pytest.raises(UserError, match=r"no causal LM|no usable tokenizer"):
        run(load_job(recipe(tmp_path, small_data, tmp_path / "nothing")), "test")
    same = {"agnostic": {"data": str(small_data.folder)}, "probe": {"features": ["agnostic"]}}
    with pytest.raises(UserError, match="the task's own data"):
        run(load_job(recipe(tmp_path / "same", small_data, model, **same)), "test")
    prepare("test", make_raw(tmp_path / "raw"), tmp_path / "many", Filters(split="ratio", test_fraction=0.3))
    with pytest.raises(UserError, match="one test item a user"):
        run(load_job(recipe(tmp_path / "m", Prepared.load(tmp_path / "many"), model)), "test")
    prepare("test", make_raw(tmp_path / "raw2"), tmp_path / "none", Filters(split="users", valid_fraction=0))
    with pytest.raises(UserError, match="no validation items to stop by"):
        run(load_job(recipe(tmp_path / "n", Prepared.load(tmp_path / "none"), model)), "test")


def test_figures_of_a_decoder_that_was_trained_again_are_not_given_as_its_own(tmp_path, small_data, model):
    shutil.copytree(model, tmp_path / "model")
    job = load_job(recipe(tmp_path, small_data, tmp_path / "model", probe={"steps": 20}))
    assert run(job, "test") == run(job, "test")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UserError, match=r"the data or the model that .*run reads were made anew"):
        run(job, "test")


def test_users_who_are_not_known_elsewhere_do_not_decide_how_the_others_are_spread(small_data):
    """Of 1,000 pairs 50 have a history in the other service, the others a vector of zeros."""
    torch.manual_seed(0)
    users = torch.zeros(1000, 16)
    users[::20] = torch.randn(50, 16) + 3
    spare, items = torch.zeros(len(small_data.instances("valid")[0]), 16), torch.randn(small_data.n_items, 16)
    features = Features(users, torch.arange(1000), torch.zeros(1000, dtype=torch.long), spare, spare, items)
    heads, _ = probe.train_heads(features, small_data, ProbeConfig(steps=1, validate_every=1, negatives=5))
    own = heads.user.statistics
    read = (own.within_reach(users[::20]) - own.mean) / own.deviation
    torch.testing.assert_close(read.std(0, correction=0), torch.ones(16), atol=0.02, rtol=0)
    assert heads.user(users[:2]).isfinite().all()
