"""A world made up to see whether alignment works: what is true of its items, and what users do next, is known.

Every item has one value of each of four attributes, told as a sentence: "It tastes of norava." One attribute, chosen by
the seed, drives what users do: each of its values leads to one other value, and a user's next item has the value that
the present one leads to with probability ``follow``, otherwise a random one; within a value, items are equally likely.
The other three attributes mean nothing. A recommender that reads the driving attribute of each item knows all there is
to know; one that reads a random true sentence of each seldom does, and the ids alone take more interactions to learn
from than there are.

The sentences are columns of the item table, in the order of ``ATTRIBUTES``; the driving one is named in ``meta.json``.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from rec.data.raw import RawData
from rec.runtime.errors import UserError

ATTRIBUTES = {
    "taste": "It tastes of {}.",
    "look": "It looks like {}.",
    "origin": "It comes from {}.",
    "company": "It goes with {}.",
}
FILTERS = {"k_core": 0}  # few interactions of each item are the point
CONSONANTS, VOWELS, SYLLABLES = "bdfgklmnprstvz", "aeiou", 3


@dataclass(frozen=True)
class World:
    """The size of a world.

    Attributes:
        items: how many; as many as there are interactions with one at least are prepared.
        values: of each attribute, each with the same number of items.
        users: how many.
        length: interactions of each user.
        follow: probability that the next item has the value that the present one leads to.
        seed: of everything.
    """

    items: int = 2000
    values: int = 100
    users: int = 1250
    length: int = 8
    follow: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a world in which nothing can be learnt."""
        if (
            self.values < 2
            or self.items < self.values
            or self.users < 1
            or self.length < 3
            or not 0 <= self.follow <= 1
        ):
            raise UserError(f"no world has the size {asdict(self)}")


def read(folder: Path | None = None, world_seed: int = 0) -> RawData:
    """The world of a seed, in the size that alignment is tested in; there is no ``folder`` to read."""
    return make(World(seed=world_seed))


def make(world: World) -> RawData:
    """The items and interactions of a world."""
    rng = np.random.default_rng(world.seed)
    driving = int(rng.integers(len(ATTRIBUTES)))
    # [items, attributes]: as many items with each value, all attributes independent.
    values = np.stack([rng.permutation(np.arange(world.items) % world.values) for _ in ATTRIBUTES], axis=1)
    histories = _histories(values[:, driving], world, rng)
    words = _words(world.items + len(ATTRIBUTES) * world.values, rng)
    titles, *names = np.split(words, range(world.items, len(words), world.values))
    columns = {
        attribute: [sentence.format(own[value]) for value in values[:, place]]
        for place, ((attribute, sentence), own) in enumerate(zip(ATTRIBUTES.items(), names, strict=True))
    }
    item_ids = [f"i{item}" for item in range(world.items)]
    items = pa.table({"item_id": item_ids, "title": [title.capitalize() for title in titles], **columns})
    steps = np.arange(histories.size) % world.length
    interactions = pa.table(
        {
            "user_id": [f"u{user}" for user in np.repeat(np.arange(world.users), world.length)],
            "item_id": [f"i{item}" for item in histories.ravel()],
            "timestamp": pa.array(steps, pa.int64()),
        }
    )
    options = {name: str(value) for name, value in asdict(world).items()}
    return RawData(items, interactions, [], options={**options, "driving": list(ATTRIBUTES)[driving]})


def _histories(values: np.ndarray, world: World, rng: np.random.Generator) -> np.ndarray:
    """[users, length] items, by the value [items] of each."""
    leads_to = rng.permutation(world.values)
    by_value = np.argsort(values, kind="stable")
    sizes = np.bincount(values, minlength=world.values)
    starts = np.cumsum(sizes) - sizes
    present = rng.integers(world.values, size=world.users)
    histories = np.empty((world.users, world.length), dtype=np.int64)
    for step in range(world.length):
        histories[:, step] = by_value[starts[present] + rng.integers(sizes[present])]
        follows = rng.random(world.users) < world.follow
        present = np.where(follows, leads_to[present], rng.integers(world.values, size=world.users))
    return histories


def _words(count: int, rng: np.random.Generator) -> np.ndarray:
    """[count] different words that nobody has heard."""
    syllables = np.array([consonant + vowel for consonant in CONSONANTS for vowel in VOWELS])
    most = len(syllables) ** SYLLABLES
    if count > most:
        raise UserError(f"a world that needs {count} words is too large: there are {most}")
    chosen = rng.choice(most, count, replace=False)
    parts = [syllables[chosen // len(syllables) ** place % len(syllables)] for place in range(SYLLABLES)]
    return np.array(["".join(word) for word in zip(*parts, strict=True)])
