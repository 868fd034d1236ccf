"""Charts of `pdbench plan`: predicted against measured, what steps cost, what deployments would do."""

from collections.abc import Mapping, Sequence

import numpy as np

from pdbench.plan.engine import Engine
from pdbench.plan.records import Calibration, Check, Figure, Prediction, Search
from pdbench.report import text
from pdbench.report.chart_types import BAD, FAINT, GOOD, GREY, MUTED, SHADES, Axis, Chart, Panel, Series, shades
from pdbench.report.plan_tables import deployment_name
from pdbench.report.text import translate as _

LATENCIES = tuple(f"{name}_{part}_ms" for name in ("ttft", "tbt", "e2e") for part in ("p50", "p90", "p99"))

SECONDS = {
    "way_in": "way in",
    "queue": "queue",
    "compute": "compute",
    "handoff": "handoff",
    "decode_wait": "decode's wait",
    "decode": "decode's steps",
}


def checks(of: Sequence[Check]) -> Chart:
    """Every latency of every check with its interval, and at the run's own speed, against the measured one: exact on the diagonal."""
    names = [f"{deployment_name(each.predicted.kind, each.predicted.instances)}: {each.path}" for each in of]
    drawn: tuple[list[Series], list[Series]] = ([], [])
    values: tuple[list[float], list[float]] = ([], [])
    for each, name, shade in zip(of, names, shades(names), strict=True):
        for place, prediction in enumerate((each.predicted, each.at_own_speed)):
            if prediction is None or not prediction.figures:
                continue
            known = [
                (each.measured[metric], prediction.figures[metric]) for metric in LATENCIES if metric in each.measured
            ]
            measured, figures = zip(*known, strict=True)
            drawn[place].append(_bars(measured, figures, shade))
            predicted = [figure.value for figure in figures]
            drawn[place].append(Series(kind="points", name=name, x=measured, y=predicted, shade=shade, size=6))
            values[place].extend([*measured, *predicted])
    panels = []
    for title, series, seen in zip((_("From its arrivals alone"), _("At its own speed")), drawn, values, strict=True):
        low, high = (0.8 * min(seen), 1.25 * max(seen)) if seen else (1.0, 10.0)
        exact = Series(x=[low, high], y=[low, high], shade=MUTED, width=1, dash="dot")
        label = _("measured, ms"), _("predicted, ms")
        places = [step * 10.0**power for power in range(-1, 6) for step in (1, 2, 5)]
        places = [place for place in places if low <= place <= high]
        ticks = places, [f"{place:g}" for place in places]
        panels.append(
            Panel(
                title=title,
                series=[exact, *series] if series else [],
                x=Axis(label=label[0], log=True, low=low, high=high, ticks=ticks),
                y=Axis(label=label[1], log=True, low=low, high=high, ticks=ticks),
                not_measured=_("refused"),
            )
        )
    caption = _("p50, p90 and p99 of TTFT, TBT and E2E; exact on the dotted line; bars are 90 % intervals.")
    return Chart(key="checks", title=_("Predicted against measured"), panels=panels, caption=caption)


def seconds(checks: Sequence[Check], predictions: Sequence[Prediction]) -> Chart:
    """The mean request's seconds, stacked: a panel per check, with what was measured where its servers told, and one of all predictions."""
    bars = {deployment_name(each.kind, each.instances): each.seconds_ms for each in predictions}
    panels = [_parts("", bars)] if bars else []
    for check in checks:
        own = check.at_own_speed.seconds_ms if check.at_own_speed else {}
        of_check = {_("measured"): check.seconds_ms, _("predicted"): check.predicted.seconds_ms, _("own speed"): own}
        name = deployment_name(check.predicted.kind, check.predicted.instances)
        panels.append(_parts(f"{name}: {check.path}", of_check))
    caption = _("From sending to the last token. Compute: steps with the prompt, until its token is handed out.")
    if not all(check.seconds_ms for check in checks):
        caption += " " + _("Without a measured bar: not measured, the run's servers did not log its prompts.")
    return Chart(
        key="seconds",
        title=_("One request's seconds"),
        panels=[panel for panel in panels if panel.series],
        caption=caption,
    )


def _parts(title: str, bars: Mapping[str, Mapping[str, float]]) -> Panel:
    known = {name: parts for name, parts in bars.items() if parts}
    drawn = []
    for part, words in SECONDS.items():
        if any(part in parts for parts in known.values()):
            values = [parts.get(part, 0.0) for parts in known.values()]
            shade = SHADES[{"decode": "decode_step", "way_in": "send"}.get(part, part)]
            drawn.append(Series(kind="hbar", name=_(words), x=values, y=[*known], shade=shade))
    longest = max((sum(parts.values()) for parts in known.values()), default=1.0)
    x = Axis(
        label=_("mean of the requests, ms"), low=0, high=1.4 * longest
    )  # the names of the parts stand at the right
    return Panel(title=title, series=drawn, x=x, y=Axis(names=[*known]))


def steps(found: Calibration) -> Chart:
    """GPU time of decode steps against their sequences, and a prompt's step against its tokens, with what the runs reached shaded."""
    panels = []
    for name, role in found.roles.items():
        engine, box = role.engine, role.engine.box
        assert box is not None
        if name != "prefill":
            context = box.context_tokens / max(box.sequences, 1)
            n = list(range(1, 2 * box.sequences + 1))
            took = [1e3 * (engine.gpu_decode_s(k) + engine.costs.gpu_per_context_token_s * context * k) for k in n]
            sizes = Axis(label=_("sequences in the step"), low=0, integer=True)
            panels.append(_reached(_("{0}: a decode step", _(name)), n, took, box.sequences, sizes))
        if role.noise:
            p = np.linspace(1, 2 * box.prompt_tokens, 60).tolist()
            took = [1e3 * _prompt_step_s(engine, count) for count in p]
            tokens = Axis(label=_("prompt tokens in the step"), low=0)
            panels.append(_reached(_("{0}: a step with prompts", _(name)), p, took, box.prompt_tokens, tokens))
    caption = _("What one step takes. Shaded: what the runs reached; beyond it a prediction is refused.")
    return Chart(key="steps", title=_("Calibrated steps"), panels=panels, caption=caption)


