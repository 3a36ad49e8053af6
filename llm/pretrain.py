"""Train a language model from scratch: LMRec, or the small LM of the main job; with exact resume.

``accelerate launch --config_file launch/accelerate/cpu.yaml -m llm.pretrain --config recipe.yaml key=value``

A recipe with a section ``llm.recformer`` means RECFORMER.
"""

import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llm import lmrec_job, lmrec_run
from llm.config import LLMConfig
from llm.corpus import Corpus, HistoryCorpus, KnowledgeCorpus, PaddedBatches
from llm.joint import JointModel
from llm.lmrec import build_lmrec
from llm.lmrec_evaluation import save_model
from llm.lmrec_run import FINISHED, MODEL
from llm.prompts import item_texts, prompt_tokens, require_column
from llm.schedules import learning_rate
from llm.tokenizer import train_tokenizer
from llm.training import Plan, Training
from llm.update import PlainEngine
from rec.data.prepared import Prepared
from rec.precision import is_bf16
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.parent import die_with_parent_if_asked
from rec.runtime.ranks import lost_contact_is_named
from rec.runtime.runfolder import RunFolder


def pretrain(data: Prepared, config: LLMConfig, run: RunFolder, title: str = "LLM") -> Path:
    """Train the small LM of a main job, in this process: L1 alone, on histories or on what is known of items.

    Called again on the same folder it goes on from the last checkpoint, or returns at once when finished.

    Returns:
        The folder of the model in Hugging Face format, ``model`` in the run folder.
    """
    final, train = run.path / MODEL, config.train
    if (run.path / FINISHED).exists():
        return final
    tokenizer = make_tokenizer(data, config)
    batches = PaddedBatches(_corpus(data, config, tokenizer), train.seed, train.epochs, train.batch_size)
    torch.manual_seed(train.seed)
    decoder = build_lmrec(config.lmrec, len(tokenizer), tokenizer.eos_token_id)
    if not torch.cuda.is_available():
        # The CPU's fused attention is slow backwards; at these lengths the plain products win.
        decoder.set_attn_implementation("eager")
    model = JointModel(decoder, bf16=is_bf16(train.precision), exact_head=True)
    engine = PlainEngine(model, train.lr, train.weight_decay, (0.9, 0.95), 1e-8, train.clip_norm)
    plan = Plan(
        batches.steps,
        lambda step: learning_rate(step, batches.steps, train.lr, train.warmup_fraction),
        batches,
        train.checkpoint_every,
    )
    meta = {"config_hash": hash_of(config), "data_hash": data.meta["content_hash"]}
    training = Training(plan, engine, run, meta, title)
    training.loop()
    save_model(run.path, model, training.best_or_last(), tokenizer, MODEL)
    files.fsync_below(final)
    files.write_json(run.path / FINISHED, {"steps": batches.steps})
    return final


def make_tokenizer(data: Prepared, config: LLMConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of an LM that is trained here, made for the items and what is known of them.

    Raises:
        UserError: if a column that the recipe names is not there.
    """
    known = [text for own in _known(data, config) for text in own]
    texts = [*item_texts(data.items, config.item_text), *known]
    return train_tokenizer(texts, config.lmrec.vocabulary, config.lmrec.context)


def _corpus(data: Prepared, config: LLMConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    texts, context = item_texts(data.items, config.item_text), config.lmrec.context
    if config.train.on == "histories":
        return HistoryCorpus(data, texts, tokenizer, context)
    prompts = prompt_tokens(texts, config.knowledge.prompt, tokenizer)
    return KnowledgeCorpus(prompts, _known(data, config), tokenizer, context)


def _known(data: Prepared, config: LLMConfig) -> list[list[str]]:
    """[items] the texts about each item that the LM is trained on: none outside the share."""
    train = config.train
    for name in train.knowledge_columns:
        require_column(data.items, name, "llm.train.knowledge_columns")
    columns = [data.items[name].to_pylist() for name in train.knowledge_columns]
    count = round(train.knowledge_share * data.n_items)
    chosen = set(np.random.default_rng(train.seed).permutation(data.n_items)[:count].tolist())
    return [[texts[item] for texts in columns if texts[item] and item in chosen] for item in range(data.n_items)]


def main() -> None:
    """Entry of every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. llm.train.lr=1e-3")
    arguments = parser.parse_args()
    die_with_parent_if_asked()
    if lmrec_job.is_recformer(lmrec_job.read(arguments.config, arguments.overrides)):
        raise UserError(f"{arguments.config} is a recipe of RECFORMER: start -m llm.recformer.pretrain with it")
    job = lmrec_job.load_job(arguments.config, arguments.overrides)
    with lost_contact_is_named():
        lmrec_run.run(job, shlex.join(["python", "-m", "llm.pretrain", *sys.argv[1:]]))


if __name__ == "__main__":
    run_main(main, "pretrain")
