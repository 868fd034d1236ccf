"""Every table described once, as rows of values, and rendered for the terminal, Markdown and CSV; `page` renders HTML."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from pdbench.analysis.compare import Comparison
from pdbench.analysis.energy import Energy, RoleEnergy
from pdbench.analysis.metrics import PHASES, Spread
from pdbench.analysis.run_analysis import RunAnalysis
from pdbench.errors import UserError
from pdbench.report import text
from pdbench.report.text import translate as _

Value = str | int | float | None
STYLES = {"better": "green", "worse": "red", "unclear": "dim", "unjudged": "dim"}
SIDE_BY_SIDE = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tbt_p50_ms",
    "tbt_p99_ms",
    "e2e_p50_ms",
    "output_tokens_per_s",
    "j_per_output_token",
)
ENERGY_FIGURES = {
    "j_per_computed_prompt_token": "J per computed prompt token (prefill)",
    "j_per_output_token": "J per output token",
    "decode_j_per_output_token": "J per output token (decode)",
    "j_per_request": "J per request",
    "output_tokens_per_j": "output tokens per J",
    "energy_delay_js": "energy-delay product, J s",
    "goodput_per_w": "goodput per W, requests/s",
    "kv_transfer_gb": "KV transferred, GB",
    "kv_transfer_j": "KV transfer alone, active J",
    "price_per_million_output_tokens": "price of a million output tokens",
    "gco2_per_million_output_tokens": "g CO2 per million output tokens",
}
MERGED_PCT = 5.0
"""Above this share of gaps of 0 ms, p50 of TBT looks better and p99 worse than the engine made them."""
REQUEST_COLUMNS = (
    "deployment", "id", "trial", "sent_s", "end_s", "ttft_ms", "mean_tbt_ms", "e2e_ms", "send_delay_ms",
    "prompt_tokens", "output_tokens", *(f"{name}_ms" for name in PHASES), "error", "finish_reason",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Title, header, rows of values (None: not measured), columns that hold words, a style per row, a note below.

    Styles are better, worse, unclear, unjudged or empty. Without rows the note is all there is to say.
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
        return [[self._cell(value) for value in row] for row in self.rows]

    def _cell(self, value: Value) -> str:
        if value is None:
            return self.missing
        return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else text.number(value)


def terminal(table: Table) -> Group:
    """For the terminal: title above and note below as wide as the terminal, not as the table."""
    if not table.rows:
        return Group(Text(f"{table.title}: {table.note}", style="dim"))
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(table.header):
        shown.add_column(escape(name), justify="left" if place in table.left else "right", overflow="fold")
    styles = table.styles or [""] * len(table.rows)
    for row, style in zip(table.cells, styles, strict=True):
        shown.add_row(*map(escape, row), style=STYLES.get(style, style))
    return Group(Text(table.title, style="bold"), shown, *([Text(table.note, style="dim")] if table.note else []))


def markdown(table: Table) -> str:
    """As GitHub Markdown, the title as a heading."""
    sides = ["---" if place in table.left else "---:" for place in range(len(table.header))]
    lines = [table.header, sides, *table.cells] if table.rows else []
    cells = ["| " + " | ".join(_plain(cell) for cell in row) + " |" for row in lines]
    return "\n\n".join(filter(None, (f"## {_plain(table.title)}", "\n".join(cells), _plain(table.note)))) + "\n"


def _plain(cell: str) -> str:
    return cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def csv_text(table: Table) -> str:
    """As CSV with full precision; an empty cell was not measured."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue()


def requests_csv(analysis: RunAnalysis) -> str:
    """Rows of `REQUEST_COLUMNS`, one per measured request (no warm-up); an empty cell is what was not measured."""
    requests = analysis.requests
    times = [requests.sent_s, requests.end_s, requests.ttft_ms, requests.mean_tbt_ms, requests.e2e_ms]
    times += [requests.send_delay_ms]
    columns = [
        [analysis.name] * len(requests.id),
        requests.id,
        requests.trial.tolist(),
        *map(_csv_cells, times),
        *(_csv_cells(counts, integer=True) for counts in (requests.prompt_tokens, requests.output_tokens)),
        *(_csv_cells(requests.phase_ms[name]) for name in PHASES),
        [error or "" for error in requests.error],
        [reason or "" for reason in requests.finish_reason],
    ]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(zip(*columns, strict=True))
    return out.getvalue()


def _csv_cells(column: "np.ndarray[tuple[int], np.dtype[np.float64]]", integer: bool = False) -> list[str]:
    """Decimals by msgspec, several times faster than `repr`; NaN, its null, as an empty cell."""
    if not len(column):
        return []
    values = (
        [None if value != value else int(value) for value in column.tolist()]
        if integer
        else np.round(column, 6).tolist()
    )
    return msgspec.json.encode(values).decode()[1:-1].replace("null", "").split(",")


