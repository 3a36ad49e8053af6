"""Train the small LM from scratch, on behaviour histories or on what is known of items, with exact resume."""

import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm.config import LLMConfig, PretrainConfig
from llm.corpus import IGNORED, Corpus, HistoryCorpus, KnowledgeCorpus
from llm.lmrec import build_lmrec
from llm.prompts import item_texts, prompt_tokens, require_column
from llm.tokenizer import train_tokenizer
from rec.data.prepared import Prepared
from rec.linear_cross_entropy import linear_cross_entropy
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import hash_of
from rec.runtime.progress import progress
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

MODEL = "model"


def learning_rate(step: int, total: int, config: PretrainConfig) -> float:
    """Linear warm-up to ``config.lr``, then cosine decay to a tenth of it; a pure function of the step."""
    warmup = max(1, round(config.warmup_fraction * total))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def pretrain(data: Prepared, config: LLMConfig, run: RunFolder, title: str = "LLM") -> Path:
    """Train, save in Hugging Face format under ``model`` in the run folder, and return that folder.

    Called again on the same folder it goes on from the last checkpoint, or returns at once when finished.
    """
    final, train = run.path / MODEL, config.train
    if (run.path / "finished.json").exists():
        return final
    tokenizer = make_tokenizer(data, config)
    corpus = _corpus(data, config, tokenizer)
    state = _State(config, len(tokenizer), tokenizer.eos_token_id, run, data.meta["content_hash"])
    done = state.resume()
    # Rows are cut anew each epoch, so epochs differ a little in length; the schedule ends with the last of them.
    lengths = [-(-len(corpus.rows(train.seed, epoch)) // train.batch_size) for epoch in range(train.epochs)]
    total = sum(lengths)
    with progress(title, total) as advance:
        for epoch in range(train.epochs):
            first = sum(lengths[:epoch])
            if first + lengths[epoch] <= done:
                continue
            for step, (ids, labels) in enumerate(corpus.batches(train.seed, epoch, train.batch_size), start=first):
                if step < done:
                    continue
                begin = time.monotonic()
                loss = state.update(ids, labels, learning_rate(step, total, train))
                seconds, tokens = time.monotonic() - begin, int((labels != IGNORED).sum())
                run.log("lm_step", step=step, loss=loss, tokens=tokens, seconds=seconds)
                advance(step + 1, f"loss {loss:.3f}  {tokens / seconds:,.0f} tokens/s")
                if (step + 1) % train.checkpoint_every == 0:
                    state.save(step + 1)
    state.model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    files.write_json(run.path / "finished.json", {"steps": total})
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


class _State:
    """What the LM's training is made of, between two steps."""

    def __init__(self, config: LLMConfig, vocabulary: int, eos: int, run: RunFolder, data_hash: str) -> None:
        self.config = train = config.train
        torch.manual_seed(train.seed)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build_lmrec(config.lmrec, vocabulary, eos).to(self.device).train()
        if self.device == "cpu":
            # The CPU's fused attention is slow backwards; at these lengths the plain products win.
            self.model.set_attn_implementation("eager")
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95))
        self.checkpoints = Checkpoints(run.path / "checkpoints", keep_last=1)
        self.meta = {"config_hash": hash_of(config), "data_hash": data_hash}

    def update(self, ids: torch.Tensor, labels: torch.Tensor, lr: float) -> float:
        """One optimizer step; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = _loss(self.model, ids.to(self.device), labels.to(self.device), self.config.bf16)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return loss.item()

    def save(self, step: int) -> None:
        """Write the checkpoint of ``step`` finished steps."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        self.checkpoints.save(step, state, self.meta)

    def resume(self) -> int:
        """Restore the newest checkpoint if there is one; returns the steps that it had finished."""
        found = self.checkpoints.resume(self.meta)
        if found is None:
            return 0
        checkpoint, saved = found
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        log.info("resuming %s after step %d", checkpoint.folder.parent.parent, checkpoint.step)
        return checkpoint.step


def _loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean next-token cross-entropy. Right padding under a causal mask is never seen, so no mask is passed."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    table = model.get_output_embeddings().weight
    return linear_cross_entropy(hidden[wanted].to(table.dtype), table, labels[:, 1:][wanted])
