"""Differences between runs in words: the answer in one sentence, each metric's verdict, what would decide more."""

from pdbench.analysis.compare import Comparison, ConfidenceInterval, Difference
from pdbench.analysis.run_analysis import is_foreign
from pdbench.analysis.thresholds import ThresholdResult
from pdbench.report.text import Runs, against, arrivals, flag_names, number, title, unit
from pdbench.report.text import translate as _

HEADLINE = (
    "tbt_p99_ms", "tbt_p50_ms", "ttft_p50_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "output_tokens_per_s",
    "goodput_requests_per_s", "j_per_output_token",
)  # fmt: skip
"""Metrics that the answer in one sentence names, where they are better or worse for sure."""
WIDE = 100.0
"""Bounds of an interval this far apart say only that there were too few trials."""
MOST_PAIRS = 48
"""More are not proposed: then twice what there is."""


def values(line: Difference) -> str:
    """Both runs' figures with their unit: `58.6 → 4.44 ms`."""
    return f"{number(line.a)} → {number(line.b)} {unit(line.metric.name)}".rstrip()


def verdict(line: Difference) -> str:
    """`better: 2.18 x lower (2.10–2.26)`, or the change seen and why no verdict can be given."""
    words = judgement(line)
    if line.verdict not in ("better", "worse"):
        return words
    return f"{_('{0}, for this metric alone', _(line.verdict)) if line.alone else _(line.verdict)}: {words}"


def judgement(line: Difference) -> str:
    """The change and its interval, `2.18 x lower (2.10–2.26)`, or the change seen and why there is none."""
    if line.ratio is None:
        change = "" if line.change is None else percent(line.change)
        if line.unjudged == "one-trial":  # the table's header and note say it for all rows
            return change
        reason = _("not judged: it was zero in a trial")
        if line.unjudged == "few-values":
            reason = _("not judged: {0} values, needs {1}", line.values, line.metric.values_needed)
        if line.unjudged == "cut-short":
            reason = _("not judged: no whole trial of both")
        if line.unjudged == "slo-undecided":
            reason = _("not judged: a lower bound (slo-undecided)")
        return f"{change}, {reason}" if change else reason
    if line.verdict in ("better", "worse"):
        return times(line.ratio)
    bounds = percent(line.ratio.low), percent(line.ratio.high)
    if line.verdict == "same":
        return _("the same within 5 % ({0} to {1})", *bounds)
    if too_wide(line.ratio):
        return _("{0} trials cannot show a difference", line.trials)
    needed = [
        _("over 1,000") if trials is None else f"{max(trials, line.trials + 1):,}"
        for trials in (line.trials_for_change, line.trials_needed)
    ]
    return _("not decided ({0} to {1}): {2} trials would decide it, {3} one of 5 %", *bounds, *needed)


def too_wide(ratio: ConfidenceInterval | None) -> bool:
    return ratio is not None and ratio.high > WIDE * ratio.low


def times(ratio: ConfidenceInterval) -> str:
    """A ratio and its interval as people say it: from 1.5-fold on `2.4 x higher`, below that in per cent."""
    lower = ratio.value < 1
    factor = (1 / ratio.value, 1 / ratio.high, 1 / ratio.low) if lower else (ratio.value, ratio.low, ratio.high)
    if factor[0] >= 1.5:
        words = "{0} x lower ({1}–{2})" if lower else "{0} x higher ({1}–{2})"
        low = number(factor[1])
        if low == "1.00":  # the bound excludes 1, as the verdict does: as many digits as show it
            low = f"{1 + float(f'{factor[1] - 1:.1g}'):.12g}"
        return _(words, number(factor[0]), low, number(factor[2]))
    change, *bounds = (abs(bound - 1) * 100 for bound in (ratio.value, ratio.low, ratio.high))
    words = "{0} % lower ({1}–{2} %)" if lower else "{0} % higher ({1}–{2} %)"
    return _(words, number(change), *map(number, sorted(bounds)))


def percent(ratio: float) -> str:
    """A ratio as a signed change: +4.1 %."""
    change = (ratio - 1) * 100
    return f"{change:+,.{0 if abs(change) >= 100 else 1}f} %".replace("-", "−")


def advice(comparison: Comparison) -> str:
    """What to do where a run has one trial, or no whole one; empty where there are more."""
    if any(line.unjudged == "cut-short" for line in comparison.differences):
        return _("Trials that were cut short are not compared: measure again, or go on with --resume.")
    if not comparison.one_trial:
        return ""
    return _(
        "One trial shows what was seen, not how sure it is: measure again with --pairs 6 for intervals and verdicts."
    )


def next_step(comparison: Comparison) -> str:
    """How more would be decided, where something is not."""
    open_lines = [line for line in comparison.differences if line.verdict == "unclear" or line.alone]
    if comparison.one_trial or not comparison.paired or not open_lines:
        return advice(comparison)
    line = next((line for line in open_lines if line.metric.name == comparison.primary), open_lines[0])
    until = f'--until "{line.metric.name}<5%"'
    wanted = line.trials_for_change or 0
    pairs = wanted if line.trials < wanted <= MOST_PAIRS else max(6, 2 * line.trials)
    return _("To decide more, repeat the command with --resume and --pairs {0} or {1}.", pairs, until)


