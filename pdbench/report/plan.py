"""What `pdbench plan` found: calibrations, predictions, checks and searches as tables and charts."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from math import floor
from pathlib import Path

import numpy as np

from pdbench.plan.engine import SHORT_PROMPT
from pdbench.plan.records import Calibration, Check, Figure, Prediction, RoleCalibration, Search
from pdbench.plan.seconds import PARTS
from pdbench.report import chart_types, text
from pdbench.report.answer import percent
from pdbench.report.chart_types import BAD, GOOD, GREY, MUTED, ORANGE, SHADES, SPARE, Axis, Chart, Panel, Series, shades
from pdbench.report.tables import Table, Value
from pdbench.report.text import translate as _

LATENCIES = tuple(f"{name}_{part}_ms" for name in ("ttft", "tbt", "e2e") for part in ("p50", "p90", "p99"))
FIGURES = (
    *LATENCIES, "mean_tbt_p50_ms", "output_tokens_per_s", "goodput_requests_per_s", "slo_met_pct", "mean_power_w", "prefill_power_w",
    "decode_power_w", "j_per_output_token", "j_per_good_request",
)  # fmt: skip
FOLLOW = ("mean_tbt_p50_ms", "slo_met_pct", "j_per_good_request")
"""Figures that follow from the others: a check has a row of each, and counts none beside them."""
SEARCHED = ("slo_met_pct", "ttft_p99_ms", "tbt_p99_ms", "j_per_output_token")
OVERVIEW = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "j_per_output_token")
VERDICTS: dict[str | None, tuple[str, str, str]] = {
    "met": ("keeps the SLO", GOOD, "o"),
    "not decided": ("not decided", ORANGE, "o"),
    "not met": ("does not", BAD, "x"),
    "refused": ("refused", GREY, "o"),
    None: ("", GREY, "o"),
}
"""Of a deployment: its words, its colour and its point."""
REMEDY = "What no run shows is measured by `{0}`"
GREEN = "Green: 99 % of the requests within the SLO; red: fewer; orange: the interval does not decide."
BEST = "Predicted at the costs' best estimate; tables have the median of the draws."
SECONDS = {"way_in": ("Way in", "send"), "decode": ("Decode's steps", "decode_step")}
"""Parts of a request's time that are no phase of a run: their words, and the phase whose colour they have."""


def _load(of: Prediction) -> str:
    """The load in words, which was saved as parts with commas between."""
    return _(", ").join(map(_, of.load.split(", ")))


def calibration(found: Calibration) -> Table:
    """What a step costs in each role, what the runs reached, how the machine drifted."""

    def ms(cost: str) -> Callable[[RoleCalibration], Value]:
        return lambda role: None if (value := getattr(role.engine.costs, cost)) is None else 1e3 * value

    def per_thousand(cost: str) -> Callable[[RoleCalibration], Value]:
        return lambda role: 1e6 * getattr(role.engine.costs, cost) if role.knows_lengths else _("not known")

    def alike_ms(role: RoleCalibration) -> Value:
        return 1e3 * role.engine.costs.alike_launch * role.engine.costs.host_prefill_s

    roles = found.roles
    computing = [name for name, role in roles.items() if role.computes]  # decode computes no prompts
    decoding = [name for name in roles if name != "prefill"]
    beside = [name for name in computing if name in decoding]
    described: list[tuple[str, Iterable[str], Callable[[RoleCalibration], Value]]] = [
        (_("a prompt's step alone, host, ms"), computing, alike_ms),
        (_("and of over {0} tokens beside a running stream, host, ms", SHORT_PROMPT), beside, ms("host_prefill_s")),
        (_("a step beyond the CUDA graphs, host, ms"), computing, ms("host_eager_s")),
        (_("and per 1,000 prompt tokens, host, ms"), computing, per_thousand("host_per_prompt_token_s")),
        (_("before the GPU begins with a prompt, ms"), computing, ms("before_gpu_s")),
        (_("per 1,000 prompt tokens, GPU, ms"), computing, per_thousand("gpu_per_prompt_token_s")),
        (
            _("a decode step of 1 sequence, without its context, ms"),
            decoding,
            lambda role: 1e3 * min(role.engine.costs.gpu_decode_s.values()),
        ),
        (
            _("and of the most sequences, without theirs, ms"),
            decoding,
            lambda role: 1e3 * max(role.engine.costs.gpu_decode_s.values()),
        ),
        (_("on the way in, ms"), computing, ms("ingress_s")),
        (_("and per 1,000 prompt tokens on the way in, ms"), computing, per_thousand("ingress_per_token_s")),
        (_("most prompt tokens in a step"), computing, lambda role: role.engine.box.prompt_tokens),
        (_("most sequences in a step"), decoding, lambda role: role.engine.box.sequences),
        (_("prompt lengths"), roles, lambda role: "{:,}-{:,}".format(*role.prompt_lengths)),
        (_("trials"), computing, lambda role: len(role.speeds)),
        (_("slowest trial over fastest"), computing, lambda role: max(role.speeds) / min(role.speeds)),
        (_("power at idle, W"), roles, lambda role: role.power.idle_w if role.power else None),
        (_("decoding, W"), decoding, lambda role: role.power.decode_w if role.power else None),
        (_("per prompt token, J"), computing, lambda role: role.power.prompt_token_j if role.power else None),
    ]
    rows = [
        [title, *(value(role) if name in of else None for name, role in roles.items())]
        for title, of, value in described
    ]
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    notes = sorted({note for role in found.roles.values() for note in role.assumed})
    lines = [_("Assumed: {0}", _("; ").join(map(_, notes)))] if notes else []
    if found.handoff is not None:
        words = "Handoff from prefill to decode: {0} decode steps + {1} ms per 1,000 prompt tokens"
        lines.append(_(words, text.number(found.handoff.steps), text.number(1e6 * found.handoff.per_token_s)))
    lines += [_("Missing: {0}", _(reason)) for reason in found.missing]
    return Table(title=_("Calibrated"), header=["", *map(_, found.roles)], rows=rows, note="\n\n".join(lines))


