"""A causal LM of the user's own, as it is trained here."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rec.runtime.errors import UserError


def load_causal_lm(model: str | Path, asked_by: str = "") -> PreTrainedModel:
    """A causal LM in float32 and without dropout, whatever it was trained with.

    What samples is to be what is scored and trained, attention over packed texts has no dropout, and a validation loss
    is not to be drawn at random.

    Args:
        model: a folder or hub name.
        asked_by: the key of a recipe that names it, for the message.

    Raises:
        UserError: if it is none.
    """
    try:
        config = AutoConfig.from_pretrained(str(model))
        for own in (config, config.get_text_config()):
            for name in [name for name, value in vars(own).items() if "drop" in name and isinstance(value, float)]:
                setattr(own, name, 0.0)
        return AutoModelForCausalLM.from_pretrained(str(model), config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        where = f"{asked_by}: " if asked_by else ""
        raise UserError(f"{where}{model} is no causal LM: {str(error).strip().splitlines()[0]}") from error
