"""Every table described once, as rows of values, and rendered for the terminal, Markdown and CSV; `page` renders HTML."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import msgspec
import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from pdbench.analysis.compare import Comparison
from pdbench.analysis.energy import RoleEnergy
from pdbench.analysis.metrics import PHASES, Array, Spread
from pdbench.analysis.run_analysis import Range, RunAnalysis
from pdbench.errors import UserError
from pdbench.report import text
from pdbench.report.text import translate as _

Value = str | int | float | None
STYLES = {"better": "green", "worse": "red", "unclear": "dim", "unjudged": "dim"}
LATENCIES = ("ttft_ms", "tbt_ms", "e2e_ms")
SIDE_BY_SIDE = (
    "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "e2e_p50_ms", "output_tokens_per_s", "j_per_output_token",
)  # fmt: skip
ENERGY = (
    "j_per_computed_prompt_token", "j_per_output_token", "decode_j_per_output_token", "j_per_request", "output_tokens_per_j",
    "energy_delay_js", "goodput_per_w", "kv_gb", "kv_j", "price_per_million_output_tokens", "gco2_per_million_output_tokens",
)  # fmt: skip
MERGED_PCT = 5.0
"""Above this share of gaps of 0 ms, p50 of TBT looks better and p99 worse than the engine made them."""
REQUEST_COLUMNS = (
    "deployment", "id", "trial", "sent_s", "end_s", "ttft_ms", "mean_tbt_ms", "e2e_ms", "send_delay_ms",
    "prompt_tokens", "output_tokens", *(f"{name}_ms" for name in PHASES), "error", "finish_reason",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Title, header, rows of values (None: not measured), columns that hold words, a style per row, a note below.

    Styles are verdicts (better, worse, same, unclear, unjudged) or empty. Without rows the note is all there is to say.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Value]] = ()
    left: Sequence[int] = (0,)
    styles: Sequence[str] = ()
    note: str = ""
    missing: str = "–"

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[text.number(value, self.missing) for value in row] for row in self.rows]


def terminal(table: Table) -> Group:
    """Title above and note below as wide as the terminal, not as the table."""
    if not table.rows:
        return Group(Text(f"{table.title}: {table.note}", style="dim"))
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if place in table.left else "right", overflow="fold")
    for row, style in zip(table.cells, table.styles or [""] * len(table.rows), strict=True):
        shown.add_row(*map(escape, row), style=STYLES.get(style, ""))
    return Group(Text(table.title, style="bold"), shown, *([Text(table.note, style="dim")] if table.note else []))


def markdown(table: Table) -> str:
    """As GitHub Markdown, the title as a heading."""
    sides = ["---" if place in table.left else "---:" for place in range(len(table.header))]
    lines = [table.header, sides, *table.cells] if table.rows else []
    cells = ["| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) + " |" for row in lines]
    return "\n\n".join(filter(None, (f"## {table.title}", "\n".join(cells), table.note)))


def csv_text(table: Table) -> str:
    """With full precision; an empty cell was not measured."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue()


def requests_csv(analysis: RunAnalysis) -> str:
    """Rows of `REQUEST_COLUMNS`, one per measured request (no warm-up); an empty cell was not measured."""
    requests, out = analysis.requests, io.StringIO()
    instants = (
        requests.sent_s,
        requests.end_s,
        requests.ttft_ms,
        requests.mean_tbt_ms,
        requests.e2e_ms,
        requests.send_delay_ms,
    )
    columns = [
        [analysis.name] * len(requests.id),
        requests.id,
        requests.trial.tolist(),
        *map(_csv_cells, instants),
        *(
            [cell.removesuffix(".0") for cell in _csv_cells(c)]
            for c in (requests.prompt_tokens, requests.output_tokens)
        ),
        *(_csv_cells(requests.phase_ms[name]) for name in PHASES),
        [error or "" for error in requests.error],
        [reason or "" for reason in requests.finish_reason],
    ]
    csv.writer(out, lineterminator="\n").writerows(zip(*columns, strict=True))
    return out.getvalue()


def _csv_cells(column: Array) -> list[str]:
    # msgspec writes decimals several times faster than `repr`; NaN is its null.
    cells = msgspec.json.encode(np.round(column, 6).tolist()).decode()[1:-1]
    return cells.replace("null", "").split(",") if len(column) else []