def predictions(of: Sequence[Prediction], *, on_gpus: bool, remedy: str | None = None) -> Table:
    """Figures with their intervals, a column per deployment; a refused one has its reason below, and the command that measures what is missing."""
    rows: list[list[Value]] = [
        [text.label(name), *(_with_interval(name, each.figures.get(name)) for each in of)]
        for name in FIGURES
        if any(name in each.figures for each in of)
    ]
    lines = []
    for each in of:
        name = each.layout.name
        if each.refusal:
            lines.append(_("{0}: refused: {1}", name, _(each.refusal)))
        elif each.saturated:
            words = "{0}: the queue grows: it cannot keep up, and its times depend on how long the load lasts"
            lines.append(_(words, name))
    lines += [_(REMEDY, remedy)] if remedy else []
    lines.append(
        _("In brackets: 90 % intervals; costs, the machine's speed from trial to trial and arrivals vary in them.")
    )
    names = [text.with_gpus(each.layout.name, each.layout.gpus, on_gpus=on_gpus) for each in of]
    title = _("Predicted: {0}", _load(of[0]))
    if not rows:
        return Table(title=title, note="\n\n".join(lines[:-1]))
    return Table(title=title, header=["", *names], rows=rows, note="\n\n".join(lines))


def search(of: Search, *, on_gpus: bool, remedy: str | None = None) -> Table:
    """Every deployment that was tried near the best, the cheapest first; a reason for each that is refused, and the command that measures what is missing."""
    rows: list[list[Value]] = []
    styles, lines = [], []
    for place, each in enumerate(of.candidates):
        verdict = _(each.verdict or "")
        if each.refusal:
            lines.append(_("{0}: refused: {1}", each.layout.name, _(each.refusal)))
        elif each.verdict == "met":
            verdict = _("cheapest") if not place else _("tie") if each.layout.name in of.ties else verdict
        if each.saturated:
            verdict = _(", ").join((verdict, _("queue grows")))
        # A refused one's figures are a guess: only the picture shows where it would be.
        known = {} if each.refusal else each.figures
        figures = (_with_interval(name, known.get(name)) for name in SEARCHED)
        rows.append([each.layout.name, each.layout.gpus, verdict, *figures])
        styles.append({"met": "" if place else "better", "not decided": ""}.get(each.verdict or "", "worse"))
    if not of.candidates or of.candidates[0].verdict != "met":
        words = "Within --max-gpus {0} no deployment surely keeps the SLO in steps that the runs have reached."
        lines.insert(0, _(words, f"{of.most_gpus:,}"))
    lines += [_(REMEDY, remedy)] if remedy else []
    words = "{0} simulations of {1} requests. In brackets: 90 % intervals."
    lines.append(_(words, f"{of.simulations:,}", f"{of.requests:,}"))
    lines.append(_("Met: the whole interval is at 99 % or above; not decided: 99 % lies in it."))
    labels = map(text.label, SEARCHED)
    header = ["", _("GPUs" if on_gpus else "instances"), "", *labels]
    title = _("Search: 99 % of requests within the SLO: {0}", _load(of.candidates[0]))
    return Table(title=title, header=header, rows=rows, styles=styles, note="\n\n".join(lines))


