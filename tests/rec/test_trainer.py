import json
import shutil

import pytest
import torch

from rec import trainer
from rec.averaging import WeightAverage
from rec.build import build_model
from rec.config import RecConfig
from rec.evaluation import evaluate, some_instances
from rec.item_encoder import KnowledgeConcat
from rec.models.base import Recommender, SequenceRecommender
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import train

CONFIG = build(
    RecConfig,
    {
        "model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.1},
        "train": {"lr": 5e-3, "batch_size": 8, "epochs": 12, "patience": 12, "checkpoint_every": 1},
    },
)


def weights(model: SequenceRecommender) -> dict[str, torch.Tensor]:
    return model.state_dict()


def test_training_learns_the_ring(small_data, tmp_path):
    untrained = evaluate(build_model(CONFIG, small_data), small_data, "test", CONFIG.evaluate)["HR@10"]
    model = train(build_model(CONFIG, small_data), small_data, CONFIG, RunFolder(tmp_path), "test")
    assert evaluate(model, small_data, "test", CONFIG.evaluate)["HR@10"] > max(0.6, untrained)


def test_validation_on_a_subset_is_of_the_same_users_whatever_the_seed(small_data, tmp_path, monkeypatch):
    seen, plain = [], trainer.evaluate

    def watched(*inputs, **options):
        seen.append(inputs[4])
        return plain(*inputs, **options)

    monkeypatch.setattr(trainer, "evaluate", watched)
    for seed in (1, 2):
        own = CONFIG.train.model_copy(update={"valid_users": 7, "seed": seed, "epochs": 1})
        config = CONFIG.model_copy(update={"train": own})
        train(build_model(config, small_data), small_data, config, RunFolder(tmp_path / str(seed)), "test")
    assert len(seen) == 4
    assert all(torch.equal(rows, seen[0]) for rows in seen)
    assert len(seen[0].unique()) == 7
    assert torch.equal(some_instances(small_data, "valid", None), torch.arange(40))
    assert torch.equal(some_instances(small_data, "valid", 41), torch.arange(40))


def test_a_model_is_validated_in_the_precision_that_it_is_trained_in(small_data, tmp_path):
    for precision in ("fp32", "bf16"):
        config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"precision": precision})})
        run = RunFolder(tmp_path / precision)
        model = train(build_model(config, small_data), small_data, config, run, "test")
        plain = evaluate(model, small_data, "valid", CONFIG.evaluate)["NDCG@10"]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = evaluate(model, small_data, "valid", CONFIG.evaluate)["NDCG@10"]
        best = max(row["NDCG@10"] for row in run.steps("epoch"))
        assert best == (plain if precision == "fp32" else rounded)
        assert rounded == pytest.approx(plain, abs=0.02)


@pytest.mark.parametrize(("killed_in_epoch", "ema"), [(0, None), (1, None), (5, None), (5, 0.9)])
def test_a_killed_and_resumed_run_equals_an_undisturbed_one(small_data, tmp_path, monkeypatch, killed_in_epoch, ema):
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"ema": ema})})
    whole = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path / "a"), "test")
    saved = Checkpoints.save

    def save_then_die(self, step, state, *args, **kwargs):
        if state["epoch"] == killed_in_epoch + 1:
            raise KeyboardInterrupt
        return saved(self, step, state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(build_model(config, small_data), small_data, config, RunFolder(tmp_path / "b"), "test")
    torch.manual_seed(99)
    torch.rand(5)
    resumed = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path / "b"), "test")
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    a, b = (RunFolder(tmp_path / name).steps("epoch") for name in "ab")
    assert [row["loss"].hex() for row in a] == [row["loss"].hex() for row in b]
    assert len(RunFolder(tmp_path / "b").events("epoch")) == len(b) + 1  # of all epochs, it repeats the one it lost


def test_the_average_of_weights_is_what_its_loop_gives():
    model = torch.nn.Linear(2, 1)
    average, expected = WeightAverage(model, 0.5), model.weight.detach().clone()
    for steps in range(1, 30):
        with torch.no_grad():
            model.weight.add_(torch.randn(1, 2))
        average.update(model, steps)
        decay = min(0.5, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.model.weight.detach(), expected)
    assert not average.model.weight.requires_grad


def test_the_average_is_what_is_validated_and_kept(small_data, tmp_path):
    update = {"ema": 0.95, "epochs": 3, "patience": 3}
    config = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=update)})
    kept = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path / "a"), "test")
    valid = evaluate(kept, small_data, "valid", config.evaluate)["NDCG@10"]
    assert valid == max(row["NDCG@10"] for row in RunFolder(tmp_path / "a").steps("epoch"))
    plain = config.model_copy(update={"train": config.train.model_copy(update={"ema": None})})
    other = train(build_model(plain, small_data), small_data, plain, RunFolder(tmp_path / "b"), "test")
    assert not torch.equal(kept.items.ids.weight, other.items.ids.weight)


