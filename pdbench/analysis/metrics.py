"""A run's records to arrays: the time to first token, between tokens and end to end of every request, as docs/metrics.md defines.

Durations are derived here and nowhere else. NaN in an array is None in the records: not measured.
Try: python -c "from pdbench.records import load_run as l; from pdbench.analysis.metrics import measure as m; print(m(l('single_results')))"
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdbench.records import RequestRecord, Run, Trial

Array = NDArray[np.float64]
PHASES = ("client", "queue", "prefill", "kv_transfer", "decode")
TTFT_PHASES = PHASES[1:]


@dataclass(frozen=True)
class Measured:
    """The measured requests of a run (no warm-up), in the order of sending.

    One entry a request: `trial` (index into `trials`), `ok`, `sent_s`, `end_s`, `ttft_ms`, `e2e_ms`, `mean_tbt_ms`,
    `send_delay_ms`, `prompt_tokens`, `output_tokens`, `first_step_ms` (first to second token). One entry a gap between
    two tokens of a successful request: `tbt_ms`, its request `tbt_owner`, its instant `tbt_s`. `token_s` holds every token's
    arrival, of failed requests too. `phase_ms` has one array of durations a phase. `merged_tokens` came in another's chunk.
    """

    trials: list[Trial]
    requests: list[RequestRecord]
    trial: NDArray[np.int64]
    ok: NDArray[np.bool_]
    sent_s: Array
    end_s: Array
    ttft_ms: Array
    e2e_ms: Array
    mean_tbt_ms: Array
    send_delay_ms: Array
    first_step_ms: Array
    prompt_tokens: Array
    output_tokens: Array
    tbt_ms: Array
    tbt_owner: NDArray[np.int64]
    tbt_s: Array
    token_s: Array
    phase_ms: dict[str, Array]
    merged_tokens: int

    @property
    def window_s(self) -> float:
        """Seconds of all trials' measured windows together."""
        return sum(trial.end_s - trial.start_s for trial in self.trials)


def option(config: Mapping[str, Any], name: str) -> Any:
    """The option `name` of a saved configuration, whether it lies flat or in a section; None when it is not there."""
    if name in config:
        return config[name]
    sections = [value for value in config.values() if isinstance(value, Mapping)]
    return next((section[name] for section in sections if name in section), None)


def measure(run: Run) -> Measured:
    """All of a run's requests as arrays. A failed request keeps its instants, but has no latency and no gaps."""
    requests = sorted((r for r in run.requests if not r.warmup), key=lambda r: _number(r.sent_s, r.planned_s))
    trials = run.trials or _whole_run(requests)
    position = {trial.index: place for place, trial in enumerate(trials)}
    ok = np.array([r.error is None and bool(r.token_s) for r in requests], dtype=bool)
    sent = np.array([_number(r.sent_s) for r in requests], dtype=float)
    end = np.array([_number(r.end_s) for r in requests], dtype=float)
    first = np.array([r.token_s[0] if r.token_s else np.nan for r in requests], dtype=float)
    last = np.array([r.token_s[-1] if r.token_s else np.nan for r in requests], dtype=float)
    second = np.array([r.token_s[1] if len(r.token_s) > 1 else np.nan for r in requests], dtype=float)
    counted = np.array([len(r.token_s) for r in requests], dtype=float)
    owner = np.repeat(np.arange(len(requests)), counted.astype(int))
    tokens = np.concatenate([np.asarray(r.token_s, dtype=float) for r in requests]) if requests else np.array([])
    gap = np.diff(tokens) * 1e3
    inside = (owner[1:] == owner[:-1]) & ok[owner[1:]] if len(tokens) else np.array([], dtype=bool)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_tbt = np.where(counted > 1, (last - first) / (counted - 1) * 1e3, np.nan)
    return Measured(
        trials=trials,
        requests=requests,
        trial=np.array([position.get(r.trial, -1) for r in requests], dtype=np.int64),
        ok=ok,
        sent_s=sent,
        end_s=end,
        ttft_ms=np.where(ok, (first - sent) * 1e3, np.nan),
        e2e_ms=np.where(ok, (end - sent) * 1e3, np.nan),
        mean_tbt_ms=np.where(ok, mean_tbt, np.nan),
        send_delay_ms=(sent - np.array([r.planned_s for r in requests], dtype=float)) * 1e3,
        first_step_ms=np.where(ok, (second - first) * 1e3, np.nan),
        prompt_tokens=np.array([_number(r.prompt_tokens) for r in requests], dtype=float),
        output_tokens=np.array([_number(r.output_tokens, len(r.token_s)) for r in requests], dtype=float),
        tbt_ms=gap[inside],
        tbt_owner=owner[1:][inside] if len(tokens) else np.array([], dtype=np.int64),
        tbt_s=tokens[1:][inside] if len(tokens) else np.array([]),
        token_s=tokens,
        phase_ms={name: np.array([_phase_ms(r, name) for r in requests], dtype=float) for name in PHASES},
        merged_tokens=int(np.count_nonzero(gap[inside] == 0.0)),
    )


def ttft_parts_ms(request: RequestRecord) -> dict[str, float] | None:
    """TTFT taken apart into what the phases cover, in order and without overlap; `other` is what nobody measured.

    A part ends where a later phase begins (prefill's reply comes after its KV cache has left), decode's at the first token.
    None for a failed request and where no phase was measured.
    """
    if request.error is not None or not request.token_s or request.sent_s is None:
        return None
    known = [(name, span) for name in TTFT_PHASES if (span := request.phases.get(name)) is not None]
    if not known:
        return None
    parts, reached, first = {}, request.sent_s, request.token_s[0]
    for place, (name, (start, end)) in enumerate(known):
        later = [span[0] for _, span in known[place + 1 :] if span[0] >= start]
        begin, stop = max(start, reached), min(end, first, *later)
        parts[name] = max(stop - begin, 0.0) * 1e3
        reached = max(reached, stop)
    return parts | {"other": max((first - request.sent_s) * 1e3 - sum(parts.values()), 0.0)}


def _phase_ms(request: RequestRecord, name: str) -> float:
    span = request.phases.get(name) if request.error is None else None
    return np.nan if span is None else (span[1] - span[0]) * 1e3


def _number(value: float | None, otherwise: float = np.nan) -> float:
    return otherwise if value is None else float(value)


def _whole_run(requests: list[RequestRecord]) -> list[Trial]:
    """A run saved without trials is one trial from its first request to its last end."""
    starts = [r.sent_s for r in requests if r.sent_s is not None]
    ends = [r.end_s for r in requests if r.end_s is not None]
    return [Trial(index=0, start_s=min(starts), end_s=max(ends))] if starts and ends else []
