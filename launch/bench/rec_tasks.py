"""What ``recalign bench rec`` measures: one task a measurement, each a command line for us or a peer's adapter."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.bench import peers
from rec.models import MODELS
from rec.models.base import SequenceRecommender

STAGES = ("floor", "epoch", "models", "evaluation", "convergence")
ON_REQUEST = ("quality",)
PRECISIONS = ("fp32", "bf16")
# The losses that an adapter has, by ours.
LOSSES = {
    "recbole": {"cross-entropy": "ce"},
    "rectools": {"cross-entropy": "fast-ce"},
    "replay": {"cross-entropy": "ce", "sampled-softmax": "sampled"},
}
SAMPLED = ("loss.name=sampled-softmax", "loss.negatives=256")
# Where training to the end stops, for us and for peers: epochs, and epochs without a better validation NDCG@10.
EPOCHS, PATIENCE = 100, 8
SEEDS = (1, 2, 3)
# Width 64, two blocks and two heads for all; otherwise each model's defaults, but for what makes training bearable:
# small batches, for few users with long histories make few of them; models that need one sample a prefix see 20 random
# ones of each user in an epoch; and BST, for which ranking all items costs as much as seven epochs, is in bf16 and
# validated on 1,000 users every ten epochs.
WINDOWS = ("train.batch_size=32", "train.patience=5")
PREFIXES = ("train.prefixes_per_user=20", "train.batch_size=128", "train.patience=5")
QUALITY: dict[str, Sequence[str]] = {
    "SASRec": WINDOWS,
    "BERT4Rec": (*WINDOWS, "train.evaluate_every=4"),
    "GRU4Rec": WINDOWS,
    "Caser": WINDOWS,
    "LightSANs": PREFIXES,
    "PAUP": PREFIXES,
    "BST": (
        *PREFIXES,
        "train.precision=bf16",
        "train.valid_users=1000",
        "train.evaluate_every=10",
        "train.patience=2",
    ),
    # It thinks most of what a user has taken already: seen items are left out, or they would fill its lists.
    "LightGCN": ("train.batch_size=2048", "train.evaluate_every=4", "train.patience=4", "evaluate.seen=mask"),
}
# Training time after which a peer begins no further epoch.
PEER_QUALITY_S = 1800


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        data: prepared folders.
        lengths: longest histories that are read.
        names: of the peers.
        seconds: to time each of them.
        stages: which comparisons.
        root: where the peers' environments are.
    """

    data: Sequence[Path]
    lengths: Sequence[int] = (50, 200)
    names: Sequence[str] = tuple(peers.PEERS)
    seconds: float = 30.0
    stages: Sequence[str] = STAGES
    root: Path | None = None


@dataclass(frozen=True)
class Task:
    """One measurement: a name for its file, and who does it."""

    stage: str
    name: str
    peer: str
    arguments: Sequence[str]


def tasks(settings: Settings) -> list[Task]:
    """Everything that ``settings`` asks for, stage by stage."""
    makers: dict[str, Callable[[Settings, Path], list[Task]]] = {
        "floor": _floor,
        "epoch": _epochs,
        "models": _models,
        "evaluation": _evaluation,
        "convergence": _convergence,
        "quality": _quality,
    }
    return [task for stage in settings.stages for folder in settings.data for task in makers[stage](settings, folder)]


def _floor(settings: Settings, folder: Path) -> list[Task]:
    return [
        Task("floor", f"recalign-{length}-{precision}", "recalign", ["floor", *_common(folder, length, precision)])
        for length, precision in itertools.product(settings.lengths, PRECISIONS)
    ]