def test_a_finished_run_is_returned_not_repeated(small_data, tmp_path):
    first = train(build_model(CONFIG, small_data), small_data, CONFIG, RunFolder(tmp_path), "test")
    rows = len(RunFolder(tmp_path).events())
    again = train(build_model(CONFIG, small_data), small_data, CONFIG, RunFolder(tmp_path), "test")
    assert torch.equal(first.items.ids.weight, again.items.ids.weight)
    assert len(RunFolder(tmp_path).events()) == rows


def test_a_checkpoint_of_other_settings_is_refused(small_data, tmp_path):
    state = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"epochs": 2})})
    train(build_model(state, small_data), small_data, state, RunFolder(tmp_path), "test")
    (tmp_path / "finished.json").unlink()
    with pytest.raises(UserError, match="another config hash"):
        train(build_model(CONFIG, small_data), small_data, CONFIG, RunFolder(tmp_path), "test")


def test_a_trained_model_never_loses_to_its_own_first_epoch(small_data, tmp_path):
    """Finishing starts from a trained model: with a ruinous learning rate it must come back as it went in."""
    good = train(build_model(CONFIG, small_data), small_data, CONFIG, RunFolder(tmp_path / "a"), "test")
    before = good.items.ids.weight.clone()
    ruin = CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"lr": 1.0, "patience": 2})})
    after = train(good, small_data, ruin, RunFolder(tmp_path / "b"), "test")
    assert RunFolder(tmp_path / "b").steps("epoch")
    assert torch.equal(after.items.ids.weight, before)


@pytest.mark.parametrize(
    ("untrained", "after", "trained", "best"),
    [
        (0.5, [0.1, 0.2, 0.3, 0.25, 0.3, 0.9], 5, -1),
        (0.5, [0.1, 0.2, 0.6, 0.4, 0.3], 5, 2),
        (0.1, [0.2, 0.1, 0.1], 3, 0),
    ],
)
def test_patience_goes_by_trained_epochs_and_the_best_of_all_is_kept(
    small_data, tmp_path, monkeypatch, untrained, after, trained, best
):
    values = iter([untrained, *after])
    monkeypatch.setattr(trainer._State, "_validate", lambda state: {"NDCG@10": next(values)})
    config = changed(patience=2)
    train(build_model(config, small_data), small_data, config, RunFolder(tmp_path), "test")
    assert len(RunFolder(tmp_path).events("epoch")) == trained
    facts = json.loads((tmp_path / "finished.json").read_text())
    assert facts["best_epoch"] == best
    assert facts["valid_NDCG@10"] == [*after, untrained][best]


def test_knowledge_that_tells_the_next_item_helps(small_data, tmp_path):
    """A vector per item that says where on the ring it is: the fused model must be able to use it."""
    angle = torch.arange(small_data.n_items) / small_data.n_items * 2 * torch.pi

    def items() -> KnowledgeConcat:
        encoder = KnowledgeConcat(small_data.n_items, 16, 2, on_target=True)
        encoder.set_knowledge(torch.stack([angle.sin(), angle.cos()], dim=1))
        return encoder

    model = train(build_model(CONFIG, small_data, items), small_data, CONFIG, RunFolder(tmp_path), "test")
    assert model.items.fuse.weight[:, 16:].abs().max() > 1e-3
    assert evaluate(model, small_data, "test", CONFIG.evaluate)["HR@10"] > 0.6


def changed(**train: object) -> RecConfig:
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=train)})


def losses_of(config: RecConfig, data, folder) -> list[float]:
    train(build_model(config, data), data, config, RunFolder(folder), "test")
    return [row["loss"] for row in RunFolder(folder).steps("epoch")]


def test_bf16_training_follows_float32_and_keeps_its_weights_so(small_data, tmp_path):
    exact = losses_of(changed(epochs=4), small_data, tmp_path / "fp32")
    rough = losses_of(changed(epochs=4, precision="bf16"), small_data, tmp_path / "bf16")
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    kept = Recommender.from_pretrained(tmp_path / "bf16" / "model").state_dict()
    assert {value.dtype for value in kept.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_training(small_data, tmp_path):
    """Without dropout, whose random numbers a compiled step may draw in another order.

    One batch an epoch, of one shape, is compiled once.
    """
    config = build(RecConfig, {"model": {"name": "Caser", "dim": 8, "window": 2, "max_length": 8, "dropout": 0.0}})
    own = {"epochs": 2, "batch_size": 256}
    config = config.model_copy(update={"train": changed(**own).train})
    plain = losses_of(config, small_data, tmp_path / "plain")
    compiled = config.model_copy(update={"train": changed(**own, compile=True).train})
    assert losses_of(compiled, small_data, tmp_path / "compiled") == pytest.approx(plain, rel=1e-3)


def test_as_many_checkpoints_stay_as_the_recipe_says_and_some_for_good(small_data, tmp_path):
    few = {"batch_size": 8, "epochs": 4, "checkpoint_every": 1, "keep_checkpoints": 2, "keep_checkpoint_every": 20}
    config = build(RecConfig, {"model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8}, "train": few})
    train(build_model(config, small_data), small_data, config, RunFolder(tmp_path), "x")
    steps = [found.step for found in Checkpoints(tmp_path / "checkpoints").examine()]
    assert steps == [40, 30, 20]
