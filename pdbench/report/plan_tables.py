"""Calibrations, predictions and checks as tables."""

from collections.abc import Sequence

from pdbench.plan.engine import Role
from pdbench.plan.records import Calibration, Check, Figure, Prediction, Search
from pdbench.report import text
from pdbench.report.tables import Table, Value
from pdbench.report.text import translate as _

FIGURES = (
    "ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p90_ms", "tbt_p99_ms", "e2e_p50_ms", "e2e_p90_ms", "e2e_p99_ms",
    "output_tokens_per_s", "goodput_requests_per_s", "slo_met_pct", "mean_power_w", "prefill_power_w", "decode_power_w",
    "j_per_output_token", "j_per_good_request",
)  # fmt: skip
OVERVIEW = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "j_per_output_token")
TITLES = {
    "prefill_power_w": "Power of prefill, W",
    "decode_power_w": "Power of decode, W",
}


def deployment_name(kind: str, instances: dict[Role, int]) -> str:
    """As --deployment takes it."""
    if kind == "disaggregated":
        return f"{instances['prefill']}p{instances['decode']}d"
    return kind if kind == "single" else f"{kind}:{instances['replica']}"


def calibration(found: Calibration) -> Table:
    """What a step costs in each role, what the runs reached, how the machine drifted."""
    rows: list[list[Value]] = []
    names = list(found.roles)

    def row(title: str, values: Sequence[Value]) -> None:
        rows.append([title, *values])

    roles = list(found.roles.values())
    costs = [role.engine.costs for role in roles]
    computes = [bool(role.noise) for role in roles]  # decode computes no prompts
    decodes = [name != "prefill" for name in names]
    per_1000 = 1e6
    row(
        _("a prompt's step, host, ms"),
        [1e3 * c.host_prefill_s if p else None for c, p in zip(costs, computes, strict=True)],
    )
    for title, cost in (
        (_("and per 1,000 prompt tokens, host, ms"), "host_per_prompt_token_s"),
        (_("per 1,000 prompt tokens, GPU, ms"), "gpu_per_prompt_token_s"),
    ):
        values = [
            (per_1000 * getattr(c, cost) if role.knows_lengths else _("not known")) if p else None
            for c, p, role in zip(costs, computes, roles, strict=True)
        ]
        row(title, values)
    for title, pick in ((_("a decode step of 1 sequence, ms"), min), (_("and of the most sequences, ms"), max)):
        row(title, [1e3 * pick(c.gpu_decode_s.values()) if d else None for c, d in zip(costs, decodes, strict=True)])
    row(_("on the way in, ms"), [1e3 * c.ingress_s if p else None for c, p in zip(costs, computes, strict=True)])
    boxes = [role.engine.box for role in roles]
    row(
        _("most prompt tokens in a step"),
        [b.prompt_tokens if b and p else None for b, p in zip(boxes, computes, strict=True)],
    )
    row(_("most sequences in a step"), [b.sequences if b and d else None for b, d in zip(boxes, decodes, strict=True)])
    row(_("prompt lengths"), [f"{role.prompt_lengths[0]:,}-{role.prompt_lengths[1]:,}" for role in roles])
    row(_("trials"), [len(role.speeds) if p else None for role, p in zip(roles, computes, strict=True)])
    row(
        _("slowest trial over fastest"),
        [max(role.speeds) / min(role.speeds) if p else None for role, p in zip(roles, computes, strict=True)],
    )
    row(_("power at idle, W"), [role.power.idle_w if role.power else None for role in roles])
    row(
        _("decoding, W"),
        [role.power.decode_w if role.power and d else None for role, d in zip(roles, decodes, strict=True)],
    )
    row(
        _("per prompt token, J"),
        [role.power.prompt_token_j if role.power and p else None for role, p in zip(roles, computes, strict=True)],
    )
    notes = sorted({note for role in roles for note in role.assumed})
    lines = [_("Assumed: {0}", "; ".join(notes))] if notes else []
    if found.handoff_s is not None:
        lines.append(
            _(
                "Handoff from prefill to decode: {0} ms + {1} ms per 1,000 prompt tokens",
                text.number(1e3 * found.handoff_s),
                text.number(per_1000 * found.handoff_per_token_s),
            )
        )
    lines += [_("Missing: {0}", reason) for reason in found.missing]
    return Table(title=_("Calibrated"), header=["", *map(_, names)], rows=rows, note="\n\n".join(lines))


def predictions(of: Sequence[Prediction]) -> Table:
    """Figures with their intervals, a column per deployment; a refused one has its reason below."""
    rows: list[list[Value]] = [
        [figure_title(name), *(_with_interval(each.figures.get(name)) for each in of)]
        for name in FIGURES
        if any(name in each.figures for each in of)
    ]
    lines = []
    for each in of:
        name = deployment_name(each.kind, each.instances)
        if each.refusal:
            lines.append(_("{0}: refused: {1}", name, each.refusal))
        if each.saturated:
            lines.append(
                _("{0}: the queue grows: it cannot keep up, and its times depend on how long the load lasts", name)
            )
    lines.append(
        _("In brackets: 90 % intervals; costs, the machine's speed from trial to trial and arrivals vary in them.")
    )
    header = [
        "",
        *(f"{deployment_name(each.kind, each.instances)} ({sum(each.instances.values())} GPU)" for each in of),
    ]
    title = _("Predicted: {0}", of[0].load)
    if not rows:
        return Table(title=title, note="\n".join(lines[:-1]))
    return Table(title=title, header=header, rows=rows, note="\n\n".join(lines))


