"""``recalign vectors``: item vectors of a catalog from any language model, as one kind of file.

What is given decides: the run folder of a RECFORMER or a saved one gives [CLS] of an item's text, a causal LM (LMRec
among them) the hidden state of [EOS] after it, any other encoder the mean of its hidden states, normalised.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from llm.config import EncoderConfig
from llm.eos_vectors import eos_vectors
from llm.fingerprint import fingerprint
from llm.prompts import item_texts
from llm.recformer.encode import vectors_of_backbone, vectors_of_model
from llm.recformer.job import FINISHED, RecformerJob, Stage, load_job
from llm.recformer.model import RecformerConfig, is_recformer, resolve, width_of
from llm.text_encoder import TextEncoder
from rec.data.prepared import Prepared
from rec.items import deviation_of, load_vectors, save_vectors
from rec.runtime import files
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, is_run_config

DEFAULT_TEMPLATE = "{title}"
READS_ITS_OWN = "reads the attributes that it was trained on"


def write(
    source: str, data: Path, out: Path, stage: Stage | None = None, item_text: str | None = None
) -> dict[str, Any]:
    """Make ``out``, and say what it holds: ``items``, ``width``, ``std``, and ``stage`` if a RECFORMER's run made it.

    Args:
        source: a run folder, a model folder, or a model's name on the hub.
        data: prepared folder of the catalog.
        out: ``item_vectors.safetensors``.
        stage: of a RECFORMER's run: which model; by default the last that is finished, never the untuned one.
        item_text: template of an item's text, for models that are no RECFORMER.

    Raises:
        UserError: if there is no such model, or an option does not fit it.
    """
    files.require_writable(out)
    prepared, job = Prepared.load(data), _recformer_run(source, item_text)
    if job is not None:
        stage = _stage_of(job, stage)
        _write_of_run(job, prepared, out, stage)
        return {**_described(out, prepared), "stage": stage}
    _refuse(stage, "--stage", "is no run of a RECFORMER")
    _write_of_model(source, prepared, out, item_text)
    return _described(out, prepared)


def width_of_source(source: str, data: Prepared, item_text: str | None = None) -> int:
    """The width of the vectors that ``write`` would make; raises what that raises before it encodes anything."""
    job = _recformer_run(source, item_text)
    if job is not None:
        _stage_of(job, None)
        return width_of(job.settings.backbone)
    name, template = _model_of(source, item_text)
    config = _config_of(name, source)
    if config.model_type == RecformerConfig.model_type:
        _refuse(item_text, "--item-text", READS_ITS_OWN)
    else:
        item_texts(data.items, template)
    return config.hidden_size


def hash_of_source(source: str) -> str:
    """Of the weights and the tokenizer that ``write`` would read of a source that is no fresh RECFORMER's run."""
    job = _recformer_run(source, None)
    if job is None:
        return fingerprint(_model_of(source, None)[0])
    stage = _stage_of(job, None)
    return fingerprint((job.finetune_folder / "FT1" if stage == "FT" else job.pretrain_folder) / "model")


def _recformer_run(source: str, item_text: str | None) -> RecformerJob | None:
    """The job of a RECFORMER's run folder; None for any other source."""
    config = Path(source) / CONFIG
    if not is_run_config(config) or not (read_recipe(config).get("llm") or {}).get("recformer"):
        return None
    _refuse(item_text, "--item-text", "reads llm.recformer.text.attributes")
    return load_job(config)


def _stage_of(job: RecformerJob, stage: Stage | None) -> Stage:
    """The stage that is asked for, or the last one that is finished."""
    finetuned, pretrained = job.finetune_folder / "FT1", job.pretrain_folder
    there = {"FT": (finetuned / FINISHED).exists(), "PT": (pretrained / FINISHED).exists(), "vanilla": True}
    finished: list[Stage] = [name for name in ("FT", "PT") if there[name]]
    if not finished and stage is None:
        raise UserError(
            f"no stage of {job.run} is finished: run 'recalign pretrain {job.run / CONFIG}', or take the untuned"
            " backbone's vectors with --stage vanilla"
        )
    stage = stage or finished[0]
    if not there[stage]:
        raise UserError(f"stage-{stage} of {job.run} is not finished: run 'recalign pretrain {job.run / CONFIG}'")
    return stage


