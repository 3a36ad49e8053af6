"""The recommenders, one file each, and the ``rec.model`` section that chooses one."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rec.models.base import Recommender
from rec.models.bert4rec import BERT4Rec, BERT4RecConfig
from rec.models.bst import BST, BSTConfig
from rec.models.caser import Caser, CaserConfig
from rec.models.gru4rec import GRU4Rec, GRU4RecConfig
from rec.models.lightgcn import LightGCN, LightGCNConfig
from rec.models.lightsans import LightSANs, LightSANsConfig
from rec.models.paup import PAUP, PAUPConfig
from rec.models.sasrec import SASRec, SASRecConfig

MODELS: dict[str, type[Recommender]] = {
    model.architecture: model for model in (SASRec, BERT4Rec, GRU4Rec, Caser, LightSANs, PAUP, BST, LightGCN)
}


def _by_name(value: Any) -> Any:
    """``model: SASRec`` is short for ``model: {name: SASRec}``, and SASRec the default."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict):
        return {"name": SASRec.architecture, **value}
    return value


ModelConfig = Annotated[
    SASRecConfig
    | BERT4RecConfig
    | GRU4RecConfig
    | CaserConfig
    | LightSANsConfig
    | PAUPConfig
    | BSTConfig
    | LightGCNConfig,
    Field(discriminator="name"),
    BeforeValidator(_by_name),
]