def search(of: Search) -> Table:
    """Every deployment that was tried near the best, the cheapest first; a reason for each that is refused."""
    rows: list[list[Value]] = []
    styles, lines = [], []
    for place, each in enumerate(of.candidates):
        name = deployment_name(each.kind, each.instances)
        if each.refusal:
            verdict = _("refused")
            lines.append(_("{0}: refused: {1}", name, each.refusal))
        elif each.met:
            verdict = _("cheapest") if not place else _("tie") if each.tie else _("met")
        else:
            verdict = _("not met")
        figures = (each.met_pct, each.ttft_p99_ms, each.tbt_p99_ms, each.j_per_output_token)
        rows.append([name, each.gpus, verdict, *map(_over_loads, figures)])
        styles.append("better" if each.met and not place else "" if each.met else "worse")
    limits = [
        f"{title} {limit:g} ms"
        for title, limit in ((_("TTFT"), of.slo_ttft_ms), (_("mean TBT"), of.slo_tbt_ms))
        if limit
    ]
    if not of.candidates or not of.candidates[0].met:
        lines.insert(
            0,
            _(
                "No deployment of at most {0} GPUs keeps the SLO in steps that the runs have reached.",
                f"{of.most_gpus:,}",
            ),
        )
    lines.append(
        _(
            "{0} simulations of {1} requests; with several loads: mean (least-most).",
            f"{of.simulations:,}",
            f"{of.requests:,}",
        )
    )
    return Table(
        title=_("Search: 99 % of requests within {0}", ", ".join(limits)),
        header=[
            "",
            _("GPUs"),
            "",
            *(text.label(name) for name in ("slo_met_pct", "ttft_p99_ms", "tbt_p99_ms", "j_per_output_token")),
        ],
        rows=rows,
        styles=styles,
        note="\n\n".join(lines),
    )


def _over_loads(values: Sequence[float]) -> Value:
    if len(values) < 2:
        return values[0] if values else None
    mean = sum(values) / len(values)
    return f"{text.number(mean)} ({text.number(min(values))}-{text.number(max(values))})"


def figure_title(name: str) -> str:
    return _(TITLES[name]) if name in TITLES else text.label(name)


def _with_interval(figure: Figure | None) -> Value:
    if figure is None:
        return None
    if figure.low is None or figure.high is None:
        return figure.value
    return f"{text.number(figure.value)} ({text.number(figure.low)}-{text.number(figure.high)})"


def check(of: Check) -> Table:
    """Predicted beside measured. The error is predicted over measured - 1; a value outside its interval is marked."""
    rows: list[list[Value]] = []
    styles = []
    for name in FIGURES:
        figure = of.predicted.figures.get(name)
        if (
            name not in of.measured or figure is None or name == "output_tokens_per_s"
        ):  # at a given rate that is the load's
            continue
        measured = of.measured[name]
        own = of.at_own_speed.figures[name] if of.at_own_speed else None
        inside = figure.low is not None and figure.high is not None and figure.low <= measured <= figure.high
        low, high = of.trials.get(name, (measured, measured))
        rows.append([
            text.label(name),
            f"{text.number(measured)} ({text.number(low)}-{text.number(high)})",
            _with_interval(figure),
            _("yes") if inside else _("no"),
            error(figure, measured),
            error(own, measured),
        ])  # fmt: skip
        styles.append("" if inside else "worse")
    name = deployment_name(of.predicted.kind, of.predicted.instances)
    lines = [_("Measured: all trials together, and the trials' least and most.")] if rows else []
    lines += (
        [_("At its own speed: with the speed of its own prefill steps known; what is left is the model's error.")]
        if rows
        else []
    )
    if not of.held_out:
        lines.append(_("This run calibrated the costs: its errors are smaller than another run's."))
    if of.differs:
        lines.append(_("It differs from the runs that calibrated in: {0}", ", ".join(of.differs)))
    if of.predicted.refusal:
        lines.append(_("As a prediction it would be refused: {0}", of.predicted.refusal))
    header = ["", _("measured"), _("predicted"), _("in the interval"), _("error"), _("error at its own speed")]
    return Table(
        title=_("Check: {0}, {1}", of.path, name), header=header, rows=rows, styles=styles, note="\n\n".join(lines)
    )


def overview(of: Sequence[Check]) -> Table:
    """Several checks, a row each: how far off from arrivals alone, and at the run's own speed."""
    rows: list[list[Value]] = []
    for each in of:
        known = {
            name: figure for name, figure in each.predicted.figures.items() if name in each.measured and name in FIGURES
        }
        known.pop("output_tokens_per_s", None)  # at a given rate that is the load's
        inside = sum(
            figure.low is not None and figure.high is not None and figure.low <= each.measured[name] <= figure.high
            for name, figure in known.items()
        )
        errors: list[Value] = []
        for name in OVERVIEW:
            if name in known:
                own = each.at_own_speed.figures.get(name) if each.at_own_speed else None
                blind, own_words = error(known[name], each.measured[name]), error(own, each.measured[name])
                errors.append(f"{blind} ({own_words or '–'})")
            else:
                errors.append(None)
        name = deployment_name(each.predicted.kind, each.predicted.instances)
        verdict = _("refused") if each.predicted.refusal else ""
        rows.append([
            f"{each.path}, {name}",
            _("yes") if each.held_out else _("no"),
            verdict,
            _("{0} of {1}", inside, len(known)),
            *errors,
        ])  # fmt: skip
    header = ["", _("held out"), "", _("in the interval"), *(text.label(name) for name in OVERVIEW)]
    note = _("Error of the prediction from arrivals alone, and in brackets at the run's own speed.")
    return Table(title=_("Checks"), header=header, rows=rows, note=note)


def error(figure: Figure | None, measured: float) -> Value:
    return None if figure is None or not measured else f"{100 * (figure.value / measured - 1):+.1f} %"
