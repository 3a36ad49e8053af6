"""Mistakes in a study's recipe are found before anything runs, and what a recipe may leave out."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "llm" / "recformer"))
from backbones import save_bert
from safetensors.torch import load_file, save_file
from tiny_elephant import recipe_of
from worlds import prepare_anew

from launch.elephant.study import ElephantRun
from rec.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
MORE = {"variants": ["random", "frozen lm"], "headline": {}}
NARROW = {"A": {"model": {"dim": 16}}}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


def test_a_model_that_is_null_is_left_out_with_its_headline(small_data, tmp_path):
    recipe = recipe_of(tmp_path, small_data.folder, tmp_path)
    study = ElephantRun(recipe, ["models.SASRec=null"]).study
    assert list(study.models) == list(study.headline) == ["BERT4Rec"]
    with pytest.raises(
        UserError, match=r"models\.SASRecc=null: there is none to leave out; there are: BERT4Rec, SASRec"
    ):
        ElephantRun(recipe, ["models.SASRecc=null"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"variants": ["frozen LF"]}, "unknown variant 'frozen LF'"),
        ({"protocols": ["full"]}, "unknown protocol 'full'"),
        ({"recformers": {"a/b": []}}, "'a/b' names a folder"),
        ({"recformers": {"a": ["finetune.lrr=1"]}}, "unknown key 'lrr'"),
        ({"recformers": {"a": ["finetune=null"]}}, r"FT vectors need recformer.finetune \(a has none\)"),
        ({"more": {"PT": "x"}}, "more.PT: PT are a RECFORMER's vectors"),
        (
            {"models": {"SASRec": {"grid": {"model.dim": [8]}}}, "headline": {}},
            "models.SASRec.grid: a study's own search",
        ),
        (
            {"models": {"SASRec": {"train": {"on": "train+valid"}}}, "headline": {}},
            "trains on the items that rates are",
        ),
        ({"headline": {"GRU4Rec": []}}, "unknown model 'GRU4Rec'; there are: BERT4Rec, SASRec"),
        ({"models": None}, "models: "),
        ({"pca": True, "projection": True}, "pca and projection both change the vectors' width"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(small_data, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        ElephantRun(recipe_of(tmp_path, small_data.folder, tmp_path, **more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"cutoffs": [10, 50]}, "the best 50 of 30 items"),
        ({"target": "nowhere"}, "nowhere"),
        ({"protocols": ["elephant-100"]}, "100 negatives cannot be drawn"),
        ({"recformer": {"text": {"attributes": ["brand"]}}}, r"has none of llm.recformer.text.attributes \(brand\)"),
        (
            {"recformer": {"text": {"attributes": ["brand"]}}, "variants": [], "headline": {}},
            "has none of llm.recformer",
        ),
        (MORE | {"more": {"lm": "no-such-model"}}, "no-such-model is neither a run folder nor a model"),
        (MORE | {"more": {"lm": "BACKBONE"}, "item_text": "{tilte}"}, "llm.item_text names 'tilte'"),
        (MORE | {"more": {"lm": "BACKBONE"}, "models": NARROW}, "the vectors of lm have width 32, .* models.A is 16"),
        (
            {"models": NARROW, "headline": {}},
            "width 32, the dim of models.A is 16: .*projection=true .*pca=true",
        ),
        (
            {"models": {"A": {"model": {"dim": 64}}}, "headline": {}, "pca": True},
            "vectors of width 32 have 29 principal components, the model's dim is 64: .*projection=true",
        ),
        (
            {"models": {"A": {"model": {"dim": 32}}}, "headline": {}, "pca": True},
            "models.A: 30 vectors of width 32 have 29 principal components, the model's dim is 32",
        ),
    ],
)
def test_what_does_not_fit_the_data_or_the_backbone_is_said_before_anything_is_trained(
    small_data, backbone, tmp_path, more, message
):
    path = recipe_of(tmp_path, small_data.folder, backbone)
    content = yaml.safe_load(path.read_text().replace("BACKBONE", str(backbone)))
    more = yaml.safe_load(yaml.safe_dump(more).replace("BACKBONE", str(backbone)))
    content |= more | {"recformer": content["recformer"] | more.get("recformer", {})}
    path.write_text(yaml.safe_dump(content))
    run = ElephantRun(path)
    with pytest.raises(UserError, match=message):
        run.execute("test")
    assert not list(run.study.run.glob("pretrained-*"))
    # The recipe that is put right may take the same folder.
    assert not {path.name for path in run.out.glob("*.*")} & {"config.yaml", "inputs.json"}


def test_a_target_that_was_prepared_anew_does_not_go_into_a_study_that_has_begun(small_data, backbone, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_data.folder, data)
    no_rows = {"variants": [], "headline": {}, "recformers": {"own": ["pretrain=null", "finetune=null"]}}
    run = ElephantRun(recipe_of(tmp_path, data, backbone, **no_rows))
    run._check()
    run._check()
    prepare_anew(data)
    with pytest.raises(UserError, match=r"the data or the model that .* reads were made anew since it was begun"):
        run._check()


def test_neither_does_a_source_of_pretraining_or_another_model_of_more_vectors(small_data, backbone, tmp_path):
    sources, other = tmp_path / "sources", tmp_path / "other"
    shutil.copytree(small_data.folder, sources)
    shutil.copytree(backbone, other)
    more = {"more": {"lm": str(other)}, "variants": ["frozen lm"], "headline": {}, "item_text": "{title}"}
    path = recipe_of(tmp_path, small_data.folder, backbone, **more)
    run = ElephantRun(path, [f"recformer.pretrain.sources=[{sources}]"])
    run._check()
    meta = (sources / "meta.json").read_text()
    prepare_anew(sources)
    with pytest.raises(UserError, match="were made anew"):
        run._check()
    (sources / "meta.json").write_text(meta)
    run._check()
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    with pytest.raises(UserError, match="were made anew"):
        run._check()


def test_nor_does_another_backbone(small_data, backbone, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(backbone, own)
    run = ElephantRun(recipe_of(tmp_path, small_data.folder, own))
    run._check()
    weights = load_file(own / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, own / "model.safetensors")
    with pytest.raises(UserError, match="were made anew"):
        run._check()


def test_a_recformer_is_judged_as_the_recommenders_are_whatever_its_overrides_say(small_data, tmp_path):
    changes = ["finetune.protocols=[elephant-100]", "finetune.cold_targets=rank", "finetune.evaluate.cutoffs=[3]"]
    path = recipe_of(tmp_path, small_data.folder, tmp_path, recformers={"a": changes})
    own = ElephantRun(path).settings["a"].finetune
    assert (own.protocols, own.cold_targets) == (["elephant-full"], "drop")
    assert (own.evaluate.cutoffs, own.evaluate.cold_targets) == ((5, 10), "drop")


def test_every_backbone_has_vanilla_vectors_of_its_own(small_data, backbone, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    more = {
        "recformers": {"a": [], "b": ["pretrain.share=0.5"], "other": [f"backbone={other}"]},
        "variants": ["frozen vanilla"],
        "headline": {},
    }
    run = ElephantRun(recipe_of(tmp_path, small_data.folder, backbone, **more))
    cells = sorted((cell.model, cell.recformer) for cell in run.cells.all())
    assert cells == [(model, name) for model in ("BERT4Rec", "SASRec") for name in ("a", "other")]


def test_a_target_may_have_overrides_of_its_own_and_the_users_win(small_data, backbone, tmp_path):
    own = {"for_target": {"tiny": ["recformer.finetune.epochs=7", "rate_epochs=3"]}}
    path = recipe_of(tmp_path, small_data.folder, backbone, **own)
    assert ElephantRun(path).study.recformer.finetune.epochs == 7
    changed = ElephantRun(path, ["rate_epochs=4"]).study
    assert (changed.recformer.finetune.epochs, changed.rate_epochs) == (7, 4)
    elsewhere = ElephantRun(path, [f"target={small_data.folder}"]).study
    assert elsewhere.recformer.finetune.epochs == 5


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch/recipes/reproduce").glob("elephant-*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_study_is_in_order(path, tmp_path):
    run = ElephantRun(path, [f"run={tmp_path}"])
    assert path.read_text().startswith(f"# recalign reproduce {path.stem} --target {run.study.target}\n")
    assert run.data == run.study.targets[run.study.target]
    assert all(rec.model.dim == 384 or (run.study.pca and rec.model.dim < 384) for rec in run.study.models.values())
