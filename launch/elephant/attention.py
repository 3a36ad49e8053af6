"""Fig. 1 of the Elephant: the backbone's attention maps beside the tuned model's, and their figures."""

import logging
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from transformers import AutoTokenizer

from llm.recformer import attention
from llm.recformer.batches import SequenceMaker
from llm.recformer.config import RecformerSettings
from llm.recformer.model import RecformerModel, load_recformer
from llm.recformer.text import item_tokens
from rec.data.prepared import Prepared
from rec.runtime import files

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

log = logging.getLogger(__name__)

HISTORIES, SHOWN_ITEMS = 64, 3
FIGURES, PICTURE = "attention.json", "attention.png"


def analyse(
    settings: RecformerSettings, tuned: Path, data: Prepared, tokens: Path, out: Path, histories: int = HISTORIES
) -> dict[str, Any]:
    """Figures of the untuned and of the tuned model on the same histories; drawn and written once.

    Args:
        settings: of the untuned one.
        tuned: the other's folder.
        data: whose validation histories are read, the newest three items of each as in the paper.
        tokens: where tokenised catalogs are kept.
        out: where ``attention.json`` and ``attention.png`` go, if any history is long enough.
        histories: how many.
    """
    if (out / FIGURES).exists():
        return files.read_json(out / FIGURES)
    torch.manual_seed(0)
    backbone, _ = load_recformer(settings)
    models = {"backbone": backbone, "tuned": RecformerModel.from_pretrained(tuned, dtype=torch.float32)}
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    catalog = item_tokens(data, settings.text, tokenizer, tokens)
    maker = SequenceMaker(catalog, settings.size, tokenizer.cls_token_id)
    users, ends = data.instances("valid")
    long_enough = torch.nonzero(ends - data.offsets[users] >= SHOWN_ITEMS).squeeze(1)
    if not len(long_enough):
        log.warning("no validation history of %s has %d items: attention is not drawn", data.folder, SHOWN_ITEMS)
        return {}
    chosen = long_enough[torch.from_numpy(np.random.default_rng(0).permutation(len(long_enough))[:histories])]
    windows = [data.sequence[end - SHOWN_ITEMS : end].numpy() for end in ends[chosen].tolist()]
    maps = {
        name: [attention.attention_map(model, maker, window, tokenizer.pad_token_id) for window in windows]
        for name, model in models.items()
    }
    found = {name: attention.figures(own) for name, own in maps.items()}
    figure = draw({name: own[0] for name, own in maps.items()})
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / PICTURE, dpi=110)
    plt.close(figure)
    files.write_json(out / FIGURES, found)
    return found


def draw(maps: dict[str, attention.AttentionMap]) -> Figure:
    """One row a layer, one column a model; heads down, tokens across, newest item first, lines between items."""
    layers = len(next(iter(maps.values())).cls)
    figure, axes = plt.subplots(
        layers, len(maps), figsize=(7 * len(maps), 0.9 * layers + 1), squeeze=False, layout="constrained"
    )
    for column, (name, own) in enumerate(maps.items()):
        for layer in range(layers):
            axis = axes[layer][column]
            # [CLS] itself is left out: it would outshine the rest.
            axis.imshow(own.cls[layer, :, 1:], aspect="auto", cmap="viridis", interpolation="nearest")
            for place in own.first_tokens[1:]:
                axis.axvline(place - 1.5, color="white", linewidth=1)
            axis.set_yticks([])
            axis.set_xticks([])
            axis.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center", fontsize=8)
        middles = [float(np.flatnonzero(own.items == item).mean()) - 1 for item in range(1, own.items.max() + 1)]
        axes[-1][column].set_xticks(middles, [f"item {item}" for item in range(1, len(middles) + 1)], fontsize=8)
        axes[0][column].set_title(name)
    figure.supxlabel("tokens, newest item first", fontsize=9)
    return figure
