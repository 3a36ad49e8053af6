"""MovieLens originals: 100K (``u.data``, ``u.item``) and 1M (``ratings.dat``, ``movies.dat``)."""

import re
from pathlib import Path

import pyarrow as pa

from rec.data import raw

GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


def read(folder: Path) -> raw.RawData:
    """Read whichever of the two is in ``folder``.

    Items have ``title`` (without the year), ``year`` and ``genres`` (joined by ", "). Every rating is an
    interaction, whatever its value, as in the three papers' leave-one-out protocols.
    """
    ratings_path = raw.find_file(folder, "u.data", "ratings.dat")
    folder = ratings_path.parent
    if ratings_path.name.startswith("u.data"):
        ratings = raw.read_delimited(ratings_path, "\t", ["user_id", "item_id", "rating", "timestamp"], quoted=False)
        items_path = raw.find_file(folder, "u.item")
        columns = ["item_id", "title", "date", "video_date", "url", *GENRES_100K]
        table = raw.read_delimited(items_path, "|", columns, encoding="latin-1", quoted=False)
        flags = [table[genre].to_pylist() for genre in GENRES_100K]
        genres = [
            ", ".join(name for name, flag in zip(GENRES_100K, row, strict=True) if flag == "1")
            for row in zip(*flags, strict=True)
        ]
    else:
        ratings = raw.read_delimited(ratings_path, "::", ["user_id", "item_id", "rating", "timestamp"], quoted=False)
        items_path = raw.find_file(folder, "movies.dat")
        columns = ["item_id", "title", "genres"]
        table = raw.read_delimited(items_path, "::", columns, encoding="latin-1", quoted=False)
        genres = [text.replace("|", ", ") for text in table["genres"].to_pylist()]
    titles, years = zip(*map(_split_year, table["title"].to_pylist()), strict=True)
    items = pa.table({"item_id": table["item_id"], "title": titles, "year": years, "genres": genres})
    raw.require_ids(ratings, ratings_path, "user_id", "item_id")
    interactions = pa.table(
        {
            "user_id": ratings["user_id"],
            "item_id": ratings["item_id"],
            "timestamp": raw.to_seconds(ratings, "timestamp", ratings_path),
        }
    )
    return raw.RawData(items, interactions, [ratings_path, items_path])


def _split_year(title: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)\s*\((\d{4})\)\s*", title)
    return (match[1], match[2]) if match else (title.strip(), "")