def _bounded(metric: str, value: float, low: float, high: float) -> str:
    return f"{_rounded(metric, value)} ({_rounded(metric, low)}-{_rounded(metric, high)})"


def _with_interval(metric: str, figure: Figure | None) -> Value:
    return None if figure is None else _bounded(metric, figure.value, figure.low, figure.high)


def _rounded(metric: str, value: float) -> str:
    """Shares within the SLO down: 98.97 % do not reach 99."""
    return text.number(floor(10 * value) / 10 if metric == "slo_met_pct" else value)


def is_inside(figure: Figure, measured: float) -> bool:
    return figure.low <= measured <= figure.high


def compared(of: Check, without: Collection[str] = ()) -> dict[str, tuple[Figure, float, Figure | None]]:
    """Figure -> as predicted, as measured, as predicted at the run's own speed."""
    own = of.at_own_speed.figures if of.at_own_speed else {}
    return {
        name: (of.predicted.figures[name], of.measured[name], own.get(name))
        for name in FIGURES
        if name in of.measured and name in of.predicted.figures and name not in without
    }


def check(of: Check) -> Table:
    """Predicted beside measured. The error is predicted over measured - 1; a value outside its interval is marked."""
    rows: list[list[Value]] = []
    styles = []
    for name, (figure, measured, own) in compared(of).items():
        inside = is_inside(figure, measured)
        low, high = of.trials.get(name, (measured, measured))
        words = _bounded(name, measured, low, high) if low < high else _rounded(name, measured)
        errors = error(figure, measured), error(own, measured)
        rows.append([text.label(name), words, _with_interval(name, figure), _("yes") if inside else _("no"), *errors])
        styles.append("" if inside else "worse")
    name = of.predicted.layout.name
    lines = []
    if rows:
        if any(low < high for low, high in of.trials.values()):
            lines.append(_("Measured: all trials together, and the trials' least and most."))
        lines.append(
            _("At its own speed: with the speed of its own prefill steps known; what is left is the model's error.")
        )
    if not of.held_out:
        lines.append(_("This run calibrated the costs: its errors say less than another run's."))
    if of.differs:
        lines.append(_("It differs from the runs that calibrated in: {0}", _(", ").join(map(_, of.differs))))
    if of.predicted.refusal:
        lines.append(_("As a prediction it would be refused: {0}", _(of.predicted.refusal)))
    header = ["", _("measured"), _("predicted"), _("in the interval"), _("error"), _("error at its own speed")]
    title = _("Check: {0}, {1}", of.path, name)
    return Table(title=title, header=header, rows=rows, styles=styles, note="\n\n".join(lines))


def overview(of: Sequence[Check]) -> Table:
    """Several checks, two rows each: how far off from arrivals alone, and at the run's own speed."""
    rows: list[list[Value]] = []
    for each, name in zip(of, apart(of), strict=True):
        counted = compared(each, without=FOLLOW)
        inside = sum(is_inside(figure, measured) for figure, measured, _own in counted.values())
        known = [counted.get(name, (None, 0.0, None)) for name in OVERVIEW]
        verdict = _("{0} of {1}", inside, len(counted))
        verdict = f"{verdict} ({_('refused')})" if each.predicted.refusal else verdict
        rows.append([name, verdict, *(error(figure, measured) for figure, measured, _own in known)])
        if each.at_own_speed:
            rows.append([_("at its own speed"), "", *(error(own, measured) for _figure, measured, own in known)])
    header = ["", _("in the interval"), *(text.label(name) for name in OVERVIEW)]
    lines = [
        _("Errors of the prediction from arrivals alone, and with the speed of the run's own prefill steps known."),
        _("Not counted, as they follow from the others: {0}.", _(", ").join(map(text.title, FOLLOW))),
    ]
    calibrating = [each.path for each in of if not each.held_out]
    if calibrating:
        lines.append(_("Their errors say less than another run's, as they calibrated: {0}", ", ".join(calibrating)))
    return Table(title=_("Checks"), header=header, rows=rows, note="\n\n".join(lines))


