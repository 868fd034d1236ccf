"""The answer of a search in sentences."""

from math import inf

from pdbench.report import text
from pdbench.report.text import translate as _
from pdbench.search.document import Choice, Document, Held, keeps


def slo(document: Document) -> str:
    limits = [f"{_(name)} {limit:g} ms" for name, limit in text.slo(document.slo).items()]
    return _("{0} for {1} % of requests", _(" and ").join(limits), f"{document.attain_pct:g}")


def sentence(document: Document) -> str:
    """The answer: each deployment's rate with its interval, best first, and what the best gains on the next; then the cheapest clocks."""
    entries = document.searched()
    per_gpu = all(entry.rate_per_s_per_gpu for entry in entries if entry.rate_per_s)

    def rate_of(entry: Held) -> float:
        return (entry.rate_per_s_per_gpu if per_gpu else entry.rate_per_s) or 0.0

    ordered = sorted(entries, key=rate_of, reverse=True)
    found = [entry for entry in ordered if entry.rate_per_s]
    parts: list[str] = []
    for entry in found:
        name = text.with_gpus(named(entry), entry.gpus) if entry.gpus else named(entry)
        rate, low, high = map(text.number, (entry.rate_per_s, entry.low, entry.high))
        bounds = _("({0} to {1})", low, high) if entry.high is not None else _("or more")
        parts.append(_("{0} {1} {2}" if parts else "{0} carries {1} requests/s {2}", name, rate, bounds))
    words = _("Within {0}, {1}", slo(document), _(", ").join(parts)) if parts else ""
    # Every load that counts kept the SLO, and none says which rate does.
    unknown = [entry for entry in entries if not entry.rate_per_s and not entry.none_holds]
    if not parts and len(unknown) < len(entries):
        words = _("No rate keeps {0}", slo(document))
    elif not parts and unknown:
        words = _("No rate is known yet within {0}", slo(document))
    if len(found) > 1:
        best, second = found[:2]
        gain = f"{rate_of(best) / rate_of(second):.3g}"
        words += _(": {0} times {1} per GPU" if per_gpu else ": {0} times {1}", gain, second.name)
        low_of_best, high_of_second = (
            (bound or 0.0) / ((entry.gpus or 1) if per_gpu else 1)
            for bound, entry in ((best.low, best), (second.high or inf, second))
        )
        if low_of_best <= high_of_second:
            words += _(", but the intervals overlap")
        # Where answers cannot be judged, joules per good request are what they are at most.
        judged = not {point.run for point in document.points if point.undecided_pct} & {best.run, second.run}
        if best.j_per_good_request and second.j_per_good_request and judged:
            words += _(", for {0} energy per good request", _change(best.j_per_good_request, second.j_per_good_request))
    if unconfirmed := [entry.name for entry in found if entry.run and entry.attained_pct is None]:
        words += _(
            "; no run confirms the rate of {0}: the last was too short, or does not count", _(", ").join(unconfirmed)
        )
    for entry in ordered:
        void = [point.void for point in document.points if point.void and point.deployment == entry.name]
        if entry in unknown:
            if entry.high:
                words += _("; {0} carries less than {1}", entry.name, text.number(entry.high))
            words += "" if entry.client_limited or void else _("; {0} was not loaded for long enough", entry.name)
        elif not entry.rate_per_s and (near := entry.closest):
            at = _("{0} requests/s", text.number(near.rate_per_s)) if near.rate_per_s else _("one at a time")
            share, limit = text.attained(near.attained_pct, document.attain_pct), _limit(entry)
            words += _("; {0} holds no rate: closest is {1} % at {2}, {3} breaks it", entry.name, share, at, limit)
        confirmed_pct = entry.attained_pct if entry.rate_per_s else None
        if confirmed_pct is not None and not keeps(confirmed_pct, document.attain_pct):
            share = text.attained(confirmed_pct, document.attain_pct)
            words += _("; {0}'s confirming run kept it for {1} % of its requests", entry.name, share)
        if entry.rate_per_s and any(point.undecided_pct for _rate, point in document.loads(entry.name)):
            words += _(
                "; {0} may carry more: answers of which nobody knows whether they kept the SLO count as missed",
                entry.name,
            )
        if void:
            reasons = _(", ").join(sorted({each.partition(":")[0] for each in void}))
            words += _("; loads of {0} that do not count: {1} ({2})", entry.name, len(void), reasons)
        if entry.client_limited:
            below = entry in unknown and entry.high
            more = "; the client was the limit of {0}, which may carry more"
            words += _("; at lower rates the client was the limit of {0}" if below else more, entry.name)
    return _(" ").join(filter(None, (words and words + _("."), _clocks_sentence(document))))


def named(entry: Held) -> str:
    """With 2P2D where a deployment has several instances of a phase, which neither its GPUs nor its name say."""
    return entry.name if entry.layout in (None, "1P1D", entry.name) else f"{entry.name} {entry.layout}"


def _limit(entry: Held | Choice) -> str:
    return _(text.SLO.get(entry.limited_by or "", "no limit"))


def _change(value: float, base: float) -> str:
    change = value / base - 1
    return _("{0}% less" if change < 0 else "{0}% more", f"{100 * abs(change):.0f}")


def _clocks_sentence(document: Document) -> str:
    """What the cheapest clocks cost and save; where all deployments had the same rate, also the best beside the next."""
    entries = sorted(document.tuned(), key=lambda each: each[1].j_per_good_request or inf)
    undecided = {point.deployment for point in document.points if point.setting and point.undecided_pct}
    parts = []
    for name, found in entries:
        at, before = _("{0} requests/s", text.number(found.rate_per_s)), found.before
        if found.setting is None and found.limited_by is None:
            parts.append(_("{0} at {1}: no setting could be judged", name, at))
            continue
        if found.setting is None:
            parts.append(_("{0} keeps {1} at {2} with no clock: {3} breaks it", name, slo(document), at, _limit(found)))
            continue
        joules, clocks = text.number(found.j_per_good_request), text.setting(found.setting)
        words = _("{0} needs least energy at {1}: {2} J per good request at {3}", name, clocks, joules, at)
        if not before:
            words += _(" by what is measured so far")
        elif before.setting and before.setting != found.setting and before.j_per_good_request:
            change = _change(found.j_per_good_request or 0.0, before.j_per_good_request)
            words += _(", {0} than at {1}", change, text.setting(before.setting))
        if name in undecided:
            words += _(
                ", chosen by joules that are what they are at most, as answers that nobody can judge count as missed"
            )
        if not keeps(found.attained_pct or 0.0, document.attain_pct):
            share = text.attained(found.attained_pct, document.attain_pct)
            words += _(", but the confirming run kept the SLO for {0} % of its requests", share)
        elif not found.kept:
            words += _(
                ", but the confirming run did not hold these clocks, its client was the limit, or its answers were wrong"
            )
        parts.append(words)
    known = [
        (name, found.rate_per_s, found.j_per_good_request)
        for name, found in entries
        if found.j_per_good_request and name not in undecided
    ]
    if len(known) > 1 and len({rate for _name, rate, _joules in known}) == 1:
        (first, _rate, least), (second, _rate, more) = known[:2]
        parts.append(_("each at its own cheapest, {0} needs {1} than {2}", first, _change(least, more), second))
    return _("; ").join(parts) + _(".") if parts else ""
