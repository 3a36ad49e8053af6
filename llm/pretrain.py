"""Train the small LM from scratch on behaviour histories, with exact resume."""

import logging
import math
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm.config import LLMConfig, PretrainConfig
from llm.corpus import IGNORED, HistoryCorpus
from llm.lmrec import build_lmrec
from llm.prompts import item_texts
from llm.tokenizer import train_tokenizer
from rec.data.prepared import Prepared
from rec.losses import linear_cross_entropy
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
    final = run.path / MODEL
    if (run.path / "finished.json").exists():
        return final
    train = config.train
    texts = item_texts(data.items, config.item_text)
    tokenizer = train_tokenizer(texts, config.lmrec.vocabulary, config.lmrec.context)
    corpus = HistoryCorpus(data, texts, tokenizer, config.lmrec.context)
    torch.manual_seed(train.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_lmrec(config.lmrec, len(tokenizer), tokenizer.eos_token_id).to(device).train()
    if device == "cpu":
        # The CPU's fused attention is slow backwards; at these lengths the plain products win.
        model.set_attn_implementation("eager")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=train.lr,
        betas=(0.9, 0.95),
    )
    checkpoints = Checkpoints(run.path / "checkpoints", keep_last=1)
    meta = {"config_hash": hash_of(config), "data_hash": data.meta["content_hash"]}
    done = 0
    if found := checkpoints.resume(meta):
        checkpoint, saved = found
        done = checkpoint.step
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        log.info("resuming %s after step %d", run.path, done)

    # Rows are cut anew each epoch, so epochs differ a little in length; the schedule ends with the last of them.
    lengths = [-(-len(corpus.rows(train.seed, epoch)) // train.batch_size) for epoch in range(train.epochs)]
    total = sum(lengths)
    with progress(title, total) as advance:
        for epoch in range(train.epochs):
            first = sum(lengths[:epoch])
            if first + lengths[epoch] <= done:
                continue
            for offset, (ids, labels) in enumerate(corpus.batches(train.seed, epoch, train.batch_size)):
                step = first + offset
                if step < done:
                    continue
                begin = time.monotonic()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, train)
                loss = _loss(model, ids.to(device), labels.to(device), train.bf16)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
                optimizer.step()
                tokens = int((labels != IGNORED).sum())
                seconds = time.monotonic() - begin
                run.log("lm_step", step=step, loss=loss.item(), tokens=tokens, seconds=seconds)
                advance(step + 1, f"loss {loss.item():.3f}  {tokens / seconds:,.0f} tokens/s")
                if (step + 1) % train.checkpoint_every == 0:
                    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    checkpoints.save(step + 1, saved, meta)
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    files.write_json(run.path / "finished.json", {"steps": total, "loss": loss.item() if total > done else None})
    return final


def _loss(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Mean next-token cross-entropy. Right padding under a causal mask is never seen, so no mask is passed."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        hidden = model.base_model(ids[:, :-1], use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != IGNORED
    table = model.get_output_embeddings().weight
    return linear_cross_entropy(hidden[wanted].to(table.dtype), table, labels[:, 1:][wanted])
