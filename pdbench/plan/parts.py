"""The instances of a run's trials: what each was sent, when it answered, which steps it did."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import msgspec
import numpy as np

from pdbench.errors import UserError
from pdbench.events import PromptEvent, ProxyEvent, ways_of
from pdbench.plan.engine import Role
from pdbench.plan.steps import Steps, Stream, Visits, rebuild, streams_of, usable
from pdbench.records import DeviceRecord, RequestRecord, Run

LEAST_REQUESTS, MOST_FAILED = 30, 0.1
"""A trial with fewer answered requests, or a larger share of failed ones, calibrates nothing."""


class Part(msgspec.Struct):
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
    device: DeviceRecord | None = None


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
            if len(devices) == len(addresses):  # instances take the GPUs in the order of their ports
                part.device = sorted(devices, key=lambda device: device.index or 0)[addresses.index(address)]
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