def times(analysis: RunAnalysis) -> Table:
    """Every time of one run with mean, p50, p90 and p99 in ms; phases where they were reported."""
    summary = analysis.summary
    latencies = {"ttft_ms": "TTFT", "tbt_ms": _("TBT, every gap"), "e2e_ms": "E2E"}
    phases = {f"{name}_ms": text.title(f"{name}_ms") for name in PHASES if getattr(summary, f"{name}_ms")}
    rows = [[name, *_spread(getattr(summary, key))] for key, name in (latencies | phases).items()]
    return Table(title=_("Times, ms"), header=["", _("mean"), "p50", "p90", "p99"], rows=rows)


def run_summary(analysis: RunAnalysis) -> list[Table]:
    """One run for the terminal: times and counts, energy, devices."""
    summary, blank = analysis.summary, [""] * 3
    counts: list[list[Value]] = [
        [_("requests succeeded / sent"), f"{summary.requests.succeeded} / {summary.requests.sent}", *blank],
        [_("output tokens/s"), summary.throughput.output_tokens_per_s, *blank],
    ]
    if (summary.tokens.merged_pct or 0.0) >= MERGED_PCT:
        counts.append([_("gaps of 0 ms (one chunk), %"), summary.tokens.merged_pct, *blank])
    known = times(analysis)
    first = replace(known, title=f"{analysis.name}: {text.load(analysis)}", rows=[*known.rows, *counts])
    first = replace(first, header=[_("milliseconds"), *known.header[1:]])
    return [first, *energy([analysis], [analysis.name]), *([devices(analysis)] if summary.devices else [])]


def windows(analysis: RunAnalysis) -> Table:
    """Throughput, energy per token, and each device's power or use over the measured windows."""
    summary = analysis.summary
    figures = {
        "output tokens/s": summary.throughput.output_tokens_per_s,
        "requests/s": summary.throughput.requests_per_s,
    }
    per_token = {
        "J per output token": summary.energy.j_per_output_token,
        "prefill, J per prompt token": summary.energy.j_per_computed_prompt_token,
        "decode, J per output token": summary.energy.decode_j_per_output_token,
    }
    figures |= {name: value for name, value in per_token.items() if value is not None}
    rows: list[list[Value]] = [[_(name), value, "", "", ""] for name, value in figures.items()]
    for name, device in list(summary.devices.items())[:5]:
        shown = ("power_w", "gpu_utilization_pct", "cpu_utilization_pct")
        field = next((key for key in shown if key in device.readings), "cpu_utilization_pct")
        found, joules = device.readings.get(field), device.energy.energy_j
        spread = [found and found.mean, found and found.min, found and found.max]
        label = f"{device.role or name}, {text.unit(field)}"
        rows.append([label, *spread, None if joules is None else f"{text.number(joules)} J"])
    header = ["", _("mean"), _("min"), _("max"), _("energy")]
    return Table(title=_("Throughput and devices, over the measured windows"), header=header, rows=rows)


def devices(analysis: RunAnalysis) -> Table:
    """Means of one run's devices over the measured windows, and their energy."""
    rows: list[list[Value]] = []
    for name, device in analysis.summary.devices.items():
        fields = (
            ("power_w",), ("gpu_utilization_pct", "cpu_utilization_pct"), ("sm_clock_mhz", "cpu_clock_mhz"), ("temperature_c",),
        )  # fmt: skip
        found = [
            next((device.readings[field].mean for field in group if field in device.readings), None) for group in fields
        ]
        rows.append([name, device.role or "", *found, device.energy.energy_j])
    header = [_("device"), _("role"), _("power, W"), _("use, %"), _("clock, MHz"), "°C", _("energy, J")]
    return Table(title=_("Devices over the measured windows"), header=header, rows=rows, left=(0, 1))


def comparison(compared: Comparison) -> Table:
    """A row per metric: both figures and the verdict in words."""
    rows = [[text.label(line.metric.name), line.a, line.b, text.verdict(line)] for line in compared.differences]
    change = _("change seen; one trial, no interval") if compared.one_trial else _("change, 95 % interval")
    return Table(
        title=text.against(compared.names),
        header=[_("metric"), *compared.names, change],
        rows=rows,
        left=(0, 3),
        styles=[line.verdict for line in compared.differences],
        note=text.advice(compared),
    )


def side_by_side(analyses: Sequence[RunAnalysis], names: Sequence[str], sort_by: str | None = None) -> Table:
    """A row per run, best first by `sort_by` (of `SIDE_BY_SIDE`), those without it last; loads where they differ."""
    if sort_by is not None and sort_by not in SIDE_BY_SIDE:
        raise UserError(f"--sort-by {sort_by}: choose from {', '.join(SIDE_BY_SIDE)}", exit_code=2)
    found = []
    for name, analysis in zip(names, analyses, strict=True):
        figures = {key: analysis.figures[key].value if key in analysis.figures else None for key in SIDE_BY_SIDE}
        found.append((name, text.model(analysis), figures))
    if sort_by is not None:
        sign = 1 if sort_by.endswith("_ms") or sort_by == "j_per_output_token" else -1
        found.sort(key=lambda row: (row[2][sort_by] is None, sign * (row[2][sort_by] or 0.0)))
    header = [_("run"), _("model"), *map(text.label, SIDE_BY_SIDE)]
    rows = [[name, model, *figures.values()] for name, model, figures in found]
    return Table(title=_("Side by side"), header=header, rows=rows, left=(0, 1))


