"""What a viewer knows: messages go in, every second adds a point to each curve. Figures are those of analysis.metrics, over the
last ten seconds; joules per token are an estimate, from power in place of energy counters."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from pdbench import failures
from pdbench.analysis.curves import SERVER_FIELDS
from pdbench.analysis.metrics import Timings, per, spread, timings_of_requests
from pdbench.analysis.power_curve import HOLE_S
from pdbench.live.publisher import Buckets, Devices, End, Flags, Message, ServerReading, Stage, TimeLeft, Turn
from pdbench.load.generator import Progress
from pdbench.records import DeviceRecord, DeviceSample, Flag, RequestRecord
from pdbench.report.tables import LATENCIES

WINDOW_S, MOST_REQUESTS = 10.0, 1000
"""Figures are of so many seconds, latencies of so many requests at most: more would cost the servers CPU time and add little."""
MOST_POINTS = 1200
"""Of a curve: beyond it every second one goes."""
STALE_S = 3.0
"""What was not heard of for so long is not drawn; of a device that is sampled more rarely, after 1.5 of its intervals."""
FIRST_STEP_S = 15.0
"""Between a device's first two samples: --sample-interval-s is 10 at most. Later ones tell what is usual."""
DEVICE_FIELDS = {
    "power_w": "Power of each device",
    "gpu_utilization_pct": "Utilisation",
    "cpu_utilization_pct": "CPU use of each role's processes",
    "sm_clock_mhz": "Clocks",
    "cpu_clock_mhz": "CPU clock",
    "temperature_c": "Temperature",
}
"""What is drawn of devices, with its panel's title."""


@dataclass
class Line:
    """A curve that grows; `x` is seconds since the start, NaN in `y` breaks it."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def add(self, x: float, y: float) -> bool:
        """One more point; True when what was there before has changed too."""
        broken = bool(self.x) and x - self.x[-1] > STALE_S
        if broken:
            self.x.append(x)
            self.y.append(nan)
        self.x.append(x)
        self.y.append(y)
        thinned = len(self.x) > MOST_POINTS
        if thinned:
            kept = [place for place, value in enumerate(self.y) if place % 2 == 0 or value != value]
            self.x, self.y = [self.x[place] for place in kept], [self.y[place] for place in kept]
        return broken or thinned


class Instance:
    """A server's readings of the last seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._readings: deque[tuple[float, ServerReading]] = deque()

    def take(self, reading: ServerReading, now_s: float) -> None:
        self._readings.append((now_s, reading))

    def values(self, now_s: float) -> dict[tuple[str, str], float]:
        """(figure, of what) -> value: now, or over the window; nothing once no reading came for STALE_S."""
        while len(self._readings) > 2 and self._readings[0][0] < now_s - WINDOW_S:
            self._readings.popleft()
        if not self._readings or now_s - self._readings[-1][0] > STALE_S:
            return {}
        (first_s, first), (last_s, last) = self._readings[0], self._readings[-1]
        values = {
            (key, self.name): last.figures[key] * factor for key, factor in SERVER_FIELDS.items() if key in last.figures
        }
        new_tokens = last.figures.get("output_tokens", -1.0) - first.figures.get("output_tokens", 0.0)
        if last_s > first_s and new_tokens >= 0:
            values["output_tokens_per_s", self.name] = new_tokens / (last_s - first_s)
        for key, counts in last.histograms.items():
            before = first.histograms.get(key, {})
            recent = {upper: count - before.get(upper, 0.0) for upper, count in counts.items()}
            if before and min(recent.values()) >= 0:  # else it was started again
                for name, share in (("p50", 0.5), ("p99", 0.99)):
                    if (seconds := quantile(recent, share)) is not None:
                        values[key, f"{self.name} {name}"] = 1e3 * seconds
        return values


def quantile(counts: Buckets, share: float) -> float | None:
    """A quantile in seconds, linear inside its bucket as Prometheus' histogram_quantile; None without values."""
    total, below, lower = counts.get(inf, 0.0), 0.0, 0.0
    if not total > 0:
        return None
    for upper, at_or_below in sorted(counts.items()):
        if at_or_below >= share * total:
            if upper == inf or at_or_below == below:
                return lower
            return lower + (upper - lower) * (share * total - below) / (at_or_below - below)
        below, lower = at_or_below, upper
    return lower