def apart(checks: Sequence[Check]) -> list[str]:
    """What tells the runs from each other, in words that fit into a narrow column: their deployments, and the folders that not all of them are in.
    A single one has its whole path."""
    if len(checks) == 1:
        return [f"{checks[0].path}, {checks[0].predicted.layout.name}"]
    parts = [Path(each.path).parts for each in checks]
    shared = next((place for place, names in enumerate(zip(*parts, strict=False)) if len({*names}) > 1), 0)
    named = []
    for each, names in zip(checks, parts, strict=True):
        folders = names[shared:-1] if names[-1].endswith("_results") else names[shared:]
        named.append(", ".join([*folders, each.predicted.layout.name]))
    return named


def error(figure: Figure | None, measured: float) -> Value:
    return None if figure is None or not measured else percent(figure.value / measured)


def checks_chart(of: Sequence[Check]) -> Chart:
    """Every latency of every check with its interval, and at the run's own speed, against the measured one: exact on the diagonal.
    More checks than there are colours are told apart by their deployments only."""
    names = apart(of) if len(of) <= len(SPARE) else [each.predicted.layout.name for each in of]
    distinct = [*dict.fromkeys(names)]
    panels = []
    for title, at_own_speed in ((_("From its arrivals alone"), False), (_("At its own speed"), True)):
        drawn: list[Series] = []
        values: list[float] = []
        for name, shade in zip(distinct, shades(distinct), strict=True):
            pairs = [
                (each.measured[metric], prediction.figures[metric])
                for each, own in zip(of, names, strict=True)
                if own == name and (prediction := each.at_own_speed if at_own_speed else each.predicted)
                for metric in LATENCIES
                if metric in each.measured and metric in prediction.figures
            ]
            if not pairs:
                continue
            measured, figures = [value for value, _figure in pairs], [figure for _value, figure in pairs]
            predicted = [figure.value for figure in figures]
            drawn.append(interval_bars(measured, figures, shade))
            drawn.append(Series(kind="points", name=name, x=measured, y=predicted, shade=shade, size=6))
            values += [*measured, *predicted]
        low, high = (0.8 * min(values), 1.25 * max(values)) if values else (1.0, 10.0)
        exact = Series(x=[low, high], y=[low, high], shade=MUTED, width=1, dash="dot")
        x, y = (chart_types.log_axis(label, low, high) for label in (_("measured, ms"), _("predicted, ms")))
        series = [exact, *drawn] if drawn else []
        panels.append(Panel(title=title, series=series, x=x, y=y, not_measured=_("refused")))
    caption = _("p50, p90 and p99 of TTFT, TBT and E2E; exact on the dotted line; bars are 90 % intervals.")
    return Chart(key="checks", title=_("Predicted against measured"), panels=panels, caption=caption)


def seconds_chart(checks: Sequence[Check], predictions: Sequence[Prediction]) -> Chart:
    """The mean request's seconds, stacked: a panel per check, with what was measured where its servers told, and one of all predictions."""
    bars = {each.layout.name: each.seconds_ms for each in predictions}
    panels = [_parts("", bars)] if bars else []
    for check, name in zip(checks, apart(checks), strict=True):
        own = check.at_own_speed.seconds_ms if check.at_own_speed else {}
        of_check = {_("measured"): check.seconds_ms, _("predicted"): check.predicted.seconds_ms, _("own speed"): own}
        panels.append(_parts(name, of_check))
    panels = [panel for panel in panels if panel.series]
    caption = _("From sending to the last token. Compute: steps with the prompt, until its token is handed out.")
    caption = _("Predicted: {0}", _load(predictions[0])) + _(".") + " " + caption if predictions else caption
    caption += " " + _(BEST)
    if any(check.seconds_ms for check in checks):
        caption += " " + _("Compare way in and queue together: measured, the queue begins at the API server.")
    if not all(check.seconds_ms for check in checks):
        caption += " " + _("Without a measured bar: not measured, the run's servers did not log its prompts.")
    return Chart(key="seconds", title=_("One request's seconds"), panels=panels, caption=caption)


