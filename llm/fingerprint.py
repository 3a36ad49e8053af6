"""Which model a name means, as a hash: what was computed with one is not another's."""

from pathlib import Path

from transformers import AutoConfig

from llm.engine import ADAPTER, adapted
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError

WEIGHTS = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt")


def fingerprint(model: str | Path) -> str:
    """A hash of a model folder's weights and tokenizer, or the name and revision of a model on the hub.

    Raises:
        UserError: if there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        parts = sorted(path for path in folder.iterdir() if path.suffix in WEIGHTS)
        if (folder / ADAPTER).exists():
            # Not its settings as they stand: peft writes the names of the layers in any order.
            settings = files.read_json(folder / ADAPTER)
            sizes = [settings["r"], settings["lora_alpha"], fingerprint(adapted(folder))]
            parts = [path for path in parts if path.name != ADAPTER]
            return hash_of([*sizes, *([path.name, files.sha256_file(path)] for path in parts)])
        return hash_of([[path.name, files.sha256_file(path)] for path in parts])
    try:
        return f"{model}@{getattr(AutoConfig.from_pretrained(str(model)), '_commit_hash', None)}"
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no language model: {str(error).strip().splitlines()[0]}") from error
