"""Approximate search: an HNSW index over item vectors, and what it costs against exact search.

HNSW (Malkov & Yashunin 2016) walks a graph of near neighbours instead of comparing with every item. Largest inner
product is what recommenders score by; it is no distance, so how much is found must be measured, not assumed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rec.runtime.packages import quiet, require_packages

LINKS, BUILD_WIDTH = 32, 200
"""Links an item (M) and candidates while building (efConstruction)."""
SEARCH_WIDTHS = (16, 64, 256, 1024)
"""Candidates while searching (efSearch): the smallest that finds enough is kept in the index."""
ENOUGH = 0.99
LEAST_S = 0.2
SCORED_CELLS, MIN_QUERIES = 2**26, 16
"""Scores in memory at a time while measuring, 256 MiB: of a large catalog fewer queries are tried."""


@dataclass(frozen=True)
class SearchCost:
    """One way to search.

    Attributes:
        name: ``exact``, or ``hnsw`` with its efSearch.
        recall: share of the exact ten best that it finds.
        queries_per_s: all queries in one call.
        one_query_ms: a query alone.
    """

    name: str
    recall: float
    queries_per_s: float
    one_query_ms: float


def check_packages() -> None:
    """Raise a UserError if faiss is missing."""
    require_packages("an index for approximate search", {"faiss": "faiss-cpu"})


def write_index(vectors: Tensor, queries: Tensor, path: Path, k: int = 10) -> tuple[int, list[SearchCost]]:
    """Build an index over the item vectors [N, D], measure it with the states [Q, D], and write it.

    Args:
        vectors: row i is item number i + 1, and the index answers with i.
        queries: real states.
        path: a faiss file, for ``faiss.read_index``.
        k: items that are searched for, at most N.

    Returns:
        The efSearch that the written index has, and the cost of exact search and of every efSearch tried.
    """
    with quiet():
        import faiss

    vectors, queries, k = vectors.contiguous(), queries.contiguous(), min(k, len(vectors))
    index = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = BUILD_WIDTH
    index.add(vectors.numpy())
    queries = queries[: max(MIN_QUERIES, SCORED_CELLS // len(vectors))]
    exact = (queries @ vectors.T).topk(k).indices
    costs = [SearchCost("exact", 1.0, *_speed(lambda some: (some @ vectors.T).topk(k), queries))]
    for width in SEARCH_WIDTHS:
        index.hnsw.efSearch = width
        found = torch.from_numpy(index.search(queries.numpy(), k)[1])
        recall = float((found[:, :, None] == exact[:, None]).any(1).float().mean())
        speed = _speed(lambda some: index.search(some.numpy(), k), queries)
        costs.append(SearchCost(f"hnsw, efSearch {width}", recall, *speed))
        if recall >= ENOUGH:
            break
    faiss.write_index(index, str(path))
    return index.hnsw.efSearch, costs


def _speed(search: Callable[[Tensor], object], queries: Tensor) -> tuple[float, float]:
    """Queries a second in one call, and milliseconds of a query alone."""
    search(queries)
    together = _seconds([queries], search) / len(queries)
    alone = _seconds(list(queries.split(1)), search)
    return 1 / together, 1000 * alone


def _seconds(calls: list[Tensor], search: Callable[[Tensor], object]) -> float:
    """Mean of one call, over at least ``LEAST_S``."""
    done, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < LEAST_S:
        search(calls[done % len(calls)])
        done += 1
    return passed / done
