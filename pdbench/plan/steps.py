"""The instances of a run's trials: what each was sent, when it answered, and its steps, rebuilt from the instants at which tokens arrived.

Every running stream gets one token per step, so a stream's tokens are consecutive steps and only its first step is unknown: the one at
which its arrivals fit those of the streams before it. No log of the scheduler is needed.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np

from pdbench.analysis.arrivals import Array, BoolArray, IntArray
from pdbench.errors import UserError
from pdbench.events import PromptEvent, ProxyEvent, ways_of
from pdbench.plan.engine import Role
from pdbench.plan.limits import gpus_each
from pdbench.records import DeviceRecord, RequestRecord, Run

_WINDOW = 4
"""Steps around a stream's first arrival among which its first step is sought."""
SAME_STEP_S = 0.0015
"""Prompts that are answered within this time of each other were in one step."""
LEAST_REQUESTS, MOST_FAILED = 30, 0.1
"""A trial with fewer answered requests, or a larger share of failed ones, calibrates nothing."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Consecutive steps of one instance. One entry per step: `handed_s` (its first token's arrival), `sequences` (tokens),
    `context` (their prompts and earlier tokens, summed), `firsts` (streams that begin), `prompt` (those streams' computed prompt tokens) and
    `longest` (of one of them).

    `first_step` maps a request's id to the step of its first token here. `since` counts from 0 where a segment begins: before it the engine may
    have rested.
    """

    handed_s: Array
    sequences: IntArray
    context: IntArray
    firsts: IntArray
    prompt: IntArray
    longest: IntArray
    since: IntArray
    first_step: dict[str, int]


@dataclass(frozen=True)
class Stream:
    """One request at one instance: its tokens' arrivals, and the prompt tokens that it brings (`computed` of them in its first step)."""

    id: str
    token_s: Sequence[float]
    prompt_tokens: int
    computed: int


@dataclass(frozen=True)
class Visits:
    """Prompts at an instance that only prefills, in order of `sent_s` (by the proxy), taken by its engine at `taken_s` (NaN: it did not say)
    and answered at `done_s`."""

    sent_s: Array
    taken_s: Array
    done_s: Array
    prompt: IntArray

    def ways_in(self) -> tuple[IntArray, Array]:
        """(tokens, seconds) from the proxy's sending until the engine took a prompt. An engine that is busy takes none before its step ends, so only
        prompts that met an idle one tell."""
        tell = self.idle() & ~np.isnan(self.taken_s)
        return self.prompt[tell], (self.taken_s - self.sent_s)[tell]

    def idle(self) -> BoolArray:
        """Was nobody else there when it was sent?"""
        return np.append(-np.inf, np.maximum.accumulate(self.done_s)[:-1]) < self.sent_s

    def alone(self) -> BoolArray:
        """Was no other prompt there meanwhile?"""
        return self.idle() & (self.done_s < np.append(self.sent_s[1:], np.inf))

    def steps(self) -> tuple[IntArray, Array, Array]:
        """Prompts that were answered at one time were in one step: of each step their tokens, when the last of them was sent, and when they were answered."""
        order = np.argsort(self.done_s)
        done_s = self.done_s[order]
        begins = np.append(True, np.diff(done_s) > SAME_STEP_S)
        step = np.cumsum(begins) - 1
        sent_s = np.maximum.reduceat(self.sent_s[order], np.flatnonzero(begins))
        return np.bincount(step, self.prompt[order]).astype(int), sent_s, done_s[begins]

    def launches(self, lag: int) -> tuple[IntArray, Array]:
        """Of steps whose prompts were there before they could be scheduled: tokens, and from then until the next step could be (`Limits.lag`)."""
        tokens, sent_s, done_s = self.steps()
        scheduled_s, next_s = done_s[:-lag], done_s[1 : len(done_s) - lag + 1]
        waited = sent_s[lag:] < scheduled_s
        return tokens[lag:][waited], (next_s - scheduled_s)[waited]


@dataclass
class Part:
    """One instance during one trial. `index` is the trial's place in its run, `trial` counts over all runs. One that only prefills has
    `visits`, the others `steps`."""

    run: Run
    index: int
    role: Role
    trial: int
    streams: list[Stream]
    requests: dict[str, RequestRecord]
    ways: dict[str, ProxyEvent]
    steps: Steps | None = None
    visits: Visits | None = None
    devices: list[DeviceRecord] = field(default_factory=list)


def merged_share(requests: Sequence[RequestRecord]) -> float:
    """The share of tokens that came together with the one before: their steps cannot be told apart."""
    gaps = [np.diff(request.token_s) for request in requests]
    return float(np.mean(np.concatenate(gaps) <= 0)) if sum(map(len, gaps)) else 0.0


def usable(run: Run, trial: int) -> list[RequestRecord]:
    """A trial's requests that were answered token by token, warm-up included, in order of sending."""
    requests = [
        request
        for request in run.requests
        if request.trial == trial
        and request.error is None
        and request.sent_s is not None
        and request.prompt_tokens
        and request.counted_by == "token_ids"
        and not request.coarse
        and not request.token_choice
        and request.token_s
    ]
    return sorted(requests, key=lambda request: request.sent_s or 0.0)