def times(analysis: RunAnalysis) -> Table:
    """Every time of one run with mean, p50, p90 and p99; phases where they were reported."""
    metrics = [*LATENCIES, *(f"{name}_ms" for name in PHASES if getattr(analysis.summary, f"{name}_ms"))]
    rows: list[list[Value]] = []
    for metric in metrics:
        name = _("TBT, every gap") if metric == "tbt_ms" else text.title(metric)
        rows.append([name, *_figures(getattr(analysis.summary, metric), "mean", "p50", "p90", "p99")])
    return Table(title=_("Times, ms"), header=["", _("mean"), "p50", "p90", "p99"], rows=rows)


def _figures(spread: Spread | Range | None, *names: str) -> list[Value]:
    return [None if spread is None else getattr(spread, name) for name in names]


def run_summary(analysis: RunAnalysis) -> list[Table]:
    """One run for the terminal: times and counts, energy, devices."""
    requests, known = analysis.summary.requests, times(analysis)
    counts: dict[str, Value] = {_("requests succeeded / sent"): f"{requests.succeeded} / {requests.sent}"}
    counts[text.label("output_tokens_per_s")] = text.value(analysis, "output_tokens_per_s")
    if (merged_pct := text.value(analysis, "merged_pct") or 0.0) >= MERGED_PCT:
        counts[text.label("merged_pct")] = merged_pct
    rows = [*known.rows, *([name, value, "", "", ""] for name, value in counts.items())]
    title = f"{analysis.name}: {text.loads([analysis], [analysis.name])}"
    first = replace(known, title=title, header=[_("milliseconds"), *known.header[1:]], rows=rows)
    return [first, *energy([analysis], [analysis.name]), *([devices(analysis)] if analysis.summary.devices else [])]


def windows(analysis: RunAnalysis) -> Table:
    """Throughput, energy per token, and each device's power or use over the measured windows."""
    figures = {
        metric: text.value(analysis, metric) for metric in ("output_tokens_per_s", "requests_per_s", *ENERGY[:3])
    }
    rows: list[list[Value]] = [
        [text.label(metric), value, "", "", ""]
        for metric, value in figures.items()
        if value is not None or metric not in ENERGY
    ]
    for name, device in list(analysis.summary.devices.items())[:5]:
        shown = ("power_w", "gpu_utilization_pct", "cpu_utilization_pct")
        field = next((key for key in shown if key in device.readings), "cpu_utilization_pct")
        spread, joules = device.readings.get(field), device.energy.energy_j
        label = f"{device.role or name}, {text.unit(field)}"
        total = None if joules is None else f"{text.number(joules)} J"
        rows.append([label, *_figures(spread, "mean", "min", "max"), total])
    header = ["", _("mean"), _("min"), _("max"), _("energy")]
    return Table(title=_("Throughput and devices, over the measured windows"), header=header, rows=rows)


def devices(analysis: RunAnalysis) -> Table:
    """Means of one run's devices over the measured windows, and their energy."""
    groups = (
        ("power_w",),
        ("gpu_utilization_pct", "cpu_utilization_pct"),
        ("sm_clock_mhz", "cpu_clock_mhz"),
        ("temperature_c",),
    )
    rows: list[list[Value]] = []
    for name, device in analysis.summary.devices.items():
        found = [next((device.readings[f].mean for f in group if f in device.readings), None) for group in groups]
        rows.append([name, device.role or "", *found, device.energy.energy_j])
    header = [_("device"), _("role"), _("power, W"), _("use, %"), _("clock, MHz"), "°C", _("energy, J")]
    return Table(title=_("Devices over the measured windows"), header=header, rows=rows, left=(0, 1))


def comparison(compared: Comparison) -> Table:
    """A row per metric: both figures and the verdict in words."""
    change = _("change seen; one trial, no interval") if compared.one_trial else _("change, 95 % interval")
    return Table(
        title=text.against(compared.names),
        header=[_("metric"), *compared.names, change],
        rows=[[text.label(line.metric.name), line.a, line.b, text.verdict(line)] for line in compared.differences],
        left=(0, 3),
        styles=[line.verdict for line in compared.differences],
        note=text.advice(compared),
    )


