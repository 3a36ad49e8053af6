"""Sequence models, by the name of their architecture."""

from rec.models.base import SequenceRecommender
from rec.models.sasrec import SASRec

MODELS: dict[str, type[SequenceRecommender]] = {model.architecture: model for model in (SASRec,)}