def _write_of_run(job: RecformerJob, data: Prepared, out: Path, stage: Stage) -> None:
    finetuned, pretrained = job.finetune_folder / "FT1", job.pretrain_folder
    if stage == "vanilla":
        require_untuned(job.settings.backbone)
        vectors_of_backbone(job.settings, data, out, job.tokens)
    elif stage == "PT":
        vectors_of_model(pretrained / "model", data, out, job.tokens)
    elif (own := job.open(job.data)).meta["content_hash"] == data.meta["content_hash"]:
        # The table that the best model was trained against (Elephant, 3.1).
        source = {"model": str(finetuned / "model"), "kind": "RECFORMER, item table of stage-FT1"}
        vectors = load_vectors(finetuned / "item_vectors.safetensors", own)
        save_vectors(out, data.items["item_id"].to_pylist(), vectors, source)
    else:
        vectors_of_model(finetuned / "model", data, out, job.tokens)


def require_untuned(backbone: str) -> None:
    """Raise a UserError if ``backbone`` is a RECFORMER that was trained: its vectors are not an untuned one's."""
    name = resolve(backbone)
    if is_recformer(name):
        raise UserError(
            f"{name} is a RECFORMER that was trained: what it gives is no vanilla vector; name a run or a recipe with"
            " the pretrained encoder as its backbone"
        )


def _write_of_model(source: str, data: Prepared, out: Path, item_text: str | None) -> None:
    name, template = _model_of(source, item_text)
    config = _config_of(name, source)
    if config.model_type == RecformerConfig.model_type:
        _refuse(item_text, "--item-text", READS_ITS_OWN)
        vectors_of_model(Path(name), data, out)
        return
    texts = item_texts(data.items, template)
    is_causal = any(architecture.endswith(("CausalLM", "LMHeadModel")) for architecture in config.architectures or ())
    if is_causal:
        vectors, kind = eos_vectors(name, texts), "causal LM, hidden state of [EOS]"
    else:
        vectors = TextEncoder(name, EncoderConfig(max_tokens=512))(texts)
        kind = "encoder, normalised mean of hidden states"
    if not torch.isfinite(vectors).all():
        raise UserError(f"{source} gives vectors that are no numbers")
    described = {"model": source, "kind": kind, "item_text": template}
    save_vectors(out, data.items["item_id"].to_pylist(), vectors, described)


def _model_of(source: str, item_text: str | None) -> tuple[str, str]:
    """The model that a source means, and the template of an item's text: a run's own, where none is asked for."""
    config = Path(source) / CONFIG
    if is_run_config(config):
        item_text = item_text or (read_recipe(config).get("llm") or {}).get("item_text")
        source = str(_language_model(Path(source)))
    return resolve(source), item_text or DEFAULT_TEMPLATE


def _config_of(name: str, source: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is neither a run folder nor a model: {str(error).strip().splitlines()[0]}"
        ) from error


def _language_model(run: Path) -> Path:
    """The model of a run folder that is no RECFORMER's; an LMRec's lies in ``model``, a main job's in ``llm/model``."""
    for folder in (run / "model", run / "llm" / "model"):
        if (folder / "config.json").is_file() and "model_type" in files.read_json(folder / "config.json"):
            return folder
    raise UserError(f"{run} holds no language model of its own (looked into model/ and llm/model/)")


def _refuse(option: str | None, name: str, why: str) -> None:
    if option is not None:
        raise UserError(f"{name} {option!r} has no meaning here: the source {why}")


def _described(out: Path, data: Prepared) -> dict[str, Any]:
    vectors = load_vectors(out, data)
    return {"items": len(vectors), "width": vectors.shape[1], "std": float(deviation_of(vectors))}
