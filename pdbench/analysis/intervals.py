"""Windows of time as pairs of instants: how long they are, what several cover, share or leave over."""

from collections.abc import Sequence

import numpy as np

from pdbench.records import Interval


def length_s(windows: Sequence[Interval]) -> float:
    """Seconds of windows that do not overlap."""
    return sum((end - start for start, end in windows), 0.0)


def union(windows: Sequence[Interval], depth: int = 1) -> list[Interval]:
    """The instants that at least `depth` windows cover, as sorted windows that do not overlap; empty and reversed ones cover none."""
    edges = np.array([(start, end) for start, end in windows if end > start], dtype=float).reshape(-1, 2).T
    order = np.argsort(edges, axis=None, kind="stable")  # of one instant, the starts come first
    at, step = edges.ravel()[order], np.where(order < edges.shape[1], 1, -1)
    cover = np.cumsum(step)
    bounds = zip(
        at[(step > 0) & (cover == depth)].tolist(), at[(step < 0) & (cover == depth - 1)].tolist(), strict=True
    )
    return [(start, end) for start, end in bounds if end > start]


def intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants that lie in both."""
    return union([*union(first), *union(second)], depth=2)


def difference(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """The instants of `first` that do not lie in `second`."""
    taken = union(second)
    ends, starts = [-np.inf, *(end for _, end in taken)], [*(start for start, _ in taken), np.inf]
    return intersection(first, list(zip(ends, starts, strict=True)))
