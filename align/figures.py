"""What the log says of one step of the trainer: how old its samples are, what they earned, how far the policy moved."""

import collections
from collections.abc import Sequence

import torch
from torch import Tensor

from align.objective import effective_sample_fraction, mean_ratio, sampled_kl
from align.samples import Sample
from rec.runtime.runfolder import RunFolder


class Arrivals:
    """Since which step each batch lay ready, as the trainer sees it: the lag in the queue, not in flight."""

    def __init__(self) -> None:
        self._until: int | None = None  # the first batch that was not there yet
        self._since: dict[int, int | None] = {}

    def known_until(self, step: int) -> int:
        """The first batch, ``step``'s or a later one, that was not there yet when it was last looked for."""
        return max(step, self._until or 0)

    def see(self, step: int, queued: int) -> None:
        """At ``step`` its batch is there, and the ``queued`` ones after it."""
        # Of what lies there when a run goes on nobody knows since when.
        since = step if self._until is not None or step == 0 else None
        for batch in range(self.known_until(step), step + 1 + queued):
            self._since[batch] = since
        self._until = self.known_until(step + 1 + queued)

    def steps_in_queue(self, step: int) -> int | None:
        """How many steps the batch of ``step``, which is taken now, has lain ready; None if that is not known."""
        since = self._since.pop(step)
        return None if since is None else step - since


def lag_figures(samples: Sequence[Sample], step: int, refresh_every: int) -> dict[str, float | list[int]]:
    """Ages of the weights that wrote the samples of ``step``, in trainer steps and in versions."""
    lags = [step - sample.version_step for sample in samples]
    return {
        "lag_steps": max(lags),
        "lag_steps_mean": sum(lags) / len(lags),
        "lag_versions": step // refresh_every - min(sample.version for sample in samples),
        "versions": sorted({sample.version for sample in samples}),
    }


def text_figures(samples: Sequence[Sample]) -> dict[str, float]:
    """How many texts they hold, and tokens a text."""
    lengths = [len(text.token_ids) for sample in samples for draw in sample.draws for text in draw]
    return {"texts": len(lengths), "text_tokens": sum(lengths) / len(lengths)}


def policy_figures(shares: Sequence[dict[str, Tensor]], of_draws: Sequence[Tensor]) -> dict[str, float]:
    """Of all texts of a step, whichever rank had them.

    Args:
        shares: of each rank, of each of its texts [M]: ``logprob``, log p(s|x); ``from_original``, log p(s|x) less the
            original's; ``log_ratio``, of p_now / p_then; ``mismatch``, from ``mismatch_kl``; ``tokens``.
        of_draws: of each rank, logs [S] of p_now / p_then of its draws.
    """
    texts = {name: torch.cat([share[name] for share in shares]) for name in shares[0]}
    return {
        "kl": sampled_kl(texts["from_original"], texts["log_ratio"]).item(),
        "text_logprob": texts["logprob"].mean().item(),
        "mismatch_kl": (texts["mismatch"].sum() / texts["tokens"].sum()).item(),
        **ratio_figures(texts["log_ratio"], torch.cat(list(of_draws))),
    }


def ratio_figures(texts: Tensor, draws: Tensor) -> dict[str, float]:
    """Importance ratios p_now / p_then before any truncation, from logs [M] of single texts and [S] of whole draws.

    A draw's is what ``max_importance`` truncates: with several fresh items the product of its texts'.
    """
    return {
        "importance_ratio": mean_ratio(texts).item(),
        "importance_ratio_max": mean_ratio(texts.max()[None]).item(),
        "effective_sample_fraction": effective_sample_fraction(texts).item(),
        "draw_ratio": mean_ratio(draws).item(),
        "draw_ratio_max": mean_ratio(draws.max()[None]).item(),
        "draw_effective_fraction": effective_sample_fraction(draws).item(),
    }


def means(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of what each rank measured on an equal share."""
    return {name: sum(own[name] for own in figures) / len(figures) for name in figures[0]}


def reward_figures(log_p_y_given_xs: Tensor, log_p_y_given_x: Tensor) -> dict[str, float]:
    """Of p(y|x,s)/p(y|x), from logs [B, k] and [B]."""
    ratio = (log_p_y_given_xs - log_p_y_given_x[:, None]).double().exp()
    return {"reward": ratio.mean().item(), "reward_std": ratio.std().item()}


def saving_seconds(run: RunFolder) -> dict[int, float]:
    """How long the trainer published and saved after each step, from its log."""
    found: dict[int, float] = collections.defaultdict(float)
    for row in run.steps("published"):
        found[row["version_step"] - 1] += row["publish_s"]
    for row in run.steps("saved"):
        found[row["step"] - 1] += row["save_s"]
    return found


def first_no_number(values: Tensor) -> int | None:
    """The first row of [B, k] that holds a value that is not finite."""
    bad = torch.nonzero(~values.isfinite().all(1)).flatten()
    return int(bad[0]) if len(bad) else None
