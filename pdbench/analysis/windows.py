"""What the windows of a load say of its rates: too few requests, ramps in them, chance."""

from collections.abc import Iterator

import numpy as np

from pdbench.analysis.intervals import length_s
from pdbench.analysis.metrics import Array, Timings, inside
from pdbench.config import is_open_loop
from pdbench.records import Flag, Interval, Run

FEW_SHARE = 0.1
CUT_SHARE = 0.05
"""The same of a closed loop's window that begins and ends anywhere (--steady-s), and so cuts rounds of streams that stay in step."""
OPEN_WINDOWS = ("completion to completion", "first completion")
"""What the windows of open loops are called, now and before."""
FEW_ENDED = 8
"""With fewer ends in an open loop's window requests/s are off by over 5 % in the mean: even over many seeds, 6 Poisson requests that last
1.5 times their distance have 10 % too many, and a window that begins and ends anywhere (--steady-s) holds one more or fewer."""
FILLING_SHARE = 0.03
"""Requests that were in flight in a window fall short of what a load without a beginning has by so much."""
FEW_ROUNDS = 4
"""So many rounds of a closed loop, at least, say how far they differ."""
UNCERTAIN_SHARE = 0.1
"""Rates that a load's seed changes by more than this (standard error) are said to."""


def few_per_stream(run: Run, timings: Timings) -> Iterator[Flag]:
    """A closed loop in whose windows far fewer or more requests ended than their work amounts to: streams begin together, and of requests
    that end at about the same time only the first counts at the end. Or one of few rounds and very unequal requests, of which short ones
    end first: of renewals with the coefficient of variation c there are about c^2 / 2 too many per stream (Cox, Renewal Theory, 1962)."""
    load, requests = run.config.get("load") or {}, timings.requests
    if is_open_loop(load) or load.get("phase") == "decode":
        return  # one batch that decodes together ends after its window
    ended, worked, lasted_s = 0, 0.0, np.maximum(requests.end_s - requests.sent_s, 1e-9)
    for start, end in timings.windows:
        here_s = np.minimum(requests.end_s, end) - np.maximum(requests.sent_s, start)
        worked += float(np.nansum((np.maximum(here_s, 0.0) / lasted_s)[requests.ok]))
        ended += int(np.count_nonzero(requests.ok & inside(requests.end_s, [(start, end)])))
    steady = load.get("steady_s")
    if worked and abs(worked - ended) > (CUT_SHARE if steady else FEW_SHARE) * worked:
        off_pct = 100 * abs(1 - ended / worked)
        remedy = "--steady-s" if steady else "--requests, ten per stream or more"
        yield Flag(
            "few-per-stream",
            f"{ended} requests ended in the windows, {worked:.0f} requests' work was done there: requests/s, goodput and energy per request are "
            f"off by {off_pct:.0f} %, tokens/s are not; raise {remedy}",
        )
        return
    streams, order = load.get("concurrency") or 1, np.argsort(requests.sent_s)
    if streams == 1 or not ended:
        return
    order = order[requests.ok[order]]
    # Not of each trial's first ones: they began together, and may have met cold servers.
    later = np.concatenate([order[requests.trial[order] == trial.index][streams:] for trial in run.trials])
    if len(later):
        variation = float(lasted_s[later].std() / lasted_s[later].mean())
        too_many = len(timings.windows) * streams * variation**2 / 2
        if too_many > FEW_SHARE * ended:
            yield Flag(
                "few-per-stream",
                f"requests last very unequally and only {ended / streams / len(timings.windows):.1f} per stream ended in a window: short ones end first, so "
                f"that requests/s, goodput and energy per request may be off by {100 * too_many / ended:.0f} %, tokens/s are not; raise --requests",
            )


def ramps_in_window(run: Run, timings: Timings) -> Iterator[Flag]:
    """A trial whose window says nothing of its load: the whole run, of which a good part was filling and draining; or, of an open loop, shorter
    than a request, so that most of what ended in it had begun on emptier servers, or one in which far fewer requests ended than were sent, or
    hardly any."""
    load, requests = run.config.get("load") or {}, timings.requests
    if not is_open_loop(load) and (load.get("concurrency") or 1) == 1:
        return
    for trial in run.trials:
        here = requests.ok & (requests.trial == trial.index)
        window_s = trial.end_s - trial.start_s
        window, why = str(trial.client.get("window", "")), None
        off = "requests/s, tokens/s and energy are of less than this load; raise --requests or --duration-s"
        maybe_off = "requests/s, tokens/s and energy may be off by over 5 %; raise --requests or --duration-s"
        if not here.any() or window_s <= 0:
            continue
        sent_s, end_s = requests.sent_s[here], requests.end_s[here]
        span = [(trial.start_s, trial.end_s)]
        sent, ended = (int(np.count_nonzero(inside(at_s, span))) for at_s in (sent_s, end_s))
        if window.startswith("whole run"):
            partly_s = min(window_s, float(end_s.min() - trial.start_s) + trial.end_s - float(sent_s.max()))
            if partly_s > FEW_SHARE * window_s:
                why = f"no time at full load, its window is the whole run, of which {100 * partly_s / window_s:.0f} % was filling and draining"
        elif window.startswith(OPEN_WINDOWS):
            lasts_s = end_s - sent_s
            median_s, in_flight = float(np.median(lasts_s)), float(lasts_s.mean()) * sent / window_s
            is_level = load.get("rate") and not load.get("ramp_to")
            if window_s < median_s:
                why = f"its window of {window_s:.1f} s is shorter than a request ({median_s:.1f} s, p50): most of what ended in it began on emptier servers"
            elif is_level and sent - ended > max(FEW_SHARE * sent, 3 * in_flight**0.5):
                why = f"{sent} requests were sent in its window and {ended} ended: ever more were in flight"
            elif ended - sent > max(FEW_SHARE * sent, 3 * in_flight**0.5):
                why, off = f"{ended} requests ended in its window and {sent} were sent in it", maybe_off
            if not why and is_level:
                span_s = trial.start_s - float(sent_s.min()), trial.end_s - float(sent_s.min())
                if filling_share(lasts_s, lasts_s, *span_s) > FILLING_SHARE:
                    short = filling_share(lasts_s, np.nan_to_num(requests.output_tokens[here]), *span_s)
                    why = f"the longest requests were not all in flight when its window began: tokens/s are about {100 * short:.0f} % too low"
                    off = "requests/s may be, too; raise --requests or --duration-s"
        if not why and ended < FEW_ENDED and is_open_loop(load):
            why, off = f"only {ended} requests ended in its window", maybe_off
        if why:
            yield Flag("ramps-in-window", f"trial {trial.index + 1}: {why}: {off}")
            return


