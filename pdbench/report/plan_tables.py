"""Calibrations, predictions and checks as tables."""

from collections.abc import Callable, Sequence

from pdbench.plan.engine import Role
from pdbench.plan.records import Calibration, Check, Figure, Prediction, RoleCalibration, Search
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

    def per_token(cost: str) -> Callable[[RoleCalibration], Value]:
        return lambda role: 1e6 * getattr(role.engine.costs, cost) if role.knows_lengths else _("not known")

    def everywhere(name: str, role: RoleCalibration) -> bool:
        return True

    def computes(name: str, role: RoleCalibration) -> bool:
        return bool(role.noise)  # decode computes no prompts

    def decodes(name: str, role: RoleCalibration) -> bool:
        return name != "prefill"

    described: list[tuple[str, Callable[[str, RoleCalibration], bool], Callable[[RoleCalibration], Value]]] = [
        (_("a prompt's step, host, ms"), computes, lambda role: 1e3 * role.engine.costs.host_prefill_s),
        (_("and per 1,000 prompt tokens, host, ms"), computes, per_token("host_per_prompt_token_s")),
        (_("per 1,000 prompt tokens, GPU, ms"), computes, per_token("gpu_per_prompt_token_s")),
        (
            _("a decode step of 1 sequence, ms"),
            decodes,
            lambda role: 1e3 * min(role.engine.costs.gpu_decode_s.values()),
        ),
        (_("and of the most sequences, ms"), decodes, lambda role: 1e3 * max(role.engine.costs.gpu_decode_s.values())),
        (_("on the way in, ms"), computes, lambda role: 1e3 * role.engine.costs.ingress_s),
        (
            _("most prompt tokens in a step"),
            computes,
            lambda role: role.engine.box.prompt_tokens if role.engine.box else None,
        ),
        (_("most sequences in a step"), decodes, lambda role: role.engine.box.sequences if role.engine.box else None),
        (_("prompt lengths"), everywhere, lambda role: "{:,}-{:,}".format(*role.prompt_lengths)),
        (_("trials"), computes, lambda role: len(role.speeds)),
        (_("slowest trial over fastest"), computes, lambda role: max(role.speeds) / min(role.speeds)),
        (_("power at idle, W"), everywhere, lambda role: role.power.idle_w if role.power else None),
        (_("decoding, W"), decodes, lambda role: role.power.decode_w if role.power else None),
        (_("per prompt token, J"), computes, lambda role: role.power.prompt_token_j if role.power else None),
    ]
    rows = [
        [title, *(value(role) if of(name, role) else None for name, role in found.roles.items())]
        for title, of, value in described
    ]
    notes = sorted({note for role in found.roles.values() for note in role.assumed})
    lines = [_("Assumed: {0}", "; ".join(notes))] if notes else []
    if found.handoff_s is not None:
        words = "Handoff from prefill to decode: {0} ms + {1} ms per 1,000 prompt tokens"
        lines.append(_(words, text.number(1e3 * found.handoff_s), text.number(1e6 * found.handoff_per_token_s)))
    lines += [_("Missing: {0}", reason) for reason in found.missing]
    return Table(title=_("Calibrated"), header=["", *map(_, found.roles)], rows=rows, note="\n\n".join(lines))


def predictions(of: Sequence[Prediction], *, on_gpus: bool) -> Table:
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
            words = "{0}: the queue grows: it cannot keep up, and its times depend on how long the load lasts"
            lines.append(_(words, name))
    lines.append(
        _("In brackets: 90 % intervals; costs, the machine's speed from trial to trial and arrivals vary in them.")
    )
    one, several = ("{0} (1 GPU)", "{0} ({1} GPUs)") if on_gpus else ("{0} (1 instance)", "{0} ({1} instances)")
    names = (
        _(one if count == 1 else several, deployment_name(each.kind, each.instances), count)
        for each in of
        for count in [sum(each.instances.values())]
    )
    title, header = _("Predicted: {0}", of[0].load), ["", *names]
    if not rows:
        return Table(title=title, note="\n".join(lines[:-1]))
    return Table(title=title, header=header, rows=rows, note="\n\n".join(lines))