def energy(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> list[Table]:
    """Each role's joules, then what a token, a request and a joule came to; one line where nothing was measured."""
    energies = [analysis.summary.energy for analysis in analyses]
    missing = {name: text.reasons(e.not_measured) for name, e in zip(names, energies, strict=True) if e.not_measured}
    several = len(set(missing.values())) > 1 or 0 < len(missing) < len(names)
    note = (
        "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        if several
        else "".join([*missing.values()][:1])
    )
    if len(missing) == len(names):
        return [Table(title=_("Energy"), note=_("not measured: {0}", note))]
    rows = []
    for name, found in zip(names, energies, strict=True):
        for role, used in found.roles.items():
            parts = energy_parts(used)
            waited = "" if used.waiting_s is None else f"{text.number(used.waiting_s)} / {text.number(used.window_s)}"
            row = role if role == name or len(names) == 1 else f"{name}, {role}"
            rows.append(
                [row, used.total_j, *(parts.get(part, "") for part in ("active_j", "idle_j", "waiting_j")), waited]
            )
    header = [_("role"), _("total, J"), _("active"), _("idle draw"), _("waiting"), _("waited, s")]
    roles = Table(title=_("Energy by role, J in the measured windows"), header=header, rows=rows)
    figures = [(title, [_energy_figure(found, key) for found in energies]) for key, title in ENERGY_FIGURES.items()]
    split = dict.fromkeys(_(found.not_split) for found in energies if found.not_split and not found.not_measured)
    return [
        roles,
        Table(
            title=_("Energy: what a token and a request cost"),
            header=["", *names],
            rows=[[_(title), *values] for title, values in figures if any(value is not None for value in values)],
            note="; ".join([*([_("not measured: {0}", note)] if note else []), *split]),
            missing=_("not measured"),
        ),
    ]


def energy_parts(role: RoleEnergy) -> dict[str, float]:
    """A role's joules in up to three parts; without a measured idle power its phase is not split."""
    active_j = role.active_j
    if active_j is None:
        active_j = role.total_j if role.phase_j is None else role.phase_j
    parts = {"active_j": active_j, "idle_j": role.idle_j, "waiting_j": role.waiting_j}
    return {name: joules for name, joules in parts.items() if joules is not None}


def _energy_figure(energy: Energy, key: str) -> float | None:
    transfer = energy.kv_transfer
    if key == "kv_transfer_gb":
        return None if transfer is None or transfer.bytes is None else transfer.bytes / 1e9
    if key == "kv_transfer_j":
        return transfer and transfer.active_j
    value: float | None = getattr(energy, key)
    return value


def _spread(spread: Spread | None) -> list[Value]:
    return [None] * 4 if spread is None else [spread.mean, spread.p50, spread.p90, spread.p99]


def configuration(analyses: Sequence[RunAnalysis], names: Sequence[str]) -> tuple[Table, Table]:
    """Options, host and versions: those that differ between the runs, and the others."""
    flat = [_flat(analysis) for analysis in analyses]
    rows = {key: [one.get(key, "") for one in flat] for key in dict.fromkeys(key for one in flat for key in one)}
    differing = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    equal = [[key, *values] for key, values in rows.items() if len(set(values)) == 1]
    left = tuple(range(len(names) + 1))
    note = _("What differs between the runs.")
    return (
        Table(title=_("Configuration and environment"), header=["", *names], rows=differing, left=left, note=note),
        Table(title=_("{0} options that are the same in all", len(equal)), header=["", *names], rows=equal, left=left),
    )


def _flat(analysis: RunAnalysis) -> dict[str, str]:
    """section.option -> text, of everything set."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif value not in (None, "", [], ()):
            flat[prefix] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    for section, value in (("config", analysis.config), ("host", analysis.host), ("version", analysis.versions)):
        walk(section, value)
    if analysis.gate is not None:
        flat["correctness"] = text.gate(analysis)
    return flat


def warnings(name: str, analysis: RunAnalysis) -> list[Text]:
    """One red line per flag of a run, and one for its failed requests."""
    return [Text.assemble((f"{name}, {flag}: ", "bold red"), detail) for flag, detail in text.warnings(analysis)]


def mismatches(compared: Comparison) -> list[Text]:
    """One line per thing that is not the same in both runs; red where figures may not be compared across it."""
    return [
        Text.assemble((_("differs: "), "bold red" if found.refused else "yellow"), text.mismatch(found))
        for found in compared.mismatches
    ]