def filling_share(lasted_s: Array, amount: Array, start_s: float, end_s: float) -> float:
    """The share that a window lacks, `start_s` to `end_s` after the first sending, as nothing was in flight before that, of an amount that each
    request has evenly over its time: of the requests in flight its time itself, of tokens/s its tokens. At the time t the part that lies beyond
    requests' first t seconds is still missing. 0 where no amount is known."""
    missing_s = (np.maximum(lasted_s - start_s, 0) ** 2 - np.maximum(lasted_s - end_s, 0) ** 2) / 2
    missing = (missing_s * amount / np.maximum(lasted_s, 1e-9)).sum()
    return float(missing / max((end_s - start_s) * amount.sum(), 1e-9))


def rate_uncertain(run: Run, timings: Timings) -> Iterator[Flag]:
    """A steady rate or a closed loop whose random arrivals and lengths make few requests' figures a matter of chance. Of n independent intervals,
    the ends in them have the relative standard error std / sqrt(n) of the intervals over their mean, and tokens/s of tokens less intervals, each
    over its mean (Cox, Renewal Theory, 1962). At a rate, intervals lie between arrivals, and no tokens change them. In a closed loop they are
    rounds of its streams, in which servers may have worked on any of the requests, or with few rounds the requests' own times; what equal lengths leave to chance is not the seed's."""
    load, requests = run.config.get("load") or {}, timings.requests
    if load.get("ramp_to") or load.get("phase") == "decode" or (is_open_loop(load) and not load.get("rate")):
        return
    ok = requests.ok
    ended = int(np.count_nonzero(ok & inside(requests.end_s, timings.windows)))
    if not ended:
        return
    of_lengths, of_prompts = (
        _over_mean(tokens[ok]).std() for tokens in (requests.output_tokens, requests.prompt_tokens)
    )
    if load.get("rate"):
        apart_s = [np.diff(np.sort(requests.sent_s[requests.trial == trial.index])) for trial in run.trials]
        intervals = _over_mean(np.concatenate(apart_s))
        if len(intervals) < 2:
            return
        # All of a trial's arrivals stand in a fixed time: only what lies outside of the windows is left to chance.
        window_s = 0.0 if load.get("steady_s") else length_s(timings.windows)
        outside = max(0.0, 1 - window_s * load["rate"] / len(requests.sent_s))
        of_requests = intervals.std() * outside**0.5
        number, of_tokens = ended, np.hypot(of_requests, of_lengths)
    else:
        streams = load.get("concurrency") or 1
        edges_s = [_rounds(requests.end_s[ok], window, streams) for window in timings.windows]
        intervals = _over_mean(np.concatenate([np.diff(edges) for edges in edges_s]))
        if len(intervals) >= FEW_ROUNDS:
            token_s, weight = timings.arrivals.token_s, timings.arrivals.weight
            came = [np.histogram(token_s, edges, weights=weight)[0] for edges in edges_s]
            number, tokens = len(intervals) - 1, _over_mean(np.concatenate(came))
        else:  # parts of rounds would differ where streams stay in step; each request's time is its stream's interval
            intervals, tokens = (
                _over_mean(each[ok]) for each in (requests.end_s - requests.sent_s, requests.output_tokens)
            )
            number = ended
        most = (of_lengths + of_prompts) * (number / ended) ** 0.5
        of_requests, of_tokens = min(most, intervals.std()), min(most, (tokens - intervals).std())
    requests_pct, tokens_pct = 100 * of_requests / number**0.5, 100 * of_tokens / number**0.5
    if max(requests_pct, tokens_pct) > 100 * UNCERTAIN_SHARE:
        yield Flag(
            "rate-uncertain",
            f"{ended} requests ended in the windows: another seed's requests/s would differ by about {requests_pct:.0f} %, its tokens/s by {tokens_pct:.0f} % (standard "
            "error); runs of the same arrivals and lengths can be compared; raise --requests or --trials",
        )


def _rounds(end_s: Array, window: Interval, streams: int) -> Array:
    """The edges of a window's rounds, in each of which as many requests end as there are streams."""
    ends = np.sort(end_s[inside(end_s, [window])])
    return np.concatenate([window[:1], ends[streams - 1 :: streams]])


def _over_mean(values: Array) -> Array:
    """Values over the mean of those that are known; 1 for the others."""
    known = np.isfinite(values)
    mean = values[known].mean() if known.any() else 0.0
    return np.where(known, values, mean) / mean if mean > 0 else np.ones(len(values))
