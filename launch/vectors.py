"""``recalign vectors``: item vectors of a catalog from any language model, as one kind of file.

What is given decides: the run folder of a RECFORMER or a saved one gives [CLS] of an item's text, a causal LM (LMRec
among them) the hidden state of [EOS] after it, any other encoder the mean of its hidden states.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from llm.config import EncoderConfig
from llm.eos_vectors import eos_vectors
from llm.prompts import item_texts
from llm.recformer.encode import vectors_of_backbone, vectors_of_model
from llm.recformer.job import RecformerJob, Stage, load_job
from llm.recformer.model import RecformerConfig, is_recformer, resolve
from llm.text_encoder import TextEncoder
from rec.data.prepared import Prepared
from rec.items import load_vectors, save_vectors
from rec.runtime import files
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, is_run_config

FINISHED = "finished.json"
DEFAULT_TEMPLATE = "{title}"


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
    prepared = Prepared.load(data)
    config = Path(source) / CONFIG
    if is_run_config(config):
        if (read_recipe(config).get("llm") or {}).get("recformer"):
            _refuse(item_text, "--item-text", "reads llm.recformer.text.attributes")
            written = _write_of_run(load_job(config), prepared, out, stage)
            return {**_described(out, prepared), "stage": written}
        item_text = item_text or (read_recipe(config).get("llm") or {}).get("item_text")
        source = str(_language_model(Path(source)))
    _refuse(stage, "--stage", "is no run of a RECFORMER")
    _write_of_model(source, prepared, out, item_text)
    return _described(out, prepared)


def _write_of_run(job: RecformerJob, data: Prepared, out: Path, stage: Stage | None) -> Stage:
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
    return stage


def require_untuned(backbone: str) -> None:
    """Raise a UserError if ``backbone`` is a RECFORMER that was trained: its vectors are not an untuned one's."""
    name = resolve(backbone)
    if is_recformer(name):
        raise UserError(
            f"{name} is a RECFORMER that was trained: what it gives is no vanilla vector; name a run or a recipe with"
            " the pretrained encoder as its backbone"
        )


def _write_of_model(source: str, data: Prepared, out: Path, item_text: str | None) -> None:
    name = resolve(source)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source} is neither a run folder nor a model: {str(error).strip().splitlines()[0]}"
        ) from error
    if config.model_type == RecformerConfig.model_type:
        _refuse(item_text, "--item-text", "reads the attributes that it was trained on")
        vectors_of_model(Path(name), data, out)
        return
    texts = item_texts(data.items, item_text or DEFAULT_TEMPLATE)
    is_causal = any(architecture.endswith(("CausalLM", "LMHeadModel")) for architecture in config.architectures or ())
    if is_causal:
        vectors, kind = eos_vectors(name, texts), "causal LM, hidden state of [EOS]"
    else:
        vectors, kind = TextEncoder(name, EncoderConfig(max_tokens=512))(texts), "encoder, mean of hidden states"
    if not torch.isfinite(vectors).all():
        raise UserError(f"{source} gives vectors that are no numbers")
    described = {"model": source, "kind": kind, "item_text": item_text or DEFAULT_TEMPLATE}
    save_vectors(out, data.items["item_id"].to_pylist(), vectors, described)


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
    return {"items": len(vectors), "width": vectors.shape[1], "std": float(vectors.std())}
