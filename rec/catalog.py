"""The items of a prepared folder as a person names them: by id, or by words of their text."""

import csv
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from rec.data.prepared import Prepared
from rec.runtime.errors import UserError

NEAR = 3
"""How many near ids or titles an error names."""
SHOWN = 60


@dataclass(frozen=True)
class Found:
    """What a search took.

    Attributes:
        query: the words searched for.
        number: the item that was taken.
        others: items that match just as well, the more popular first.
    """

    query: str
    number: int
    others: list[int]


class Catalog:
    """Item numbers by id and by text.

    Attributes:
        ids: [N] raw ids; item number i is at i - 1.
        title_column: the text column that names an item; None where items have no text.
    """

    def __init__(self, data: Prepared) -> None:
        self.data = data
        self.ids: list[str] = data.items["item_id"].to_pylist()
        self._number = {item: number for number, item in enumerate(self.ids, start=1)}
        columns = [name for name in data.items.column_names if name != "item_id"]
        exact = [name for name in ("title", "name") if name in columns]
        named = [name for word in ("title", "name") for name in columns if word in name]
        self.title_column: str | None = next(iter([*exact, *named, *columns]), None)

    @cached_property
    def titles(self) -> list[str]:
        """[N] what items are called, "" where that is unknown."""
        return self._column(self.title_column) if self.title_column else [""] * len(self.ids)

    @property
    def has_text(self) -> bool:
        """Whether any item has a title."""
        return any(self.titles)

    def title(self, number: int) -> str:
        """What item ``number`` is called, "" where that is unknown."""
        return self.titles[number - 1]

    def find(self, item: str) -> int | None:
        """The number of an id; white space around it does not count, unless the catalog's id has it too."""
        return self._number.get(item, self._number.get(item.strip()))

    def numbers(self, items: Iterable[str]) -> list[int]:
        """Numbers of raw ids.

        Raises:
            UserError: at the first unknown id, with the nearest known ones.
        """
        found = []
        for item in items:
            number = self.find(item)
            if number is None:
                raise UserError(f"unknown item {item[:SHOWN]!r}; {self._hint(item)}")
            found.append(number)
        return found

    def search(self, query: str) -> Found:
        """The item whose text fits ``query`` best, upper and lower case being alike.

        A title goes before any other text; then a text that equals the query before one that begins with it, that
        has it as whole words, that has it as part of words, that has all its words anywhere; then the item with more
        training interactions.

        Raises:
            UserError: if items have no text, or none fits; then with the nearest titles.
        """
        if not self.has_text:
            raise UserError(f"the items of {self.data.folder} have no text to search; name them by id with --history")
        words = _folded(query)
        popularity = self.data.train_counts
        ranked = sorted((*fit, -int(popularity[number]), number) for number, fit in self._fits(words).items())
        if not ranked:
            titles = {_folded(title): title for title in reversed(self.titles) if title}
            near = [titles[title] for title in difflib.get_close_matches(words, titles, NEAR, 0.5)]
            hint = f"nearest titles: {_quoted(near)}" if near else "try fewer words"
            raise UserError(f"no item's text contains {query[:SHOWN]!r}; {hint}")
        best = ranked[0]
        return Found(query, best[-1], [row[-1] for row in ranked[1:] if row[:2] == best[:2]])

    def _fits(self, words: str) -> dict[int, tuple[int, int]]:
        """(is not the title, kind of match) of every item that fits."""
        whole = re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")
        every = words.split()
        found: dict[int, tuple[int, int]] = {}
        for column in self.data.items.column_names:
            for number, text in enumerate(self._column(column) if column != "item_id" else [], start=1):
                folded = _folded(text)
                if not all(word in folded for word in every):
                    continue
                fit = (int(column != self.title_column), _kind(folded, words, whole))
                found[number] = min(fit, found.get(number, fit))
        return found

    def _hint(self, item: str) -> str:
        folded = item.strip().casefold()
        near = [known for known in self.ids if known.casefold() == folded]
        near = near or difflib.get_close_matches(item.strip(), self.ids, NEAR, 0.75)
        if near:
            return f"did you mean {_quoted(near[:NEAR])}?"
        example = f"ids look like {self.ids[0]!r}"
        if folded and any(folded in title.casefold() for title in self.titles):
            return f"{example}; to name items by title use --titles"
        return example

    def _column(self, name: str) -> list[str]:
        return [value or "" for value in self.data.items[name].to_pylist()]


def split_ids(text: str) -> list[str]:
    """Ids separated by commas; one that holds a comma stands in double quotes.

    Raises:
        UserError: if there is none, it is a list as programs print it, or its quotes do not close.
    """
    if text.lstrip().startswith("["):
        raise UserError(f"{text[:SHOWN]!r} is a list: write id1,id2 here; lists belong into jsonl or parquet")
    try:
        row = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        reason = "a double quote is left open" if "end of data" in str(error) else str(error)
        raise UserError(f"{text[:SHOWN]!r} cannot be split into ids: {reason}") from None
    return require_history([item for item in row if item.strip()])


def require_history(history: Sequence[str]) -> list[str]:
    """``history`` itself; raises UserError if it is empty."""
    if not history:
        raise UserError("the history is empty: it needs at least one item")
    return list(history)


def _kind(text: str, words: str, whole: re.Pattern[str]) -> int:
    if text == words:
        return 0
    found = whole.search(text)
    if found:
        return 1 if whole.match(text) else 2
    return 3 if words in text else 4


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _quoted(values: Sequence[str]) -> str:
    return ", ".join(repr(value[:SHOWN]) for value in values)
