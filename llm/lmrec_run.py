"""One LMRec run from its recipe: data, tokenizer, model, engine, loop, test figures."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm.causal_lm import load_causal_lm
from llm.corpus import ItemTokens, PackedBatches
from llm.fingerprint import fingerprint
from llm.joint import JointModel, PairBatch, has_plain_head
from llm.lmrec import build_lmrec
from llm.lmrec_evaluation import LMRecRecommender, load_heads, save_heads, save_model
from llm.lmrec_job import TARGET, LMRecJob, LMRecTrainConfig, TaskConfig
from llm.mixture import Source, TaskData, mix
from llm.packing import require_packable
from llm.prompts import item_texts
from llm.recommendation import RecommendationTask
from llm.schedules import learning_rate, recommendation_weight
from llm.speed import flops_per_token, peak_flops
from llm.tokenizer import load_tokenizer, train_tokenizer
from llm.training import STEP, Plan, Training
from llm.update import Engine, PlainEngine
from rec.evaluation import evaluate, require_possible
from rec.job import open_data
from rec.precision import is_bf16
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.packages import require_packages
from rec.runtime.ranks import Ranks, left_together
from rec.runtime.runfolder import METRICS, RunFolder

MODEL, TOKENIZER, FINISHED = "model", "tokenizer", "finished.json"
STATISTICS_USERS = 2048


@dataclass(frozen=True)
class Inputs:
    """What a run reads.

    Attributes:
        tasks: by name, the target first.
        sources: of task-agnostic text.
        tokenizer: of all of it.
        start: a hash of the weights to start from, empty for none.
    """

    tasks: dict[str, TaskData]
    sources: list[Source]
    tokenizer: PreTrainedTokenizerBase
    start: str = ""

    @property
    def data_hash(self) -> str:
        """Of everything that is trained on, or from."""
        prepared = [task.data for task in self.tasks.values()] + [s.prepared for s in self.sources if s.prepared]
        texts = [source.texts for source in self.sources if not source.prepared]
        content = [[data.meta["content_hash"] for data in prepared], texts]
        return hash_of([*content, self.start] if self.start else content)


def run(job: LMRecJob, command: str) -> dict[str, Any] | None:
    """Train, or go on with training; every rank calls it.

    Returns:
        The content of ``result.json`` on rank 0, None elsewhere.

    Raises:
        UserError: on whatever in the recipe cannot be done.
        Stopped: if the run folder holds a stop file.
    """
    train = job.llm.train
    _start_group(train)
    ranks, folder = Ranks.current(), RunFolder(job.run)
    # A predecessor that is being killed may hold the lock a little longer.
    with folder.lock("trainer", wait_s=30) if ranks.is_first else contextlib.nullcontext():
        if ranks.is_first:
            folder.claim(job)
        result = ranks.broadcast(folder.result() if ranks.is_first else None)
        if result is not None:
            return result if ranks.is_first else None
        begin = time.monotonic()
        inputs = read_inputs(job, folder, ranks)
        if ranks.is_first:
            folder.require_the_same_inputs({"data_hash": inputs.data_hash})
        with left_together():
            if not ranks.broadcast((folder.path / FINISHED).exists()):
                _train(job, inputs, folder, ranks)
        if train.zero_stage:
            from llm.zero import shard_no_more

            shard_no_more()
        if not ranks.is_first:
            return None  # rank 0 alone ranks the test items
        folder.log("pretrained", seconds=round(time.monotonic() - begin, 1))
        return _conclude(job, inputs, folder, command)


def read_inputs(job: LMRecJob, folder: RunFolder, ranks: Ranks) -> Inputs:
    """Open everything that the recipe names; rank 0 makes the tokenizer, once.

    Raises:
        UserError: if something is missing, or belongs to another recipe.
    """
    llm = job.llm
    if ranks.is_first:
        open_data(job.data, folder.path / "data")
    ranks.barrier()
    own = {TARGET: TaskConfig(data=job.data, item_text=llm.item_text), **llm.tasks}
    tasks = {}
    for name, task in own.items():
        data = open_data(task.data, folder.path / "data")
        tasks[name] = TaskData(data, item_texts(data.items, task.item_text))
    if llm.recommend is not None:
        require_possible(job.rec.evaluate, tasks[TARGET].data)
    sources = [Source(source) for source in llm.corpus.agnostic]
    path, start = folder.path / TOKENIZER, ""
    if llm.model is not None:
        path = starting_model(llm.model)
        start = fingerprint(path)
    elif ranks.is_first and not path.exists():
        texts = [text for task in tasks.values() for text in task.texts]
        texts += [text for source in sources for text in source.texts]
        made, temporary = train_tokenizer(texts, llm.lmrec.vocabulary, llm.lmrec.context), files.beside(path)
        made.save_pretrained(temporary)
        files.publish_folder(temporary, path)
    ranks.barrier()
    tokenizer = load_tokenizer(path)
    if llm.model is None and len(tokenizer) > llm.lmrec.vocabulary:
        raise UserError(
            f"{path} has {len(tokenizer)} tokens, llm.lmrec.vocabulary is {llm.lmrec.vocabulary}: use a new run folder"
        )
    return Inputs(tasks, sources, tokenizer, start)


def starting_model(name: str) -> Path | str:
    """Where the weights are that ``llm.model`` names: itself, or what a run folder's training left."""
    if not (Path(name) / METRICS).exists():
        return name
    if not (Path(name) / FINISHED).exists():
        raise UserError(f"llm.model: {name} is a run folder without a {MODEL} yet; finish that run first")
    return Path(name) / MODEL


