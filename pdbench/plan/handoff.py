"""What lies between client, prefill and decode: the proxy, the handoff of KV caches, whose token opens a stream."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pdbench.analysis.arrivals import Array
from pdbench.plan import fit
from pdbench.plan.engine import Engine, Role
from pdbench.plan.parts import Part


def between(by_role: Mapping[Role, list[Part]], decode: Engine | None) -> dict[str, Any]:
    """Fields of `Calibration`. The handoff is measured in steps of `decode`, which takes a request in, asks for its KV cache, hears that it
    came and schedules it in one step after the other: what takes so many steps does so at any load."""
    facts: dict[str, Any] = {"proxy_s": proxy_s(by_role.get("prefill") or by_role.get("replica") or [])}
    parts = by_role.get("decode", [])
    if not parts or decode is None:
        return facts
    rates = [
        (span[1] - span[0]) / request.prompt_tokens
        for part in parts
        for request in part.requests.values()
        if (span := request.phases.get("kv_transfer")) and request.prompt_tokens
    ]
    per_token_s = float(np.median(rates)) if rates else 0.0
    series = [steps for part in parts if len(steps := _in_steps(part, decode, per_token_s))]
    opened = [
        part.ways[stream.id].first_token_s is not None
        for part in parts
        for stream in part.streams
        if len(part.requests[stream.id].token_s) > 1
    ]
    facts |= {"prefill_opens": float(np.mean(opened or [True])), "first_token": "prefill" if any(opened) else "decode"}
    if series:
        usual = float(np.median(np.concatenate(series)))
        facts |= {"handoff_steps": usual, "handoff_per_token_s": per_token_s}
        facts |= {"handoff_noise": [tuple((steps / usual).tolist()) for steps in series]}
    return facts


def _in_steps(part: Part, decode: Engine, per_token_s: float) -> Array:
    """How many decode steps, as long as they were when prefill had answered, each handoff took; in order of these answers."""
    assert part.steps is not None
    came_s = {
        name: float(way.first_token_s or way.prefill_done_s or np.nan)
        for name, way in part.ways.items()
        if name in part.requests and not part.requests[name].warmup
    }
    rows = []
    for name, (earliest_s, latest_s) in fit.schedulable(part.steps, came_s, decode.limits).items():
        running = min(int(np.searchsorted(part.steps.handed_s, came_s[name])), part.steps.first_step[name] - 1)
        step_s = decode.step_s(int(part.steps.sequences[running]), int(part.steps.context[running]))
        waited_s = (earliest_s + latest_s) / 2 - per_token_s * (part.requests[name].prompt_tokens or 0)
        rows.append((came_s[name], waited_s / step_s))
    return np.array([steps for _, steps in sorted(rows) if steps > 0])


def proxy_s(parts: list[Part]) -> float:
    """The client's and the proxy's share of the way in."""
    took = [
        (way.prefill_sent_s or way.decode_sent_s or np.nan) - (request.sent_s or np.nan)
        for part in parts
        for name, request in part.requests.items()
        if (way := part.ways.get(name))
    ]
    return float(np.nanmedian(took)) if took else 0.0