def _parts(title: str, bars: Mapping[str, Mapping[str, float]]) -> Panel:
    known = {name: parts for name, parts in bars.items() if parts}
    drawn = []
    for part in PARTS:
        if any(part in parts for parts in known.values()):
            values = [parts.get(part, 0.0) for parts in known.values()]
            words, phase = SECONDS.get(part, ("", part))
            name = _(words) if words else text.title(f"{part}_ms")
            drawn.append(Series(kind="hbar", name=name, x=values, y=[*known], shade=SHADES[phase]))
    longest = max((sum(parts.values()) for parts in known.values()), default=1.0)
    # The names of the parts stand at the right.
    x = Axis(label=_("mean of the requests, ms"), low=0, high=1.4 * longest)
    return Panel(title=title, series=drawn, x=x, y=Axis(names=[*known]))


def predictions_chart(of: Sequence[Prediction], *, on_gpus: bool) -> Chart:
    """Energy per token, TTFT p99, TBT p99 and the share within the SLO against the number of GPUs; refused ones are named below."""
    metrics = ("j_per_output_token", "ttft_p99_ms", "tbt_p99_ms", "slo_met_pct")
    panels = [_by_gpus(of, metric, on_gpus=on_gpus) for metric in metrics]
    refused = [each.layout.name for each in of if each.refusal]
    caption = _load(of[0]) + _(".") + " " + _("Bars are 90 % intervals.")
    caption += " " + _(GREEN) if any(each.verdict in ("met", "not met", "not decided") for each in of) else ""
    caption += " " + _("Refused: {0}.", ", ".join(refused)) if refused else ""
    panels = [panel for panel in panels if panel.series]
    return Chart(key="deployments", title=_("Predicted deployments"), panels=panels, caption=caption)


def search_chart(of: Search, *, on_gpus: bool) -> Chart:
    """Joules per token against GPUs: which deployments keep the SLO, which do not, of which nothing is known."""
    panel = _by_gpus(of.candidates, "j_per_output_token", on_gpus=on_gpus)
    caption = _load(of.candidates[0]) + _(".") + " " + _("Bars are 90 % intervals.") + " " + _(GREEN)
    if any(each.refusal and each.figures for each in of.candidates):
        caption += " " + _("Refused: where it would be, at costs that are guessed.")
    return Chart(key="search", title=_("Deployments near the cheapest"), panels=[panel], caption=caption)


def _by_gpus(of: Sequence[Prediction], metric: str, *, on_gpus: bool) -> Panel:
    """A figure of the deployments that have it, by their verdict; those of as many GPUs beside each other."""
    drawn, place = [], dict[str, float]()
    # The names of the deployments stand at the right.
    most = 1.2 * max((each.layout.gpus for each in of), default=1)
    for gpus in {each.layout.gpus for each in of}:
        alike = [each.layout.name for each in of if each.layout.gpus == gpus]
        apart = min(0.02 * most, 0.6 / len(alike))
        place |= {name: gpus + apart * (row - (len(alike) - 1) / 2) for row, name in enumerate(alike)}
    for verdict, (words, shade, marker) in VERDICTS.items():
        known = [each for each in of if each.verdict == verdict and metric in each.figures]
        if known:
            x, figures = [place[each.layout.name] for each in known], [each.figures[metric] for each in known]
            y, hollow = [figure.value for figure in figures], verdict == "refused"
            labels = [each.layout.name for each in known]
            drawn.append(interval_bars(x, figures, shade))
            drawn.append(
                Series(kind="points", name=_(words), x=x, y=y, shade=shade, marker=marker, hollow=hollow, size=8)
            )
            drawn.append(Series(x=x, y=y, labels=labels, shade=shade, width=0))
    x_axis = Axis(label=_("GPUs" if on_gpus else "instances"), low=0, high=most, integer=True)
    y_axis = Axis(label=text.label(metric), low=0, high=105 if metric == "slo_met_pct" else None)
    return Panel(title="", series=drawn, x=x_axis, y=y_axis)


def interval_bars(x: Sequence[float], figures: Sequence[Figure], shade: str) -> Series:
    """An upright bar at each `x` from its figure's low to its high."""
    at = [place for value in x for place in (value, value, np.nan)]
    ends = [end for figure in figures for end in (figure.low, figure.high, np.nan)]
    return Series(x=at, y=ends, shade=shade, width=2.5, opacity=0.45)