def deployments(of: Sequence[Prediction], *, on_gpus: bool) -> Chart:
    """Energy per token, TTFT p99 and TBT p99 against the number of GPUs; refused ones are named below."""
    panels = []
    limited = any("slo_met_pct" in each.figures for each in of)
    for metric in ("j_per_output_token", "ttft_p99_ms", "tbt_p99_ms", "slo_met_pct"):
        drawn = []
        for each in of:
            if metric not in each.figures:
                continue
            met = each.figures.get("slo_met_pct")
            shade = GREY if not limited else GOOD if met and met.value >= 99 else BAD
            gpus = float(sum(each.instances.values()))
            drawn.append(_bars([gpus], [each.figures[metric]], shade))
            label = deployment_name(each.kind, each.instances)
            drawn.append(Series(x=[gpus], y=[each.figures[metric].value], labels=[label], shade=shade, marker="o"))
        if drawn:
            panels.append(
                Panel(
                    title="",
                    series=drawn,
                    x=Axis(label=_("GPUs" if on_gpus else "instances"), low=0, integer=True),
                    y=Axis(label=text.label(metric), low=0, high=105 if metric == "slo_met_pct" else None),
                )
            )
    refused = [deployment_name(each.kind, each.instances) for each in of if each.refusal]
    caption = _("Bars are 90 % intervals.") + (
        " " + _("Green: 99 % of the requests within the SLO.") if limited else ""
    )
    caption += " " + _("Refused: {0}.", ", ".join(refused)) if refused else ""
    return Chart(key="deployments", title=_("Predicted: {0}", of[0].load), panels=panels, caption=caption)


def search(of: Search, *, on_gpus: bool) -> Chart:
    """Joules per token against GPUs: which deployments keep the SLO, which do not, of which nothing is known."""
    groups = (
        (_("keeps the SLO"), GOOD, "o", False, [each for each in of.candidates if each.met]),
        (_("does not"), BAD, "x", False, [each for each in of.candidates if not each.met and not each.refusal]),
        (_("refused"), GREY, "o", True, [each for each in of.candidates if each.refusal]),
    )
    drawn = []
    points: list[tuple[float, float, str]] = []
    for name, shade, marker, hollow, candidates in groups:
        known = [each for each in candidates if each.j_per_output_token]
        if not known:
            continue
        gpus = [float(each.gpus) for each in known]
        figures = [
            Figure(float(np.mean(joules)), min(joules), max(joules))
            for joules in (each.j_per_output_token for each in known)
        ]
        drawn.append(_bars(gpus, figures, shade))
        values = [figure.value for figure in figures]
        drawn.append(
            Series(kind="points", name=name, x=gpus, y=values, shade=shade, marker=marker, hollow=hollow, size=9)
        )
        points += zip(gpus, values, (deployment_name(each.kind, each.instances) for each in known), strict=True)
    named: list[tuple[float, float, str]] = []
    for gpus_here, value, name in sorted(points):  # one label for points that nearly coincide
        if named and gpus_here == named[-1][0] and value - named[-1][1] < 0.05 * max(point[1] for point in points):
            named[-1] = gpus_here, named[-1][1], f"{named[-1][2]}, {name}"
        else:
            named.append((gpus_here, value, f" {name}"))
    if named:
        x, y, labels = zip(*named, strict=True)
        drawn.append(Series(x=x, y=y, labels=labels, shade=MUTED, width=0))
    counted = _("GPUs" if on_gpus else "instances")
    panel = Panel(
        title="",
        series=drawn,
        x=Axis(label=counted, low=0, high=1.15 * max([point[0] for point in points], default=1.0), integer=True),
        y=Axis(label=text.label("j_per_output_token"), low=0),
    )
    caption = _("Bars: from the least to the most of several loads.")
    return Chart(key="search", title=_("Deployments near the cheapest"), panels=[panel], caption=caption)


def _bars(x: Sequence[float], figures: Sequence[Figure], shade: str) -> Series:
    """Upright intervals."""
    at = [place for value in x for place in (value, value, np.nan)]
    ends = [
        end
        for f in figures
        for end in (f.value if f.low is None else f.low, f.value if f.high is None else f.high, np.nan)
    ]
    return Series(x=at, y=ends, shade=shade, width=2.5, opacity=0.45)


def _reached(title: str, x: Sequence[float], took_ms: Sequence[float], reached: float, axis: Axis) -> Panel:
    high = 1.1 * max(took_ms)
    shaded = Series(kind="area", x=[0, reached], y=[high, high], shade=FAINT, opacity=0.6)
    line = Series(x=x, y=took_ms, shade=shades(["decode"])[0], width=2)
    return Panel(title=title, series=[shaded, line], x=axis, y=Axis(label="ms", low=0, high=high))


def _prompt_step_s(engine: Engine, tokens: float) -> float:
    costs = engine.costs
    host = costs.host_prefill_s + costs.host_per_prompt_token_s * tokens
    return max(host, costs.gpu_prefill_s + costs.gpu_per_prompt_token_s * tokens)