def _epochs(settings: Settings, folder: Path) -> list[Task]:
    tasks = []
    for length, precision in itertools.product(settings.lengths, PRECISIONS):
        common = [*_common(folder, length, precision), "--seconds", str(settings.seconds)]
        for loss, more in (("cross-entropy", ()), ("sampled-softmax", SAMPLED)):
            ours = ["epoch", *common, "train.windows=last", *more]
            tasks.append(Task("epoch", f"recalign-{length}-{precision}-{loss}", "recalign", ours))
            tasks += [
                Task("epoch", f"{name}-{length}-{precision}-{loss}", name, [*common, "--loss", LOSSES[name][loss]])
                for name in settings.names
                if loss in LOSSES[name]
            ]
        # RecBole trains on every prefix, which is every target: ours on all windows is the same work.
        everything = ["epoch", *common]
        tasks.append(Task("epoch", f"recalign-{length}-{precision}-all-windows", "recalign", everything))
    return tasks


def _models(settings: Settings, folder: Path) -> list[Task]:
    tasks = []
    for length, (name, model) in itertools.product(settings.lengths, MODELS.items()):
        if not issubclass(model, SequenceRecommender):
            continue
        overrides = [f"model={{name: {name}, dim: 64, max_length: {length}}}"]
        if model.samples == "prefix":
            overrides.append("train.batch_size=1024")
        common = [*_common(folder, length, "fp32"), "--seconds", str(settings.seconds), *overrides]
        tasks.append(Task("models", f"{name}-{length}", "recalign", ["epoch", *common]))
    return tasks


def _evaluation(settings: Settings, folder: Path) -> list[Task]:
    length = settings.lengths[0]
    ours = ["evaluation", *_common(folder, length, "fp32")]
    return [
        Task("evaluation", "recalign", "recalign", ours),
        *(
            Task("evaluation", name, name, [*_common(folder, length, "fp32"), "--time-evaluation"])
            for name in settings.names
        ),
    ]


def _convergence(settings: Settings, folder: Path) -> list[Task]:
    """Exact and sampled softmax of ours, and the peer that is fastest per epoch with what makes it so.

    The time of validation counts for none of them.
    """
    common = _common(folder, settings.lengths[0], "fp32")
    patient = [f"train.epochs={EPOCHS}", f"train.patience={PATIENCE}", "train.windows=last"]
    ours = {"cross-entropy": (), "sampled-softmax": SAMPLED}
    tasks = [
        Task("convergence", f"recalign-{loss}", "recalign", ["convergence", *common, *patient, *more])
        for loss, more in ours.items()
    ]
    if "replay" in settings.names:
        train = ["--epochs", str(EPOCHS), "--patience", str(PATIENCE), "--evaluate"]
        train += ["--loss", LOSSES["replay"]["sampled-softmax"]]
        tasks.append(Task("convergence", "replay-sampled-softmax", "replay", [*common, *train]))
    return tasks


def _quality(settings: Settings, folder: Path) -> list[Task]:
    common, tasks = _common(folder, settings.lengths[0], "fp32"), []
    for seed, (name, more) in itertools.product(SEEDS, QUALITY.items()):
        size = [] if name == "SASRec" else [f"model={{name: {name}, dim: 64, max_length: {settings.lengths[0]}}}"]
        train = [f"train.epochs={EPOCHS}", f"train.patience={PATIENCE}", f"train.seed={seed}"]
        arguments = ["convergence", *common, *size, *train, *more]
        tasks.append(Task("quality", f"{name}-seed-{seed}", "recalign", arguments))
    for seed, name in itertools.product(SEEDS, settings.names):
        # RecTools' flat net is fast, but it starts from vectors of N(0, 1) and learns badly: its usual model it is.
        train = ["--loss", "ce", "--epochs", str(EPOCHS), "--patience", str(PATIENCE), "--evaluate"]
        if name != "recbole":  # whose batch is of prefixes
            train += ["--batch-size", "32"]
        arguments = [*common, *train, "--train-seconds", str(PEER_QUALITY_S), "--seed", str(seed)]
        tasks.append(Task("quality", f"{name}-seed-{seed}", name, arguments))
    return tasks


def _common(folder: Path, length: int, precision: str) -> list[str]:
    return ["--data", str(folder.resolve()), "--max-length", str(length), "--precision", precision]
