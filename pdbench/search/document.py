"""The answer of a search as search.json holds it: its loads, what each deployment carries, the cheapest clocks. None: not known."""

from typing import Any

import msgspec

from pdbench.search.clocks import Setting

FILE = "search.json"
_LAST_BITS = 1e-9
"""100 * 0.55 is more than 55: no load misses by this."""


def keeps(attained_pct: float, attain_pct: float) -> bool:
    """Is the share of requests within the SLO as large as it must be? It is not rounded: 94.96 % is not 95 %."""
    return attained_pct >= attain_pct - _LAST_BITS


class Point(msgspec.Struct, kw_only=True):
    """One load: `run` is its results folder below the search's. `rate_per_s` None: one request at a time. `slo_used`: 1 where the share
    that must be within the SLO just was. `kept` (with a `setting` that is compared): was the SLO kept, and nothing in `refused` flagged?
    `void`: why the load does not count: its answers were wrong, or a server died. `undecided_pct` of its requests may be within the SLO or not,
    and count as missed. `flags`: the names of all that its run has."""

    deployment: str
    run: str
    rate_per_s: float | None
    requests: int
    attained_pct: float
    undecided_pct: float | None = None
    slo_used: float | None
    held: bool | None
    limited_by: str | None
    client_limited: bool
    load_s: float
    void: str | None = None
    setting: Setting | None = None
    kept: bool | None = None
    refused: list[str] = []
    flags: list[str] = []
    goodput_per_s: float | None = None
    j_per_good_request: float | None = None

    @property
    def counts(self) -> bool:
        """Does it say something of the servers: not where it is void or the client stood still, nor where it lagged behind and the SLO was not missed."""
        stood_still = not {"client-stalled", "host-slept"}.isdisjoint(self.flags)
        return not (self.void or stood_still or (self.client_limited and self.held is not False))


class Scaled(msgspec.Struct, kw_only=True):
    """The highest rate for the SLO with all its limits times `scale`."""

    scale: float
    rate_per_s: float
    low: float
    high: float
    goodput_per_s: float | None = None
    goodput_per_s_per_gpu: float | None = None
    j_per_good_request: float | None = None


class Choice(msgspec.Struct, kw_only=True):
    """What a load at a setting of clocks and caps came to, as its `Point` says. `setting` None: none keeps the SLO."""

    setting: Setting | None = None
    kept: bool | None = None
    attained_pct: float | None = None
    j_per_good_request: float | None = None
    run: str | None = None
    limited_by: str | None = None

    def take(self, point: Point) -> None:
        for name in Choice.__struct_fields__:
            setattr(self, name, getattr(point, name))


class Tuned(Choice, kw_only=True):
    """The cheapest setting at `rate_per_s`, of loads with `requests` each; `before`: the usual one, with the arrivals of its last load."""

    rate_per_s: float
    requests: int
    before: Choice | None = None
    loads: int = 0
    load_s: float = 0.0


class Closest(msgspec.Struct, kw_only=True):
    """The load with the largest share within the SLO, where no rate is held."""

    rate_per_s: float | None
    attained_pct: float
    run: str


class Held(msgspec.Struct, kw_only=True):
    """What one deployment holds: the highest rate with its 95 % interval (`low` None: not searched; `high` None: no end is known), what
    breaks beyond it, and the figures of the confirming `run` there. `none_holds`: loads at rates as low as makes no difference missed it. `layout`: 2P2D, of prefill and decode instances. `loads`, `load_s`
    and `requests` are what it took to find."""

    name: str
    layout: str | None = None
    rate_per_s: float | None = None
    low: float | None = None
    high: float | None = None
    attained_pct: float | None = None
    run: str | None = None
    gpus: int | None = None
    rate_per_s_per_gpu: float | None = None
    goodput_per_s: float | None = None
    goodput_per_s_per_gpu: float | None = None
    j_per_good_request: float | None = None
    goodput_per_w: float | None = None
    limited_by: str | None = None
    client_limited: bool = False
    loads: int = 0
    load_s: float = 0.0
    requests: int = 0
    closest: Closest | None = None
    none_holds: bool = False
    slo_scale: list[Scaled] = []
    tuned: Tuned | None = None


class Document(msgspec.Struct, kw_only=True):
    """`slo`: option -> limit in ms. `command`: what must be alike for a search to go on."""

    command: dict[str, Any]
    slo: dict[str, float]
    attain_pct: float
    sentence: str = ""
    deployments: list[Held] = []
    points: list[Point] = []

    def searched(self) -> list[Held]:
        return [entry for entry in self.deployments if entry.low is not None]

    def tuned(self) -> list[tuple[str, Tuned]]:
        return [(entry.name, entry.tuned) for entry in self.deployments if entry.tuned]

    def loads(self, name: str, *, clocks: bool = False) -> list[tuple[float, Point]]:
        """(rate, load) of a deployment that count, by rate: those at rates, or at one rate with other clocks."""
        found = [
            (point.rate_per_s, point)
            for point in self.points
            if point.deployment == name
            and point.rate_per_s
            and bool(point.setting) == clocks
            and (not point.void if clocks else point.counts)
        ]
        return sorted(found, key=lambda each: each[0])
