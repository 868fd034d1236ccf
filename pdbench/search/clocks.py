"""The clocks and power caps of least cost: a coordinate search that measures few of the combinations.

Slower GPUs answer no sooner: what is slower everywhere than a setting that missed the SLO has missed it too, and is not measured.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from math import inf, isfinite

Setting = dict[str, int | None]


def axes(values: Mapping[str, Sequence[int | None]], usual: Setting) -> dict[str, list[int | None]]:
    """The values of each option from slowest to fastest, with the `usual` one; None, no lock and no cap, is the fastest."""
    return {
        key: sorted({*found, usual[key]}, key=lambda value: inf if value is None else value)
        for key, found in values.items()
    }


def cheapest(axes: Mapping[str, Sequence[int | None]], cost: Callable[[Setting], float | None]) -> list[Setting]:
    """Every measured setting that keeps the SLO, cheapest first; `axes` go from slowest to fastest.

    `cost(setting)` is infinite where the SLO is missed, NaN where that is not known, None once the time is up. The search starts where everything is fastest, and goes on
    as long as one option, or one a step up and another a step down, makes it cheaper: with long steps, which noise does not stop, then with short ones.
    """
    known: dict[tuple[int, ...], float] = {}
    longest = max(map(len, axes.values()))

    def setting(place: tuple[int, ...]) -> Setting:
        return {key: values[at] for (key, values), at in zip(axes.items(), place, strict=True)}

    def costs(place: tuple[int, ...]) -> float | None:
        if not all(0 <= at < len(values) for at, values in zip(place, axes.values(), strict=True)):
            return inf
        if place not in known:
            missed = (faster for faster, joules in known.items() if joules == inf)
            if any(all(a <= b for a, b in zip(place, faster, strict=True)) for faster in missed):
                return inf
            joules = cost(setting(place))
            if joules is None:
                return None
            known[place] = joules
        return known[place]

    best = tuple(len(values) - 1 for values in axes.values())
    least = costs(best)
    stride = 1
    while stride * 3 <= longest:
        stride *= 2
    while stride and least not in (None, inf):
        moves = [{key: sign * stride} for sign in (-1, 1) for key in axes]
        moves += [{up: stride, down: -stride} for up, down in permutations(axes, 2)]
        moved = False
        for move in moves:
            while True:
                place = tuple(at + move.get(key, 0) for key, at in zip(axes, best, strict=True))
                joules = costs(place)
                if joules is None or least is None or not joules < least:
                    break
                best, least, moved = place, joules, True
            if joules is None:
                return _kept(known, setting)
        stride = stride if moved else stride // 2
    return _kept(known, setting)


def _kept(known: Mapping[tuple[int, ...], float], setting: Callable[[tuple[int, ...]], Setting]) -> list[Setting]:
    kept = [place for place, joules in known.items() if isfinite(joules)]
    return [setting(place) for place in sorted(kept, key=lambda place: known[place])]
