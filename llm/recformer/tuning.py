"""Which weights of a RECFORMER are tuned (Elephant, Table 1)."""

from llm.recformer.config import OptimizerConfig
from llm.recformer.model import RecformerModel
from rec.runtime.errors import UserError


def choose_tuned(model: RecformerModel, stage: OptimizerConfig) -> None:
    """Let the weights that ``stage`` names have gradients, and no others.

    Raises:
        UserError: if it names a layer that the backbone does not have.
    """
    wanted = stage.tune_layers
    model.requires_grad_(wanted == "all")
    if wanted not in ("all", "none"):
        layers = model.layers
        if beyond := [number for number in wanted if number >= len(layers)]:
            raise UserError(
                f"tune_layers {beyond[0]}: the backbone has {len(layers)} layers, counted from 0 to {len(layers) - 1}"
            )
        for number in wanted:
            layers[number].requires_grad_(True)
        model.token_types.requires_grad_(True)
        model.item_positions.requires_grad_(True)
    if stage.freeze_word_embeddings:
        model.backbone.get_input_embeddings().requires_grad_(False)
