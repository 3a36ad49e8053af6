"""MovieLens originals: 100K (``u.*``), 1M and 10M (``*.dat``), and the later ones (``ratings.csv``, ``movies.csv``)."""

import re
from pathlib import Path

import pyarrow as pa

from rec.data import raw, textfile
from rec.runtime.errors import UserError

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
COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
CSV_COLUMNS = ["userId", "movieId", "rating", "timestamp"]


def read(folder: Path, min_rating: float | None = None) -> raw.RawData:
    """Read whichever of them is in ``folder``.

    Args:
        folder: the folder, or its file of ratings.
        min_rating: leave out ratings below it (counted as ``rating_too_low``); by default every rating is an
            interaction, whatever its value, as in the three papers' leave-one-out protocols.

    Items have ``title`` (without the year), ``year`` and ``genres`` (joined by ", ").
    """
    path = raw.find_file(folder, "u.data", "ratings.dat", "ratings.csv")
    if path.name.startswith("u.data"):
        ratings = _ratings(path, "\t", min_rating)
        items_path = raw.find_file(path.parent, "u.item")
        titles, items = _items_100k(items_path)
    elif ".dat" in path.suffixes:
        ratings = _ratings(path, "::", min_rating)
        items_path = raw.find_file(path.parent, "movies.dat")
        items = _movies(items_path)
        titles = items["title"].to_pylist()
    else:
        ratings = _ratings(path, ",", min_rating)
        items_path = raw.find_file(path.parent, "movies.csv")
        items = textfile.read_delimited(items_path)
        raw.require_columns(items.column_names, items_path, "movieId", "title", "genres")
        items = items.select(["movieId", "title", "genres"]).rename_columns(["item_id", "title", "genres"])
        titles = items["title"].to_pylist()
    raw.require_ids(items, items_path, "item_id")
    titles, years = zip(*map(_split_year, titles), strict=True)
    genres = [
        "" if text == "(no genres listed)" else ", ".join(filter(None, text.split("|")))
        for text in items["genres"].to_pylist()
    ]
    table = pa.table({"item_id": items["item_id"], "title": titles, "year": years, "genres": genres})
    raw.require_ids(ratings, path, "user_id", "item_id")
    dropped: dict[str, int] = {}
    interactions = raw.read_times(ratings.select(["user_id", "item_id"]), ratings, "timestamp", path)
    if min_rating is not None:
        values = raw.cast_strings(ratings["rating"], pa.float64(), path, "rating", "a number")
        interactions = raw.keep_rated(interactions, values, min_rating, dropped)
    options = {} if min_rating is None else {"min_rating": str(min_rating)}
    return raw.RawData(table, interactions, [path, items_path], dropped, options)


def _ratings(path: Path, delimiter: str, min_rating: float | None) -> pa.Table:
    with_header = delimiter == ","
    names = CSV_COLUMNS if with_header else COLUMNS
    wanted = [name for name in names if name != "rating" or min_rating is not None]
    table = textfile.read_delimited(
        path,
        delimiter,
        None if with_header else COLUMNS,
        quoted=with_header,
        wanted=wanted,
        ids=names[:2],
    )
    return table.rename_columns([COLUMNS[names.index(name)] for name in wanted])


def _items_100k(path: Path) -> tuple[list[str], pa.Table]:
    columns = ["item_id", "title", "date", "video_date", "url", *GENRES_100K]
    table = textfile.read_delimited(path, "|", columns, encoding="latin-1", quoted=False)
    flags = [table[genre].to_pylist() for genre in GENRES_100K]
    genres = [
        "|".join(name for name, flag in zip(GENRES_100K, row, strict=True) if flag == "1")
        for row in zip(*flags, strict=True)
    ]
    return table["title"].to_pylist(), pa.table({"item_id": table["item_id"], "genres": genres})


def _movies(path: Path) -> pa.Table:
    columns = ["item_id", "title", "genres"]
    try:
        return textfile.read_delimited(path, "::", columns, quoted=False)  # 10M
    except UserError as error:
        if "not utf-8 text" not in str(error):
            raise
    return textfile.read_delimited(path, "::", columns, encoding="latin-1", quoted=False)  # 1M


def _split_year(title: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?)\s*\((\d{4})\)\s*", title, re.DOTALL)
    return (match[1], match[2]) if match else (title.strip(), "")