def search(of: Search, *, on_gpus: bool) -> Table:
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
    slo = ((_("TTFT"), of.slo_ttft_ms), (_("mean TBT"), of.slo_tbt_ms))
    limits = ", ".join(f"{title} {limit:g} ms" for title, limit in slo if limit)
    if not of.candidates or not of.candidates[0].met:
        words = "No deployment of at most {0} GPUs keeps the SLO in steps that the runs have reached."
        words = words if on_gpus else words.replace("GPUs", "instances")
        lines.insert(0, _(words, f"{of.most_gpus:,}"))
    words = "{0} simulations of {1} requests; with several loads: mean (least-most)."
    lines.append(_(words, f"{of.simulations:,}", f"{of.requests:,}"))
    labels = map(text.label, ("slo_met_pct", "ttft_p99_ms", "tbt_p99_ms", "j_per_output_token"))
    header, title = (
        ["", _("GPUs" if on_gpus else "instances"), "", *labels],
        _("Search: 99 % of requests within {0}", limits),
    )
    return Table(title=title, header=header, rows=rows, styles=styles, note="\n\n".join(lines))


def _bounded(value: float, low: float, high: float) -> str:
    return f"{text.number(value)} ({text.number(low)}-{text.number(high)})"


def _over_loads(values: Sequence[float]) -> Value:
    if len(values) < 2:
        return values[0] if values else None
    return _bounded(sum(values) / len(values), min(values), max(values))


def figure_title(name: str) -> str:
    return _(TITLES[name]) if name in TITLES else text.label(name)


def _with_interval(figure: Figure | None) -> Value:
    if figure is None:
        return None
    if figure.low is None or figure.high is None:
        return figure.value
    return _bounded(figure.value, figure.low, figure.high)


def _is_inside(figure: Figure, measured: float) -> bool:
    return figure.low is not None and figure.high is not None and figure.low <= measured <= figure.high


def _compared(of: Check) -> dict[str, tuple[Figure, float, Figure | None]]:
    """Figure -> as predicted, as measured, as predicted at the run's own speed; without the throughput, which is the load's."""
    own = of.at_own_speed.figures if of.at_own_speed else {}
    return {
        name: (of.predicted.figures[name], of.measured[name], own.get(name))
        for name in FIGURES
        if name in of.measured and name in of.predicted.figures and name != "output_tokens_per_s"
    }


def check(of: Check) -> Table:
    """Predicted beside measured. The error is predicted over measured - 1; a value outside its interval is marked."""
    rows: list[list[Value]] = []
    styles = []
    for name, (figure, measured, own) in _compared(of).items():
        inside = _is_inside(figure, measured)
        words = _bounded(measured, *of.trials.get(name, (measured, measured)))
        errors = error(figure, measured), error(own, measured)
        rows.append([text.label(name), words, _with_interval(figure), _("yes") if inside else _("no"), *errors])
        styles.append("" if inside else "worse")
    name = deployment_name(of.predicted.kind, of.predicted.instances)
    lines = []
    if rows:
        lines.append(_("Measured: all trials together, and the trials' least and most."))
        lines.append(
            _("At its own speed: with the speed of its own prefill steps known; what is left is the model's error.")
        )
    if not of.held_out:
        lines.append(_("This run calibrated the costs: its errors are smaller than another run's."))
    if of.differs:
        lines.append(_("It differs from the runs that calibrated in: {0}", ", ".join(of.differs)))
    if of.predicted.refusal:
        lines.append(_("As a prediction it would be refused: {0}", of.predicted.refusal))
    header = ["", _("measured"), _("predicted"), _("in the interval"), _("error"), _("error at its own speed")]
    title = _("Check: {0}, {1}", of.path, name)
    return Table(title=title, header=header, rows=rows, styles=styles, note="\n\n".join(lines))


def overview(of: Sequence[Check]) -> Table:
    """Several checks, a row each: how far off from arrivals alone, and at the run's own speed."""
    rows: list[list[Value]] = []
    for each in of:
        compared = _compared(each)
        inside = sum(_is_inside(figure, measured) for figure, measured, _own in compared.values())
        errors: list[Value] = []
        for name in OVERVIEW:
            figure, measured, own = compared.get(name, (None, 0.0, None))
            errors.append(f"{error(figure, measured)} ({error(own, measured) or '–'})" if figure else None)
        name = f"{each.path}, {deployment_name(each.predicted.kind, each.predicted.instances)}"
        verdict = _("refused") if each.predicted.refusal else ""
        held_out = _("yes") if each.held_out else _("no")
        rows.append([name, held_out, verdict, _("{0} of {1}", inside, len(compared)), *errors])
    header = ["", _("held out"), "", _("in the interval"), *(text.label(name) for name in OVERVIEW)]
    note = _("Error of the prediction from arrivals alone, and in brackets at the run's own speed.")
    return Table(title=_("Checks"), header=header, rows=rows, note=note)


def error(figure: Figure | None, measured: float) -> Value:
    return None if figure is None or not measured else f"{100 * (figure.value / measured - 1):+.1f} %"
