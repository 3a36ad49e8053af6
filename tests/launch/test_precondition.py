"""What alignment needs: the figures against a loop over pairs, the best mixture against a search of the simplex."""

import itertools

import pytest
import torch

from align.config import Stages, load_job
from align.order import set_aside
from launch.alignment.main_job import MainJobRun
from launch.alignment.precondition import PRECONDITION, best_mixture, is_closed_world, precondition
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from llm.text_encoder import TextEncoder
from llm.text_items import CatalogTexts
from llm.tokenizer import train_tokenizer
from rec.build import MODEL
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.data.readers import closed_world as world
from rec.data.readers.closed_world import ATTRIBUTES
from rec.models.sasrec import SASRec


def value(log_likelihoods: torch.Tensor, shares: tuple[float, ...]) -> float:
    return float((log_likelihoods.exp().double() @ torch.tensor(shares, dtype=torch.double)).log().mean())


@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_the_best_mixture_is_the_best_of_a_fine_grid(spread):
    generator = torch.Generator().manual_seed(0)
    log_likelihoods = spread * torch.randn(200, 3, generator=generator) + torch.tensor([0.2, 0.0, -0.1])
    found = best_mixture(log_likelihoods)
    grid = [(a / 40, b / 40, 1 - (a + b) / 40) for a, b in itertools.product(range(41), repeat=2) if a + b <= 40]
    best = max(grid, key=lambda shares: value(log_likelihoods, shares))
    assert found.sum().item() == pytest.approx(1)
    assert found.tolist() == pytest.approx(best, abs=0.03)
    assert value(log_likelihoods, tuple(found.tolist())) >= value(log_likelihoods, best) - 1e-6


def test_what_is_too_sure_of_itself_hedges_and_what_is_not_does_not():
    """One text is better on average, and the same differences matter less and less."""
    generator = torch.Generator().manual_seed(1)
    log_likelihoods = torch.randn(2000, 4, generator=generator) * 3
    log_likelihoods[:, 2] += 1
    shares = [best_mixture(log_likelihoods / temperature)[2].item() for temperature in (1, 3, 9, 27)]
    assert shares == sorted(shares)
    assert shares[0] < 0.6
    assert shares[-1] > 0.99


def test_the_figures_are_those_of_a_loop_over_pairs(tmp_path):
    prepare("closed-world", world.make(world.World(items=40, values=4, users=60)), tmp_path / "w", Filters(k_core=0))
    data = Prepared.load(tmp_path / "w")
    (tmp_path / "recipe.yaml").write_text(f"data: {tmp_path / 'w'}\nrun: {tmp_path / 'run'}\n")
    job = load_job(
        tmp_path / "recipe.yaml",
        [
            "rec.model={dim: 16, heads: 2, blocks: 1, max_length: 8}",
            "align.reward_users=0.5",
            "align.objective.temperature=2.0",
        ],
    )
    stages = Stages(job.run)
    tokenizer = train_tokenizer([*data.items["taste"].to_pylist(), *data.items["look"].to_pylist()], 320, 64)
    torch.manual_seed(0)
    lm = build_lmrec(LMRecConfig(dim=16, heads=2, layers=1, context=64), len(tokenizer), tokenizer.eos_token_id)
    lm.save_pretrained(stages.llm / "model")
    tokenizer.save_pretrained(stages.llm / "model")
    encoder = TextEncoder(stages.llm / "model", job.llm.encoder)
    items = CatalogTexts(data.items["title"].to_pylist(), encoder).items(data.n_items, 16)
    torch.nn.init.normal_(items.fuse.weight)
    _, folder = stages.aligning(job.align)
    SASRec(job.rec.model, items).save_pretrained(folder / MODEL)

    model, vectors = (
        SASRec.from_pretrained(folder / MODEL),
        [encoder(data.items[name].to_pylist()) for name in ATTRIBUTES],
    )
    driving = list(ATTRIBUTES).index(data.meta["options"]["driving"])
    aside, rows = set_aside(data, 0.5, job.align.trainer.seed), []
    for user in aside.nonzero().flatten().tolist():
        history = data.sequence[data.offsets[user] : data.train_ends[user]].tolist()
        for place in range(1, len(history)):
            read, own = history[max(0, place - 8) : place], []
            for told in vectors:
                knowledge = model.items.knowledge[torch.tensor([read])]
                knowledge[0, -1] = told[read[-1] - 1]
                arguments = torch.tensor([read]), torch.tensor([len(read)]), torch.tensor([history[place]]), knowledge
                own.append(model.log_likelihood(*arguments, temperature=2.0).item())
            rows.append(own)
    log_likelihoods = torch.tensor(rows, dtype=torch.double)
    rewards = log_likelihoods.exp() / log_likelihoods.exp().mean(1, keepdim=True)
    others = [number for number in range(len(ATTRIBUTES)) if number != driving]
    gaps = rewards[:, driving] - rewards[:, others].mean(1)

    # What a main job measures before its first step, once.
    run = MainJobRun(job)
    run.data = data
    for _ in range(2):
        run._measure_precondition()
    [logged] = run.run.events(PRECONDITION)
    found = precondition(job, data)
    assert {name: logged[name] for name in found} == found
    assert found["pairs"] == len(rows)
    assert found["temperature"] == 2.0
    assert list(found["reward"].values()) == pytest.approx(rewards.mean(0).tolist(), rel=1e-4)
    assert list(found["log_likelihood"].values()) == pytest.approx(log_likelihoods.mean(0).tolist(), rel=1e-4)
    assert found["gap"] == pytest.approx(gaps.mean().item(), abs=1e-5)
    assert found["gap_se"] == pytest.approx(gaps.std().item() / len(rows) ** 0.5, rel=1e-3)
    noise = (rewards[:, driving] - 1).mean() / rewards[:, driving].std()
    assert found["signal_to_noise"] == pytest.approx(noise.item(), rel=1e-2, abs=1e-4)
    assert set(found["best_share"]) == {"1.0", "2.0"}


def test_of_real_data_there_is_nothing_to_measure(small_data):
    assert not is_closed_world(small_data)