def side_by_side(analyses: Sequence[RunAnalysis], names: Sequence[str], sort_by: str | None = None) -> Table:
    """A row per run, best first by `sort_by` (of `SIDE_BY_SIDE`), those without it last."""
    if sort_by is not None and sort_by not in SIDE_BY_SIDE:
        raise UserError(f"--sort-by {sort_by}: choose from {', '.join(SIDE_BY_SIDE)}", exit_code=2)
    runs = list(zip(names, analyses, strict=True))
    if sort_by is not None:
        sign = 1 if sort_by.endswith("_ms") or sort_by == "j_per_output_token" else -1
        runs.sort(key=lambda run: sign * (text.value(run[1], sort_by) or sign * inf))
    rows = [[name, text.model(run), *(text.value(run, metric) for metric in SIDE_BY_SIDE)] for name, run in runs]
    header = [_("run"), _("model"), *map(text.label, SIDE_BY_SIDE)]
    return Table(title=_("Side by side"), header=header, rows=rows, left=(0, 1))


def energy(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> list[Table]:
    """Each role's joules, then what a token, a request and a joule came to; one line where nothing was measured."""
    runs = dict(zip(names, (analysis.summary.energy for analysis in analyses), strict=True))
    missing: dict[str, list[str]] = {}
    for name, run in runs.items():
        if reason := run.not_measured or run.not_split:
            missing.setdefault(_(reason), []).append(name)
    why = [reason if len(of) == len(runs) else f"{', '.join(of)}: {reason}" for reason, of in missing.items()]
    note = _("not measured: {0}", "; ".join(why)) if why else ""
    if all(run.not_measured for run in runs.values()):
        return [Table(title=_("Energy"), note=note)]
    rows: list[list[Value]] = []
    for name, run in runs.items():
        for role, used in run.roles.items():
            parts = [energy_parts(used).get(part, "") for part in ("active_j", "idle_j", "waiting_j")]
            waited = "" if used.waiting_s is None else f"{text.number(used.waiting_s)} / {text.number(used.window_s)}"
            label = role if role == name or len(names) == 1 else f"{name}, {role}"
            rows.append([label, used.total_j, *parts, waited])
    header = [_("role"), _("total, J"), _("active"), _("idle draw"), _("waiting"), _("waited, s")]
    figures = [[text.label(metric), *(text.value(analysis, metric) for analysis in analyses)] for metric in ENERGY]
    measured = [row for row in figures if any(value is not None for value in row[1:])]
    cost, unknown = _("Energy: what a token and a request cost"), _("not measured")
    return [
        Table(title=_("Energy by role, J in the measured windows"), header=header, rows=rows),
        Table(title=cost, header=["", *names], rows=measured, note=note, missing=unknown),
    ]


def energy_parts(role: RoleEnergy) -> dict[str, float]:
    """A role's joules in up to three parts; without a measured idle power its phase is not split."""
    active_j = next((joules for joules in (role.active_j, role.phase_j, role.total_j) if joules is not None), None)
    parts = {"active_j": active_j, "idle_j": role.idle_j, "waiting_j": role.waiting_j}
    return {name: joules for name, joules in parts.items() if joules is not None}


def configuration(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> tuple[Table, Table]:
    """Options, host and versions: those that differ between the runs, and the others."""
    flat: list[dict[str, str]] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif value not in (None, "", [], ()):
            flat[-1][prefix] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    for analysis in analyses:
        flat.append({})
        for section, value in (("config", analysis.config), ("host", analysis.host), ("version", analysis.versions)):
            walk(section, value)
    keys = dict.fromkeys(key for run in flat for key in run)
    rows = [[key, *(run.get(key, "") for run in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row for row in rows if len(set(row[1:])) == 1]
    left, header = tuple(range(len(names) + 1)), ["", *names]
    note, rest = _("What differs between the runs."), _("{0} options that are the same in all", len(same))
    return (
        Table(title=_("Configuration and environment"), header=header, rows=differing, left=left, note=note),
        Table(title=rest, header=header, rows=same, left=left),
    )


def warnings(name: str, analysis: RunAnalysis) -> list[Text]:
    """One red line per flag of a run, and one for its failed requests."""
    return [Text.assemble((f"{name}, {flag}: ", "bold red"), detail) for flag, detail in text.warnings(analysis)]


def mismatches(compared: Comparison) -> list[Text]:
    """One line per thing that is not the same in both runs; red where figures may not be compared across it."""
    return [
        Text.assemble((_("differs: "), "bold red" if found.refused else "yellow"), _(str(found)))
        for found in compared.mismatches
    ]
