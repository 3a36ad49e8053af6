"""What LMRec's paper looks at beside accuracy: inference time (Table 6), size (Fig. 4), curvature (Fig. 5)."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from llm.corpus import ItemTokens
from llm.curvature import curvature
from llm.joint import JointModel
from llm.lmrec_job import TARGET, LMRecJob, RecommendConfig
from llm.lmrec_run import Inputs, build_decoder, fix_statistics, read_inputs, trained
from llm.recommendation import RecommendationTask
from rec.data.prepared import Prepared
from rec.item_encoder import IDTable
from rec.models.base import Recommender
from rec.models.lightgcn import LightGCN, LightGCNConfig
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

REPEATS = 5
METRIC = "HR@10"


@torch.no_grad()
def inference(job: LMRecJob, users: int) -> list[dict[str, Any]]:
    """Table 6: seconds to score all items for one batch of ``users``, with the parameters that are trained downstream.

    The decoder reads histories as text; LightGCN looks vectors up; LMRec^TL multiplies user features that lie ready.
    """
    inputs = read_inputs(job, RunFolder(job.run), Ranks())
    model, data = trained(job, inputs), inputs.tasks[TARGET].data
    rows = torch.arange(min(users, len(data.targets("test"))))
    owners = data.instances("test")[0][rows]
    items, lengths = data.histories("test", rows, model.config.max_length)
    heads = model.model.heads[TARGET]
    device = heads.user.linear.weight.device
    features = torch.randn(len(rows), heads.user.width, device=device)
    table = model.item_vectors()
    graph = _light_gcn(data, heads.user.width).to(device)
    last, ones = items[:, -1:].to(device), torch.ones_like(lengths, device=device)
    kinds: dict[str, tuple[int, Callable[[], Any]]] = {
        "Transformer on history logs": (_count(model.model), lambda: model.score_all(owners, items, lengths)),
        "LightGCN": (_count(graph), lambda: graph.score_all(owners.to(device), last, ones)),
        "LMRec^TL on user features": (_count(heads), lambda: heads.user(features) @ table.T),
    }
    found = [{"model": name, "parameters": size, "seconds": _median(call)} for name, (size, call) in kinds.items()]
    return [row | {"speedup": round(found[0]["seconds"] / row["seconds"], 1)} for row in found]


def eigenvalues(job: LMRecJob, batches: range, settings: RecommendConfig) -> Iterator[list[float]]:
    """Fig. 5: the top eigenvalues of L2's Hessian at a run's weights, training batch by training batch.

    Args:
        job: the run. A language model alone has no heads; it gets those that recommendation training would begin with.
        batches: which.
        settings: which L2, the same for all runs that are compared.
    """
    if not batches:
        return
    inputs = read_inputs(job, RunFolder(job.run), Ranks())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = settings.model_copy(update={"pairs": 4 * settings.prefixes})
    target, context = inputs.tasks[TARGET], job.llm.lmrec.context
    tokens = ItemTokens(inputs.tokenizer, target.texts, context - 1)
    task = RecommendationTask(TARGET, 0, target.data, tokens, small, context, job.llm.train.seed)
    model = _at_the_end(job, inputs, settings, task, device).to(device)
    for step in batches:
        yield curvature(model, task.parts(step)[0][0].to(device)).tolist()


def draw_inference(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Bars of seconds a batch, on a logarithmic scale."""
    figure, axis = plt.subplots(figsize=(7, 2.5), layout="constrained")
    axis.barh([row["model"] for row in rows], [row["seconds"] for row in rows])
    axis.set(xscale="log", xlabel="seconds a batch")
    axis.invert_yaxis()
    _save(figure, path)


def draw_sizes(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Fig. 4: HR@10 as a share of the best, by parameters."""
    points: dict[int, list[float]] = {}
    for row in rows:
        points.setdefault(row["parameters"], []).append(row[METRIC])
    sizes = sorted(points)
    means = np.array([np.mean(points[size]) for size in sizes])
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
    axis.plot([size / 1e6 for size in sizes], means / max(means.max(), 1e-12), marker="o")
    axis.set(xscale="log", xlabel="parameters, millions", ylabel=f"{METRIC}, share of the best")
    axis.grid(alpha=0.3)
    _save(figure, path)


def draw_eigenvalues(path: Path, found: dict[str, list[float]]) -> None:
    """Fig. 5: densities of the eigenvalues of every variant, on an inverse hyperbolic sine axis: those of one may be a
    hundred times another's, and some are negative."""
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    unit = float(np.median(np.abs(np.concatenate([*found.values()])))) or 1.0
    shown = {name: np.arcsinh(np.array(values) / unit) for name, values in found.items()}
    whole = np.concatenate([*shown.values()])
    places = np.linspace(whole.min() - 1, whole.max() + 1, 400)
    for name, values in shown.items():
        axis.plot(unit * np.sinh(places), density(values, places), label=name)
    axis.set_xscale("asinh", linear_width=unit)
    ends = unit * np.sinh(places[[0, -1]])
    powers = 10.0 ** np.arange(np.ceil(np.log10(unit)), np.log10(np.abs(ends).max()))
    axis.set_xticks([*-powers, 0, *powers])
    axis.set(xlim=ends, xlabel="top Hessian eigenvalues", ylabel="density on this axis")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    _save(figure, path)


def summary(name: str, values: Sequence[float]) -> dict[str, Any]:
    """What a table says of a variant's eigenvalues."""
    own = np.array(values)
    return {
        "variant": name,
        "median": float(np.median(own)),
        "largest": float(own.max()),
        "smallest": float(own.min()),
        "negative_share": float((own < 0).mean()),
    }


def density(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """A Gaussian kernel density estimate of ``values`` [n] at ``places`` [m], of Scott's bandwidth."""
    width = max(values.std(ddof=1) if len(values) > 1 else 0.0, 1e-9) * len(values) ** -0.2
    kernels = np.exp(-0.5 * ((places[:, None] - values) / width) ** 2)
    return kernels.sum(1) / (len(values) * width * np.sqrt(2 * np.pi))


def _at_the_end(
    job: LMRecJob, inputs: Inputs, settings: RecommendConfig, task: RecommendationTask, device: torch.device
) -> JointModel:
    """A run's model with fixed statistics, computing the L2 of ``settings``."""
    if job.llm.recommend is not None:
        model = trained(job, inputs).model
        model.pairs = settings.loss
        return model
    after = job.model_copy(update={"llm": job.llm.model_copy(update={"model": str(job.run)})})
    decoder = build_decoder(after, inputs.tokenizer)
    model = JointModel(decoder, [TARGET], settings.loss, standardise=settings.standardise)
    fix_statistics(model.to(device), task, device)
    return model


def _light_gcn(data: Prepared, dim: int) -> Recommender:
    """Untrained: how fast it answers does not depend on what it learnt."""
    return LightGCN.for_data(LightGCNConfig(dim=dim), IDTable(data.n_items, dim), data, data.train_ends).eval()


def _median(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