def streams_of(
    requests: Sequence[RequestRecord], ways: Mapping[str, ProxyEvent]
) -> dict[tuple[Role, str], list[Stream]]:
    """(role, instance's address) -> its streams of a trial's requests, whose ways through the proxy are in `ways`. With prefill's first token, decode's streams begin at the second."""
    streams = defaultdict(list)
    for request in requests:
        way = ways.get(request.id)
        cached = request.cached_prompt_tokens or 0
        assert request.prompt_tokens is not None
        tokens = request.prompt_tokens
        if way is None or way.prefill_sent_s is None:
            role: Role = "single" if way is None else "replica"
            where = way.decode if way and way.decode else ""
            streams[role, where].append(Stream(request.id, request.token_s, tokens, tokens - cached))
            continue
        shift = 1 if way.first_token_s is not None else 0
        # What decode's usage calls cached came over the wire: prefill computed the whole prompt.
        streams["prefill", way.prefill or ""].append(Stream(request.id, request.token_s[:1], tokens, tokens))
        if len(request.token_s) > shift:
            streams["decode", way.decode or ""].append(Stream(request.id, request.token_s[shift:], tokens + shift, 0))
    return dict(streams)


def rebuild(streams: Sequence[Stream]) -> Steps:
    """The steps that gave these streams their tokens; all streams of the instance must be among them."""
    times = np.empty(sum(len(stream.token_s) for stream in streams))
    count, begins = 0, []
    places = []
    for stream in sorted(streams, key=lambda stream: stream.token_s[0]):
        tokens = np.asarray(stream.token_s)
        if not count or tokens[0] > times[count - 1] + 1e-3:
            begins.append(count)
            place = count
        else:
            near = int(np.searchsorted(times[:count], tokens[0]))
            candidates = range(max(begins[-1], near - _WINDOW), min(count, near + _WINDOW + 1))

            place = min(candidates, key=lambda first: _misfit(tokens, times[first:count]))
        longer = place + len(tokens) - count
        if longer > 0:
            times[count : count + longer] = tokens[len(tokens) - longer :]
            count += longer
        places.append((place, stream))
    handed_s, sequences, context = np.full(count, np.inf), np.zeros(count, int), np.zeros(count, int)
    firsts, prompt, longest = np.zeros(count, int), np.zeros(count, int), np.zeros(count, int)
    for place, stream in places:
        here = slice(place, place + len(stream.token_s))
        handed_s[here] = np.minimum(handed_s[here], stream.token_s)
        sequences[here] += 1
        context[here] += stream.prompt_tokens + np.arange(len(stream.token_s))
        firsts[place] += 1
        prompt[place] += stream.computed
        longest[place] = max(longest[place], stream.computed)
    return Steps(
        handed_s=handed_s,
        sequences=sequences,
        context=context,
        firsts=firsts,
        prompt=prompt,
        longest=longest,
        since=np.arange(count) - np.repeat(begins, np.diff([*begins, count])),
        first_step={stream.id: place for place, stream in places},
    )


def _misfit(tokens: Array, steps: Array) -> float:
    overlap = min(len(tokens), len(steps))
    return float(np.median(np.abs(tokens[:overlap] - steps[:overlap]))) if overlap else np.inf


def trials_of(path: Path, run: Run) -> dict[int, list[RequestRecord]]:
    """The place of each trial whose steps can be rebuilt -> its requests that were answered token by token, in order of sending. Raises
    UserError with the reason where there is none."""
    trials, best = dict[int, list[RequestRecord]](), (0, 0)
    for place, trial in enumerate(run.trials):
        answered = usable(run, trial.index)
        failed = sum(request.error is not None for request in run.requests if request.trial == trial.index)
        best = max(best, (len(answered), failed))
        if len(answered) >= LEAST_REQUESTS and failed <= MOST_FAILED * len(answered):
            trials[place] = answered
    if trials:
        return trials
    if best[0] < LEAST_REQUESTS:
        raise UserError(
            f"{path}: no trial has {LEAST_REQUESTS} requests that were answered token by token, the best has {best[0]}: measure with "
            "`pdbench run --rate R --requests 240`, token ids counted (no --no-token-ids)"
        )
    raise UserError(
        f"{path}: {best[1]} requests failed or were ended with the load, {best[0]} were answered, and steps with more than "
        f"{100 * MOST_FAILED:.0f} % of their requests missing show nothing: take a run whose load went on to its end"
    )


def parts_of(path: Path, run: Run, first_trial: int = 0) -> list[Part]:
    """The instances of a run's trials, their steps rebuilt. Raises UserError where no trial shows them."""
    ways = ways_of(run.events)
    parts = []
    for place, requests in trials_of(path, run).items():
        instances = sorted(streams_of(requests, ways).items())
        by_id = {request.id: request for request in requests}
        for (role, address), streams in instances:
            part = Part(run, place, role, first_trial + place, streams, by_id, ways)
            if role == "prefill":
                part.visits = visits_of(run, streams, ways)
            else:
                part.steps = rebuild(streams)
            addresses = [other for (its_role, other), _ in instances if its_role == role]
            devices = [device for device in run.devices if device.role == role and device.kind == "gpu"]
            each = gpus_each(run, role)
            if len(devices) == each * len(addresses):  # instances take the GPUs in the order of their ports
                first = each * addresses.index(address)
                part.devices = sorted(devices, key=lambda device: device.index or 0)[first : first + each]
            parts.append(part)
    return parts


def visits_of(run: Run, streams: Sequence[Stream], ways: Mapping[str, ProxyEvent]) -> Visits:
    """A prefill instance's prompts, as the proxy saw them come and go."""
    taken_s = {
        event.transfer_id: event.taken_s
        for event in run.events
        if isinstance(event, PromptEvent) and event.server.startswith("prefill")
    }
    rows = [
        (way.prefill_sent_s, way.prefill_done_s, taken_s.get(way.transfer_id), stream.computed)
        for stream in streams
        if (way := ways.get(stream.id)) and way.prefill_sent_s is not None and way.prefill_done_s is not None
    ]
    sent_s, done_s, at_s, prompt = zip(*sorted(rows, key=itemgetter(0, 1)), strict=True)
    return Visits(np.array(sent_s), np.array(at_s, dtype=float), np.array(done_s), np.array(prompt))
