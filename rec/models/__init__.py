"""The recommenders, one file each, and the ``rec.model`` section that chooses one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rec.models.base import Recommender
from rec.models.sasrec import SASRec, SASRecConfig

MODELS: dict[str, type[Recommender]] = {model.architecture: model for model in (SASRec,)}


def _by_name(value: Any) -> Any:
    """``model: SASRec`` is short for ``model: {name: SASRec}``, and SASRec the default."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        return {"name": SASRec.architecture, **value}
    return value


ModelConfig = Annotated[SASRecConfig, Field(), BeforeValidator(_by_name)]