def basis(comparison: Comparison) -> str:
    """What the intervals rest on: `6 pairs, each turn on its own server start, of this load in general`."""
    trials = min((line.trials for line in comparison.differences), default=0)
    if not trials:
        return _("no whole trial of both")
    if not comparison.paired:
        return _("one trial each, measured apart") if trials == 1 else _("{0} trials each, measured apart", trials)
    starts = {
        "each": _("each turn on its own server start"),
        "joined": _("some on a shared server start"),
        "unknown": _("some perhaps on a shared server start"),
        "one": _("all of one server start"),
    }[comparison.starts]
    of = _("of these arrivals") if comparison.same_arrivals else _("of this load in general")
    return _("one pair, {0}, {1}", starts, of) if trials == 1 else _("{0} pairs, {1}, {2}", trials, starts, of)


def headline(comparison: Comparison, runs: Runs) -> str:
    """The answer in one sentence: what is better and worse for sure, by how much, on what, how sure."""
    b = runs[comparison.names[1]]
    where = against(comparison.names)
    unknown = {
        name
        for name, count in zip(comparison.names, comparison.gpus, strict=True)
        if not count and is_foreign(runs[name])
    }
    if comparison.equal_hardware and b.gpus:
        where = _("{0}, 1 GPU each" if b.gpus == 1 else "{0}, {1} GPUs each", where, b.gpus)
    elif comparison.equal_hardware and any(not runs[name].summary.devices for name in unknown):
        where = _("{0}, on hardware that is not known", where)
    elif not comparison.equal_hardware:
        counts = (
            "?" if name in unknown else number(count or 0)
            for name, count in zip(comparison.names, comparison.gpus, strict=True)
        )
        where = _("Scaling, not a verdict: {0} ({2} GPUs against {1})", where, *counts)
    where = ": ".join(filter(None, (_not_counting(comparison), where)))
    lines = {line.metric.name: line for line in comparison.differences}
    shown = [lines[name] for name in dict.fromkeys((comparison.primary, *HEADLINE)) if name in lines]
    groups = {
        verdict: [
            f"{title(line.metric.name)} {judgement(line)}"
            for line in shown
            if line.verdict == verdict and not line.alone
        ]
        for verdict in ("better", "worse")
    }
    parts = [_("{0}: {1}", _(name), ", ".join(found)) for name, found in groups.items() if found]
    first = lines.get(comparison.primary)
    if first is not None and first.verdict == "unclear":
        parts.append(_("{0} not decided", title(first.metric.name)))
    if first is not None and first.unjudged in ("slo-undecided", "cut-short"):
        parts.append(f"{title(first.metric.name)} {judgement(first)}")
    declared = (b.config.get("load") or {}).get("primary")
    if declared and declared not in lines:
        parts.append(_("{0}, the --primary of the runs, is not measured in both", declared))
    if comparison.one_trial:
        parts = [_("one trial, nothing is decided")]
    names = list(dict.fromkeys(name for run in comparison.names for name in flag_names(runs[run])))
    end = [basis(comparison), *([_("flags: {0}", ", ".join(names))] if names else [])]
    return f"{arrivals(b)} · {where}: {'; '.join(parts) or _('no difference decided')}. ({'; '.join(end)})"


def groups(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(verdict, heading, metrics with their changes) for each verdict that occurs; of one trial what it hints at."""
    one_trial = comparison.one_trial
    headings = {
        "better": _("better so far") if one_trial else _("better"),
        "worse": _("worse so far") if one_trial else _("worse"),
        "same": _("within 5 % so far") if one_trial else _("same"),
        "alone": _("taken alone"),
        "unclear": _("not decided"),
        "unjudged": _("not judged"),
    }
    found: dict[str, list[str]] = {}
    for line in comparison.differences:
        group = line.leaning if one_trial else "alone" if line.alone else line.verdict
        change = ""
        if group in ("better", "worse", "alone"):
            change = percent(line.change) if one_trial and line.change else judgement(line).split(" (")[0]
        found.setdefault(group, []).append(f"{title(line.metric.name)} {change}".rstrip())
    return [(group, heading, ", ".join(found[group])) for group, heading in headings.items() if group in found]


def confidence(comparison: Comparison) -> str:
    """How sure the answer is, or what to do where it is not."""
    if not comparison.differences:
        return _("These runs share no metric.")
    words = advice(comparison) or _("Better and worse are said with 95 % confidence ({0}):", basis(comparison))
    return ": ".join(filter(None, (_not_counting(comparison), words)))


def _not_counting(comparison: Comparison) -> str:
    """Whose figures do not count, whatever is better or worse; empty where all do."""
    names = ", ".join(comparison.void)
    return _("THE FIGURES OF {0} DO NOT COUNT (its flags say why)", names) if names else ""


def threshold(result: ThresholdResult) -> str:
    """A condition with the reason for its outcome in one line."""
    if result.change is None:
        line = result.difference
        why = ", " + _("one trial: no interval") if line.unjudged == "one-trial" else ""
        reason = f"{title(line.metric.name)}: {judgement(line)}{why} ({values(line)})"
    else:
        value, low, high = (
            f"{'+' if bound >= 0 else '−'}{number(abs(bound))}"
            for bound in (result.change.value, result.change.low, result.change.high)
        )
        its_unit = "%" if result.condition.relative else unit(result.condition.metric)
        reason = _("{0} {1}, 95 % interval {2} to {3}", value, its_unit, low, high)
    return f"{result.condition.text}: {reason}"