def build_decoder(job: LMRecJob, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained decoder, or the one that the recipe starts from.

    Raises:
        UserError: if it has too few positions or tokens.
    """
    llm = job.llm
    torch.manual_seed(llm.train.seed)
    if llm.model is None:
        return build_lmrec(llm.lmrec, len(tokenizer), tokenizer.eos_token_id)
    model = load_causal_lm(starting_model(llm.model), "llm.model")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < llm.lmrec.context:
        raise UserError(f"llm.lmrec.context is {llm.lmrec.context}, but {llm.model} has {positions} positions")
    if model.config.vocab_size < len(tokenizer):
        raise UserError(
            f"{llm.model} has a vocabulary of {model.config.vocab_size}, its tokenizer one of {len(tokenizer)}"
        )
    require_packable(model, llm.model, llm.lmrec.context, "llm.model")
    if llm.language and not has_plain_head(model):
        raise UserError(
            f"llm.model: {llm.model} makes its logits of more than states and output embeddings (a bias, a scale, a"
            " cap), and L1 would be another loss than its own: set llm.language=false, or take another model"
        )
    return model


def build_model(job: LMRecJob, tokenizer: PreTrainedTokenizerBase) -> JointModel:
    """The module that is trained, as the recipe wants it computed."""
    llm, train = job.llm, job.llm.train
    if train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("llm.train.precision=fp16 needs a GPU; bf16 works on a CPU too")
    if train.cross_entropy == "liger":
        require_packages("llm.train.cross_entropy=liger", {"liger_kernel": "liger-kernel"})
    decoder = build_decoder(job, tokenizer)
    if train.activation_checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    if train.compile:
        decoder.base_model.compile()
    names = [TARGET, *llm.tasks] if llm.recommend else []
    pairs = llm.recommend.loss if llm.recommend else "bce"
    # Loss scaling has to reach the head's gradients before they are rounded to float16.
    exact = train.precision == "fp16"
    standardise = llm.recommend is not None and llm.recommend.standardise
    return JointModel(decoder, names, pairs, is_bf16(train.precision), exact, train.cross_entropy, standardise)


def make_plan(job: LMRecJob, inputs: Inputs, ranks: Ranks, model: JointModel, device: torch.device) -> Plan:
    """Batches and schedules of a recipe, for one rank."""
    llm, train, context, eos = job.llm, job.llm.train, job.llm.lmrec.context, inputs.tokenizer.eos_token_id
    language, tasks = None, []
    if llm.language:
        documents = mix(list(inputs.tasks.values()), inputs.sources, llm.corpus, inputs.tokenizer, context, train.seed)
        language = PackedBatches(
            documents, context, eos, train.rows, train.micro_rows, train.seed, ranks.rank, ranks.size
        )
    if llm.recommend is not None:
        tasks = _tasks(job, inputs, ranks)
    first, final = llm.recommend.recommendation_weight if llm.recommend else 0.0, train.final_fraction
    config, parameters = model.decoder.config, sum(parameter.numel() for parameter in model.decoder.parameters())

    def flops_of_pairs(batch: PairBatch) -> float:
        rows = batch.histories, batch.items
        return sum(own.tokens * flops_per_token(config, parameters, own.ids.shape[1], output=False) for own in rows)

    return Plan(
        steps=train.steps,
        learning_rate=lambda step: learning_rate(step, train.steps, train.lr, train.warmup, final),
        language=language,
        checkpoint_every=train.checkpoint_every,
        tasks=tasks,
        # Alone, L2 has nothing to be weighed against.
        weight=lambda step: recommendation_weight(step, train.steps, first, final) if llm.language else 1.0,
        validate_every=train.validate_every,
        validation_users=train.validation_users,
        patience=train.patience,
        patience_from=train.patience_from,
        flops_per_token=flops_per_token(config, parameters, context),
        flops_of_pairs=flops_of_pairs,
        peak_flops=peak_flops(device),
    )


def _tasks(job: LMRecJob, inputs: Inputs, ranks: Ranks) -> list[RecommendationTask]:
    context, seed = job.llm.lmrec.context, job.llm.train.seed
    return [
        RecommendationTask(
            name, number, task.data, ItemTokens(inputs.tokenizer, task.texts, context - 1), job.llm.recommend,
            context, seed, ranks.rank, ranks.size,
        )
        for number, (name, task) in enumerate(inputs.tasks.items())
    ]  # fmt: skip


def _start_group(train: LMRecTrainConfig) -> None:
    """The process group, before the model: ranks exist then, and ZeRO-3 does not shard what is loaded yet."""
    if not train.zero_stage:
        return
    if "ACCELERATE_USE_DEEPSPEED" not in os.environ:
        raise UserError(
            f"llm.train.zero_stage={train.zero_stage} is started by accelerate launch --config_file"
            " launch/accelerate/cpu.yaml (or gpu.yaml), or by recalign pretrain; zero_stage=0 is one plain process"
        )
    from llm.zero import start_group

    start_group(train)


def _engine(model: JointModel, job: LMRecJob) -> Engine:
    train, factor = job.llm.train, job.llm.recommend.heads_lr_factor if job.llm.recommend else 1.0
    if not train.zero_stage:
        return PlainEngine(model, train.lr, train.weight_decay, train.betas, train.eps, train.clip_norm, factor)
    from llm.zero import ZeroEngine, make_accelerator

    return ZeroEngine(model, train, make_accelerator(train), factor)


def _train(job: LMRecJob, inputs: Inputs, folder: RunFolder, ranks: Ranks) -> None:
    model = build_model(job, inputs.tokenizer)
    size = _count(model)  # now: what ZeRO-3 has sharded has no elements
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = make_plan(job, inputs, ranks, model, device)
    train = job.llm.train
    training = Training(
        plan,
        _engine(model, job),
        folder,
        {"config_hash": job.identity, "data_hash": inputs.data_hash},
        "LMRec",
        (train.keep_checkpoints, train.keep_checkpoint_every),
    )
    steps = training.loop()
    weights = training.best_or_last()
    if ranks.is_first:
        save_model(folder.path, model, weights, inputs.tokenizer, MODEL)
        facts = {"steps": steps, "best_step": training.best_step, "parameters": size}
        if plan.tasks:
            facts["valid_loss"] = training.best
        if isinstance(plan.language, PackedBatches):
            facts["packed_fill"] = round(plan.language.fill, 4)
        files.fsync_below(folder.path / MODEL)
        files.write_json(folder.path / FINISHED, facts)


def trained(job: LMRecJob, inputs: Inputs) -> LMRecRecommender:
    """The recommender of a finished run, on its target task."""
    decoder = AutoModelForCausalLM.from_pretrained(str(Path(job.run) / MODEL), dtype=torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, bf16, standardise = list(inputs.tasks), is_bf16(job.llm.train.precision), job.llm.recommend.standardise
    loss = job.llm.recommend.loss
    model = JointModel(decoder, names, loss, bf16=bf16, standardise=standardise).to(device).eval()
    known = load_heads(Path(job.run), model)
    if standardise and not known:
        for task in _tasks(job, inputs, Ranks()):
            fix_statistics(model, task, device)
        save_heads(Path(job.run), model)
    context = job.llm.lmrec.context
    tokens = ItemTokens(inputs.tokenizer, inputs.tasks[TARGET].texts, context - 1)
    return LMRecRecommender(model, TARGET, tokens, context).eval()


@torch.no_grad()
def fix_statistics(model: JointModel, task: RecommendationTask, device: torch.device) -> None:
    """Give a task's heads the statistics of the finished decoder's features: of some thousand whole training histories,
    which is what validation and test read, and of all items."""
    histories = [(part.histories, part.users) for part, _ in task.validation(STATISTICS_USERS)]
    numbers = np.array_split(np.arange(task.data.n_items), -(-task.data.n_items // STATISTICS_USERS))
    items = [task.rows.items(own) for own in numbers]
    heads = model.heads[task.name]
    for head, made in ((heads.user, histories), (heads.item, items)):
        head.fix(torch.cat([model.features(packed.to(device), places.to(device)) for packed, places in made]))


def _conclude(job: LMRecJob, inputs: Inputs, folder: RunFolder, command: str) -> dict[str, Any]:
    """Rank the test items, and write ``result.json``."""
    data, facts, rows = inputs.tasks[TARGET].data, files.read_json(folder.path / FINISHED), []
    protocol = job.rec.evaluate.protocol.of_run(data, "train")
    if job.llm.recommend is not None:
        metrics = evaluate(trained(job, inputs), data, "test", job.rec.evaluate)
        rows = [{"model": variant(job), "part": "test", "protocol_hash": protocol.hash, **metrics.summary()}]
    steps = folder.steps(STEP)
    return folder.write_result(
        command,
        job.identity,
        protocol.described(),
        rows,
        sum(row["seconds"] for row in folder.events("pretrained")),
        data={"name": job.data, "content_hash": data.meta["content_hash"], **data.meta["counts"]},
        training={
            **facts,
            "seconds": round(sum(row["seconds"] for row in steps), 1),
            "tokens": sum(row["tokens"] for row in steps),
            "vocabulary": len(inputs.tokenizer),
        },
    )


def variant(job: LMRecJob) -> str:
    """What the paper calls such a run."""
    llm = job.llm
    if llm.recommend is None:
        return "LM"
    if not llm.language:
        return "SelfPretrain" if llm.model else "LMRec -lm"
    return "LMRec +agnostic" if llm.corpus.agnostic else "LMRec"


def _count(model: JointModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
