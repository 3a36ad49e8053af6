"""Every mistake in the recipe of a main job that can be seen without training anything."""

import logging

from align.config import MainJob
from align.order import set_aside
from align.snapshots import CANARY_TOKENS
from llm.engine import check_adaptable, check_head_dim, check_model
from llm.pretrain import make_tokenizer
from llm.prompts import item_texts, prompt_tokens, require_column
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.evaluation import require_possible
from rec.models import MODELS
from rec.models.base import SequenceRecommender
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)


def check(job: MainJob, data: Prepared) -> None:
    """Everything that would otherwise stop the job after minutes of work.

    Raises:
        UserError: on a recommender, item template, prompt, model, tokenizer or encoder that cannot be used, or too few
            users.
    """
    llm = job.llm
    require_possible(job.rec.evaluate, data, job.rec.train.on, ("valid", "test"))
    _check_recommender(job.rec.model.name)
    _check_users(job, data)
    _check_adapters(job)
    texts = item_texts(data.items, llm.item_text)
    if llm.model is not None:
        check_model(llm.model)
        tokenizer = load_tokenizer(llm.model)
    elif "{item}" not in llm.knowledge.prompt:
        raise UserError(
            "llm.knowledge.prompt must hold {item}: an LM that is trained here continues an item's text, it does"
            " not follow instructions"
        )
    else:
        check_head_dim("llm.lmrec", llm.lmrec.dim // llm.lmrec.heads)
        tokenizer = make_tokenizer(data, llm)
    longest = max(map(len, prompt_tokens(texts, llm.knowledge.prompt, tokenizer))) + llm.knowledge.max_new_tokens
    if llm.model is not None:
        check_model(llm.model, longest)
    elif longest > llm.lmrec.context:
        raise UserError(
            f"the longest prompt and its answer need {longest} tokens, llm.lmrec.context is {llm.lmrec.context}:"
            " raise it, or shorten llm.item_text or llm.knowledge.max_new_tokens"
        )
    elif llm.lmrec.context <= CANARY_TOKENS:
        raise UserError(
            f"llm.lmrec.context is {llm.lmrec.context}: every refresh is proved on {CANARY_TOKENS} tokens and the next"
        )
    for column in job.align.watch:
        require_column(data.items, column, "align.watch")
    if job.llm.encoder.model != "llm":
        load_tokenizer(job.llm.encoder.model)
    if (wanted := job.llm.knowledge.max_new_tokens) > (read := job.llm.encoder.max_tokens):
        log.warning(
            "llm.encoder.max_tokens=%d may cut texts of llm.knowledge.max_new_tokens=%d: what no recommender reads is"
            " rewarded all the same",
            read,
            wanted,
        )


def _check_recommender(name: str) -> None:
    """Whether it reads the texts of a history and has p(y|x,s)."""
    able = [other for other, model in MODELS.items() if issubclass(model, SequenceRecommender)]
    if name not in able:
        raise UserError(
            f"rec.model {name} cannot be aligned with, it reads no texts of a history: take one of {', '.join(able)}"
        )


def _check_users(job: MainJob, data: Prepared) -> None:
    """Whether there is something to fit to, to reward by and to stop by."""
    align = job.align
    kept = data.without(set_aside(data, align.reward_users, align.trainer.seed))
    validation = len(kept.instances("valid")[0])
    if align.reward_users and job.rec.train.on == "train" and not validation:
        raise UserError(
            f"align.reward_users {align.reward_users} leaves no validation items to stop by in {data.folder}: lower it"
        )
    if align.objective.temperature == "calibrated" and not validation:
        raise UserError(f"align.objective.temperature=calibrated needs validation items, {data.folder} has none")


def _check_adapters(job: MainJob) -> None:
    lora, model = job.align.trainer.lora, job.llm.model
    if lora is None:
        return
    if model is None:
        raise UserError(
            "align.trainer.lora needs llm.model: an LM that is trained here is a GPT-2, and vLLM cannot adapt it"
        )
    check_adaptable(model)
    from align.policy import layers_to_adapt  # DeepSpeed takes seconds to import, and few jobs need it here

    layers_to_adapt(model, lora)
