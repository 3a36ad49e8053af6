"""Feature-based transfer, LMRec^TL: frozen features of a pretrained decoder, linear heads alone are trained (LMRec,
section 2.2, Fig. 2, Tables 1 and 7). Training the heads touches nothing but these matrices.
"""

import logging
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm.joint import Heads, pair_loss, softmax_loss
from llm.lmrec_evaluation import ReaderConfig
from llm.probe_features import FeatureReader, Features
from llm.probe_job import ProbeConfig, ProbeJob
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.job import open_data
from rec.models.base import Recommender
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)


def run(job: ProbeJob, command: str) -> dict[str, Any]:
    """Compute what features are not there yet, train heads on each kind, rank the test items.

    Returns:
        The content of ``result.json``.
    """
    folder = RunFolder(job.run)
    with folder.lock("launcher"):
        folder.claim(job)
        data, begin, rows = open_data(job.data, folder.path / "data"), time.monotonic(), []
        _require_instances(data)
        reader, protocol = FeatureReader(job, data), job.rec.evaluate.protocol.of_run(data, "train")
        folder.require_the_same_inputs(reader.hashes)
        done = folder.result()
        if done is not None:
            return done
        for kind in job.llm.probe.features:
            found = reader.features(kind, folder.path / "features")
            started = time.monotonic()
            heads, steps = train_heads(found, data, job.llm.probe)
            seconds = time.monotonic() - started
            model = Probe(heads, found.items, found.test, data.instances("test")[0])
            metrics = evaluate(model, data, "test", job.rec.evaluate).summary()
            rows.append(
                {"model": "LMRec^TL", "feature": kind, "part": "test", "steps": steps, "seconds": round(seconds, 2)}
                | {"protocol_hash": protocol.hash, **metrics}
            )
            log.info("%s: HR@10 %.4f after %d steps, %.1f s", kind, metrics["HR@10"], steps, seconds)
        return folder.write_result(
            command,
            hash_of(job.model_dump(mode="json", exclude={"run"})),
            protocol.described(),
            rows,
            time.monotonic() - begin,
            data={"name": job.data, "content_hash": data.meta["content_hash"], **data.meta["counts"]},
        )


def _require_instances(data: Prepared) -> None:
    """Raise a UserError if there is nothing to stop by, or more to rank than one vector a user can."""
    owners = data.instances("test")[0]
    if len(owners.unique()) != len(owners):
        raise UserError("a probe needs one test item a user: prepare with a leave-one-out split, or one by users")
    if not len(data.instances("valid")[0]):
        raise UserError(f"{data.folder} has no validation items to stop by")


def train_heads(features: Features, data: Prepared, config: ProbeConfig) -> tuple[Heads, int]:
    """W_u and W_i by Eq. 5 on frozen features, stopped by the validation loss; and the steps that it took."""
    torch.manual_seed(config.seed)
    heads = Heads(features.items.shape[1])
    # Where few are known elsewhere, most features are zeros, which tell nothing of how the others are spread.
    known = features.users[features.users.any(1)]
    heads.user.fix(known if len(known) else features.users)
    heads.item.fix(features.items)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    loss_of, count = (pair_loss if config.loss == "bce" else softmax_loss), min(config.negatives, data.n_items)

    def loss(users: Tensor, targets: Tensor, rng: np.random.Generator) -> Tensor:
        negatives = torch.from_numpy(rng.choice(data.n_items, size=count, replace=False))
        z_users, allowed = heads.user(users), negatives != targets[:, None]
        z_targets, z_negatives = (heads.item(features.items[numbers]) for numbers in (targets, negatives))
        return loss_of((z_users * z_targets).sum(1), z_users @ z_negatives.T, allowed)

    valid_targets = data.sequence[data.instances("valid")[1]] - 1
    best, best_step, kept, step = math.inf, 0, heads.state_dict(), 0
    while step < config.steps and step - best_step < config.patience:
        rng = np.random.default_rng([config.seed, step])
        chosen = torch.from_numpy(rng.integers(len(features.users), size=config.batch_size))
        value = loss(features.users[chosen], features.targets[chosen], rng)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        step += 1
        if step % config.validate_every == 0 or step == config.steps:
            with torch.no_grad():
                judged = loss(features.valid, valid_targets, np.random.default_rng([config.seed])).item()
            if judged < best:
                best, best_step = judged, step
                kept = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    heads.load_state_dict(kept)
    return heads, step


class Probe(Recommender):
    """Scores <W_u z_u, W_i z_i> from cached features.

    Args:
        heads: W_u and W_i.
        items: [N, D].
        users: [M, D] of the test instances.
        owners: [M] their users, each once.
    """

    architecture = "LMRec^TL"

    def __init__(self, heads: Heads, items: Tensor, users: Tensor, owners: Tensor) -> None:
        nn.Module.__init__(self)
        self.config = ReaderConfig(max_length=1)
        self.heads = heads
        with torch.no_grad():
            self.table, self.vectors = heads.item(items), heads.user(users)
        self.row_of = torch.full((int(owners.max()) + 1,), -1).index_put((owners,), torch.arange(len(owners)))

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        return self.vectors[self.row_of[users]] @ self.table.T
