"""Fig. 6 of SeRALM: one user's history, what the LLM says of it before and after alignment, and what becomes of y."""

from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from align.config import MainJob, Stages
from llm.knowledge import first_texts
from llm.prompts import item_texts
from rec.build import MODEL
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.models.base import SequenceRecommender

SHOWN = 5


def case_study(job: MainJob, data: Prepared) -> dict[str, Any]:
    """The test user whose next item gained most by the factor of its rank, among those where it is among the first ten
    now; of all users where there is none. It is the best case, not a typical one: ``users_gaining`` tells the rest.
    """
    stages = Stages(job.run)
    before, after = (SequenceRecommender.from_pretrained(folder / MODEL) for folder in (stages.na, stages.final))
    protocol = job.rec.evaluate
    on = job.rec.train.on
    found = [evaluate(model, data, "test", protocol, trained_on=on) for model in (before, after)]
    ranks, instances = torch.stack([metrics.ranks for metrics in found]), found[0].instances
    gain = ranks[0].log() - ranks[1].log()
    shown = ranks[1] <= 10
    chosen = int((gain if not shown.any() else gain.masked_fill(~shown, float("-inf"))).argmax())
    instance = int(instances[chosen])
    items, lengths = data.histories("test", [instance], job.rec.model.max_length)
    target = int(data.targets("test")[instance])
    with torch.no_grad():
        scores = [
            float(model.log_likelihood(items, lengths, torch.tensor([target])).exp()) for model in (before, after)
        ]
    names = item_texts(data.items, job.llm.item_text)
    texts = [first_texts(path) for path in (stages.na_knowledge, stages.final_knowledge)]
    history = items[0, max(0, int(lengths[0]) - SHOWN) : int(lengths[0])].tolist()
    return {
        "user": data.user_ids[int(data.instances("test")[0][instance])],
        "target": names[target - 1],
        "target_texts": [own[target - 1] for own in texts],
        "likelihood": scores,
        "rank": ranks[:, chosen].tolist(),
        "history": [{"item": names[item - 1], "texts": [own[item - 1] for own in texts]} for item in history],
        "users_gaining": float((gain > 0).double().mean()),
        "users_losing": float((gain < 0).double().mean()),
    }


def print_case(case: dict[str, Any], console: Console) -> None:
    """The texts side by side, and the next item's rank."""
    (likely_before, likely_after), (rank_before, rank_after) = case["likelihood"], case["rank"]
    table = Table(
        title=escape(f"The user that gained most: {case['user']}, whose next item is {case['target']}"),
        caption=f"its p(y|x,s) {likely_before:.2g} → {likely_after:.2g}, its rank {rank_before:g} → {rank_after:g};"
        f" it rises for {case['users_gaining']:.0%} of the users and falls for {case['users_losing']:.0%}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("history, the last item last", "the LLM before alignment", "after"):
        table.add_column(name, overflow="fold")
    for entry in case["history"]:
        table.add_row(*(escape(text) for text in (entry["item"], *entry["texts"])))
    table.add_section()
    table.add_row(*(escape(text) for text in (f"next: {case['target']}", *case["target_texts"])))
    console.print(table)
