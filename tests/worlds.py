"""What tests share: a ring of items to make, where real data may lie, and small models."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec.data.prepared import META
from rec.data.raw import RawData

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
# What a small model needs besides dim and max_length.
SMALL_MODELS = {
    "SASRec": {"blocks": 1},
    "BERT4Rec": {"blocks": 1},
    "LightSANs": {"blocks": 1},
    "PAUP": {"blocks": 1, "slot": 2, "segments": 2},
    "BST": {"mlp": [32]},
}


def make_raw(folder: Path, n_users: int = 40, n_items: int = 30, length: int = 14, seed: int = 0) -> RawData:
    """Users walking around a ring of items, mostly one step at a time: there is something to learn."""
    rng = np.random.default_rng(seed)
    place = rng.integers(n_items, size=n_users)
    users, items = [], []
    for _ in range(length):
        users += range(n_users)
        items += place.tolist()
        place = (place + np.where(rng.random(n_users) < 0.8, 1, rng.integers(2, n_items, size=n_users))) % n_items
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "source.txt").write_text(f"{n_users} {n_items} {length} {seed}")
    return RawData(
        pa.table(
            {
                "item_id": [f"i{item}" for item in range(n_items)],
                "title": [f"Thing number {item}" for item in range(n_items)],
                "kind": ["odd" if item % 2 else "even" for item in range(n_items)],
            }
        ),
        pa.table(
            {
                "user_id": [f"u{user}" for user in users],
                "item_id": [f"i{item}" for item in items],
                "timestamp": pa.array(range(len(users)), pa.int64()),
            }
        ),
        [folder / "source.txt"],
    )


def prepare_anew(data: Path) -> None:
    """What a prepared folder looks like after its source has changed."""
    meta = json.loads((data / META).read_text())
    (data / META).write_text(json.dumps(meta | {"content_hash": "another"}))