class State:
    """`lines` and the `latest` figures are by (figure, of what); `version` grows when more than new points has changed in `lines`.

    `failed` and `tokens` are by deployment, since the start; `failed_now` is of the trial.
    """

    def __init__(self, now_s: float | None = None) -> None:
        self.began_s = time.monotonic() if now_s is None else now_s
        self.now_s = self.began_s
        self.lines: dict[tuple[str, str], Line] = {}
        self.version = 0
        self.log: list[tuple[float, Stage]] = []
        self.flags: dict[tuple[str, Flag], None] = {}
        self.turn: Turn | None = None
        self.progress: Progress | None = None
        self.left: tuple[float, float] | None = None
        self.failed: dict[str, Counter[str]] = {}
        self.failed_now = 0
        self.tokens = Counter[str]()
        self.devices: dict[str, DeviceRecord] = {}
        self.instances: dict[str, Instance] = {}
        self.end: End | None = None
        self.lost = False
        self.latest: dict[tuple[str, str], float] = {}
        self.new_requests: dict[str, list[RequestRecord]] = {}
        self._recent: deque[tuple[float, RequestRecord]] = deque(maxlen=MOST_REQUESTS)
        self._tokens: deque[tuple[float, int]] = deque()
        self._power: deque[tuple[float, float | None]] = deque()
        self._seen: dict[str, tuple[float, DeviceSample]] = {}
        self._stale_s: dict[str, float] = {}
        self._step_s: dict[str, float] = {}
        self.energy_j: dict[str, float] = {}

    @property
    def deployment(self) -> str:
        return self.turn.deployment if self.turn else ""

    def take(self, message: Message, now_s: float) -> None:
        self.now_s, self.began_s = now_s, min(self.began_s, now_s)  # the viewer starts later than its measurement
        if isinstance(message, Stage):
            self.log.append((now_s, message))
        elif isinstance(message, Turn):
            self.turn, self.progress, self.failed_now = message, None, 0
            for of_earlier in (self._recent, self._tokens, self._power):
                of_earlier.clear()
            self._seen.clear()
        elif isinstance(message, TimeLeft):
            self.left = now_s, message.seconds
        elif isinstance(message, Progress):
            self.tokens[self.deployment] += max(0, message.tokens - (self.progress.tokens if self.progress else 0))
            self.progress = message
            self._tokens.append((now_s, message.tokens))
            self._recent += [(now_s, request) for request in message.ended]
            self.new_requests.setdefault(self.deployment, []).extend(message.ended)
            for request in message.ended:
                if kind := failures.kind_of(request):
                    self.failed_now += 1
                    self.failed.setdefault(self.deployment, Counter())[kind] += 1
        elif isinstance(message, Flags):
            self.flags |= dict.fromkeys((message.deployment, flag) for flag in message.flags)
        elif isinstance(message, Devices):
            for device in message.devices:
                key = f"{device.role or ''} {device.label}".strip()  # a GPU has a role in each deployment
                before_s, before = self._seen.get(key, (now_s, None))
                if before is None or device.samples[-1].t_s > before.t_s:  # a lost one repeats its last sample
                    self._add_joules(key, before, device)
                    self.devices[key], self._seen[key] = device, (now_s, device.samples[-1])
                    self._stale_s[key] = max(STALE_S, 1.5 * (now_s - before_s))
            self._power.append((now_s, self._power_w()))
        elif isinstance(message, ServerReading):
            self.instances.setdefault(message.server, Instance(message.server)).take(message, now_s)
        else:
            self.end = message

    def timings(self, requests: list[RequestRecord]) -> Timings:
        """Their figures, as a saved run's are derived."""
        assert self.turn
        return timings_of_requests(requests, self.turn.load)

    def tick(self, now_s: float) -> list[tuple[str, str]]:
        """One more point for whatever is known now; returns the lines that grew."""
        self.now_s, self.latest = now_s, {}
        if self.turn and self._tokens and now_s - self._tokens[-1][0] <= STALE_S:
            self._add_load(self.deployment)
        for instance in self.instances.values():
            values = instance.values(now_s)
            # A measurement's own figures are better than those of histograms.
            self.latest |= {key: value for key, value in values.items() if not self.turn or key[0] in SERVER_FIELDS}
        self._add_energy()
        for of, device in self.devices.items():
            if self._is_heard(of):
                sample = device.samples[-1]
                for name in DEVICE_FIELDS:
                    value = getattr(sample, name)
                    if value is None and name == "power_w":
                        value = sample.power_average_w
                    if value is not None:
                        self.latest[name, of] = value
        for key, value in self.latest.items():
            if key not in self.lines:
                self.lines[key] = Line()
                self.version += 1
            if self.lines[key].add(round(now_s - self.began_s, 2), value):
                self.version += 1
        return [*self.latest]

    def _add_load(self, name: str) -> None:
        """The figures of the load in its last seconds, of requests that ended in them."""
        for recent in (self._recent, self._tokens):
            _forget(recent, self.now_s)
        assert self.progress
        self.latest["in_flight", name] = self.progress.in_flight
        for key, latency in self.timings([request for _, request in self._recent]).latencies.items():
            if f"{key}_ms" in LATENCIES and (known := spread(latency.rising)):
                self.latest[f"{key}_ms", f"{name} p50"] = known.p50
                self.latest[f"{key}_ms", f"{name} p99"] = known.p99
        (first_s, first), (last_s, last) = self._tokens[0], self._tokens[-1]
        if last_s > first_s:
            self.latest["output_tokens_per_s", name] = (last - first) / (last_s - first_s)

    def _add_energy(self) -> None:
        """Power over tokens of the same last seconds: of the load or, where others send it, of all servers together."""
        _forget(self._power, self.now_s)
        since_s = self._tokens[0][0] if self.turn and self._tokens else -inf
        powers = [power_w for at_s, power_w in self._power if power_w is not None and at_s >= since_s]
        rates = [value for (figure, _), value in self.latest.items() if figure == "output_tokens_per_s"]
        joules = per(sum(powers) / len(powers), sum(rates)) if powers and rates else None
        if joules is not None:
            self.latest["j_per_output_token", self.deployment or "all servers"] = joules

    def _is_heard(self, key: str) -> bool:
        return key in self._seen and self.now_s - self._seen[key][0] <= self._stale_s[key]

    def _add_joules(self, key: str, first: DeviceSample | None, device: DeviceRecord) -> None:
        """Of a device between two samples of a turn: what its counter got where each sample has it (RAPL), else power over the time, but for
        holes, as `analysis.power_curve` has them: nobody knows what it drew there."""
        if first is None:
            return
        last = device.samples[-1]
        first_w, last_w = _mean_w(first), _mean_w(last)
        step_s, joules = last.t_s - first.t_s, None
        usual_s = self._step_s.get(key, FIRST_STEP_S / 3)
        self._step_s[key] = min(step_s, self._step_s.get(key, inf))
        if device.kind != "gpu" and first.energy_j is not None and last.energy_j is not None:
            joules = last.energy_j - first.energy_j if last.energy_j >= first.energy_j else None
        elif first_w is not None and last_w is not None and step_s <= max(HOLE_S, 3 * usual_s):
            joules = step_s * (first_w + last_w) / 2
        if joules is not None:
            self.energy_j[key] = self.energy_j.get(key, 0.0) + joules

    def _power_w(self) -> float | None:
        """What the GPUs draw together or, without any, CPU packages and DRAM; as a run's energy counts them."""
        by_kind: dict[str, list[float | None]] = {}
        for key, device in self.devices.items():
            if self._is_heard(key):
                by_kind.setdefault(device.kind, []).append(_mean_w(device.samples[-1]))
        powers = by_kind.get("gpu") or [*by_kind.get("cpu", []), *by_kind.get("dram", [])]
        return sum(powers) if powers and None not in powers else None  # type: ignore[arg-type]


def _mean_w(sample: DeviceSample) -> float | None:
    """The device's own mean over a second, where it gives one: instants may all meet one phase of a load's steps."""
    return sample.power_w if sample.power_average_w is None else sample.power_average_w


def _forget(recent: deque[Any], now_s: float) -> None:
    """Keep what is of the last seconds."""
    while recent and recent[0][0] < now_s - WINDOW_S:
        recent.popleft()
