"""Every table described once, as rows of values, and rendered for the terminal, Markdown and CSV; `page` renders HTML."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table as RichTable
from rich.text import Text

from pdbench.analysis.compare import Comparison, Mismatch
from pdbench.analysis.energy import RoleEnergy
from pdbench.analysis.metrics import METRICS, PHASES, Spread
from pdbench.analysis.run_analysis import Range, RunAnalysis, is_foreign
from pdbench.errors import OptionError
from pdbench.report import answer, text
from pdbench.report.text import translate as _

Value = str | int | float | None
Differing = tuple[Path, Path, Mismatch]
"""Two folders and what is not the same in their runs."""
STYLES = {"better": "green", "worse": "red", "unclear": "dim", "unjudged": "dim"}
LATENCIES = ("ttft_ms", "tbt_ms", "e2e_ms")
SIDE_BY_SIDE = (
    "ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms", "e2e_p50_ms", "output_tokens_per_s", "j_per_output_token",
)  # fmt: skip
ENERGY = (
    "j_per_computed_prompt_token", "j_per_output_token", "decode_j_per_output_token", "j_per_request", "output_tokens_per_j",
    "energy_delay_js", "goodput_per_w", "kv_gb", "kv_returned_gb", "kv_j", "price_per_million_output_tokens",
    "gco2_per_million_output_tokens",
)  # fmt: skip
WHOLE, RANGE = re.compile(r"[(+−÷×±]*\d|replicas:"), re.compile(r"(\([−+]?\d[\d.,]*[-–])(?=\d)")
FOLDED, LEAST_FOLDED = 8, 6
"""Letters of a word that a narrow terminal shows in one line at least, and where that is too wide with intervals on two lines."""
MERGED_PCT = 5.0
"""Above this share of gaps of 0 ms, p50 of TBT looks better and p99 worse than the engine made them."""
REQUEST_COLUMNS = (
    "deployment", "id", "trial", "sent_s", "end_s", "ttft_ms", "ttfo_ms", "mean_tbt_ms", "e2e_ms", "send_delay_ms",
    "prompt_tokens", "output_tokens", "counted_by", *(f"{name}_ms" for name in PHASES), "compute_steps", "error", "finish_reason",
    "first_token", "first_gap_ms",
)  # fmt: skip


_RUN = "\ue000"
"""Where a run's name goes, which is known when all runs are read; a letter of no script (Unicode's private use)."""


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


@dataclass(frozen=True)
class Terminal:
    """A table for rich's console: title above and note below as wide as the terminal, no number broken over two lines."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self.table
        if not table.rows:
            yield Text(table.title + ("\n" if "\n" in table.note else ": ") + table.note, style="dim")
            return
        columns = [list(column) for column in zip(table.header, *table.cells, strict=True)]
        fits = sum(max(map(cell_len, column)) + 3 for column in columns) <= options.max_width + 1
        widths = [None] * len(columns) if fits else _widths(columns, options.max_width - 2 * len(columns))
        if widths is None:  # an interval goes on after its dash
            columns = [[RANGE.sub(r"\1\n", cell) for cell in column] for column in columns]
            room = options.max_width - 2 * len(columns)
            widths = _widths(columns, room) or _widths(columns, room, LEAST_FOLDED) or [None] * len(columns)
        shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1) if fits else (0, 1, 0, 0))
        for place, ((name, *_cells), width) in enumerate(zip(columns, widths, strict=True)):
            side: Literal["left", "right"] = "left" if place in table.left else "right"
            shown.add_column(escape(name), justify=side, overflow="fold", width=width)
        rows = zip(*(cells for _name, *cells in columns), strict=True)
        for row, style in zip(rows, table.styles or [""] * len(table.rows), strict=True):
            shown.add_row(*map(escape, row), style=STYLES.get(style, ""))
        yield Text(table.title, style="bold")
        yield shown
        if table.note:
            yield Text(table.note, style="dim")


def _widths(columns: Sequence[Sequence[str]], room: int, folded: int = FOLDED) -> list[int] | None:
    """Widths of columns that fill `room` with no word broken, else with no number and no deployment's name broken; None where not even that fits."""
    widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
    for breaks_words in (False, True):
        words = [[word for cell in column for word in cell.split()] for column in columns]
        kept = [[word if not breaks_words or WHOLE.match(word) else word[:folded] for word in each] for each in words]
        least = [max(map(cell_len, each), default=1) for each in kept]
        if sum(least) <= room:
            while sum(widths) > room:
                widest = max(
                    (place for place in range(len(columns)) if widths[place] > least[place]), key=widths.__getitem__
                )
                widths[widest] -= 1
            return widths
    return None


def markdown(table: Table) -> str:
    """As GitHub Markdown, the title as a heading."""
    sides = ["---" if place in table.left else "---:" for place in range(len(table.header))]
    lines = [table.header, sides, *table.cells] if table.rows else []
    cells = ["| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in row) + " |" for row in lines]
    return "\n\n".join(filter(None, (f"## {table.title}", "\n".join(cells), table.note)))


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    """With full precision; an empty cell was not measured."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def of_run(name: str, rows: str) -> str:
    """Rows of `requests_csv` with the run's name."""
    return rows.replace(_RUN, csv_text([[name]]).rstrip("\r\n"))


def requests_csv(analysis: RunAnalysis) -> str:
    """Rows of `REQUEST_COLUMNS` for `of_run`, one per measured request (no warm-up); an empty cell was not measured."""
    requests = analysis.requests
    phases = {f"{name}_ms": values for name, values in requests.phase_ms.items()}
    columns: list[list[Any]] = [[_RUN] * len(requests.id)]
    for name in REQUEST_COLUMNS[1:]:
        values: Any = phases[name] if name in phases else getattr(requests, name)
        if isinstance(values, np.ndarray) and len(values):
            # msgspec writes decimals several times faster than `repr`; NaN is its null.
            values = msgspec.json.encode(np.round(values, 6).tolist()).decode()[1:-1].replace("null", "").split(",")
        columns.append([cell.removesuffix(".0") for cell in values] if name.endswith(("_tokens", "_steps")) else values)
    return csv_text(zip(*columns, strict=True))


def times(analysis: RunAnalysis) -> Table:
    """Every time of one run with mean, p50, p90 and p99; phases where they were reported."""
    summary = analysis.summary
    metrics = [*LATENCIES, *(f"{name}_ms" for name in PHASES if getattr(summary, f"{name}_ms"))]
    if summary.inter_chunk_ms is not None:
        metrics.insert(2, "inter_chunk_ms")
    if summary.ttfo_ms != summary.ttft_ms:  # reasoning came first
        metrics.insert(1, "ttfo_ms")
    rows: list[list[Value]] = []
    for metric in metrics:
        name = _("TBT, every gap") if metric == "tbt_ms" else text.title(metric)
        rows.append([name, *_figures(getattr(analysis.summary, metric), "mean", "p50", "p90", "p99")])
        if metric == "tbt_ms" and (merged_pct := _merged_pct(analysis)) is not None:
            rows.append([text.label("merged_pct"), merged_pct, "", "", ""])
    return Table(title=_("Times, ms"), header=["", _("mean"), "p50", "p90", "p99"], rows=rows)


def _figures(spread: Spread | Range | None, *names: str) -> list[Value]:
    return [None if spread is None else getattr(spread, name) for name in names]


def run_summary(analysis: RunAnalysis) -> list[Table]:
    """One run for the terminal: times and counts, energy, devices."""
    requests, known = analysis.summary.requests, times(analysis)
    counts: dict[str, Value] = {_("requests succeeded / sent"): f"{requests.succeeded} / {requests.sent}"}
    counts[text.label("output_tokens_per_s")] = text.value(analysis, "output_tokens_per_s")
    for metric in ("goodput_requests_per_s", "slo_met_pct"):
        if (value := text.value(analysis, metric)) is not None:
            counts[text.label(metric)] = value
    if cached_pct := text.value(analysis, "cached_pct"):
        counts[text.label("cached_pct")] = cached_pct
    if len(finished := analysis.summary.finish_reasons) > 1:
        counts[_("answers ended by")] = ", ".join(f"{reason} {count}" for reason, count in finished.items())
    rows = [*known.rows, *([name, value, "", "", ""] for name, value in counts.items())]
    title = f"{analysis.name}: {text.loads({analysis.name: analysis})}"
    first = replace(known, title=title, header=[_("milliseconds"), *known.header[1:]], rows=rows)
    runs, measured = {analysis.name: analysis}, [devices(analysis)] if analysis.summary.devices else []
    return [first, *first_tokens(runs), *energy(runs), *measured]


def _merged_pct(analysis: RunAnalysis) -> float | None:
    """The per cent of gaps that are 0 ms, where it is so high that TBT must be read with it."""
    share = text.value(analysis, "merged_pct")
    return None if share is None or share < MERGED_PCT else share


def first_tokens(runs: text.Runs) -> list[Table]:
    """TTFT and the first gap by who sent the first token; no table where it was the same instance for all of a run's requests."""
    rows: list[list[Value]] = []
    for name, analysis in runs.items():
        senders = analysis.summary.first_token
        for sender, of in senders.items() if len(senders) > 1 else ():
            times = [*_figures(of.ttft_ms, "p50", "p99"), *_figures(of.first_gap_ms, "p50", "p99")]
            words = _("decode alone") if sender == "decode_alone" else sender
            rows.append([words if len(runs) == 1 else f"{name}, {words}", of.requests, *times])
    columns = (_("first token from"), _("requests"), "TTFT p50", "TTFT p99", _("first gap p50"), _("first gap p99"))
    note = _("The distribution of TTFT is a mix of these.")
    title = _("Who sent the first token, ms")
    return [Table(title=title, header=columns, rows=rows, note=note)] if rows else []


def windows(analysis: RunAnalysis) -> Table:
    """Throughput, energy per token, and each device's power or use over the measured windows."""
    rows: list[list[Value]] = []
    rates = ("output_tokens_per_s", "requests_per_s")
    for metric in (*rates, "goodput_requests_per_s", *ENERGY[:3]):
        value = text.value(analysis, metric)
        if value is not None or metric in rates:
            rows.append([text.label(metric), value, "", "", ""])
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
    columns = {
        _("use, %"): ("gpu_utilization_pct", "cpu_utilization_pct"),
        _("clock, MHz"): ("sm_clock_mhz", "cpu_clock_mhz"),
        "°C": ("temperature_c",),
    }
    rows: list[list[Value]] = []
    for name, device in analysis.summary.devices.items():
        means = {field: reading.mean for field, reading in device.readings.items()}
        found = [next((means[field] for field in fields if field in means), None) for fields in columns.values()]
        rows.append([name, device.role or "", device.energy.mean_power_w, *found, device.energy.energy_j])
        wider = ((scope, used) for scope, used in device.scopes.items() if scope != "gpu")
        rows += [[f"{name}, {_(s)}", "", used.mean_power_w, None, None, None, used.energy_j] for s, used in wider]
    header = [_("device"), _("role"), _("power, W"), *columns, _("energy, J")]
    return Table(title=_("Devices over the measured windows"), header=header, rows=rows, left=(0, 1))


def title(compared: Comparison) -> str:
    """Which run against which; of different numbers of GPUs it is scaling."""
    words = text.against(compared.names)
    return words if compared.equal_hardware else _("Scaling: {0}", words)


def comparison(compared: Comparison) -> Table:
    change = _("change seen; one trial, no interval") if compared.one_trial else _("change, 95 % interval")
    lines = compared.differences
    return Table(
        title=title(compared),
        header=[_("metric"), *compared.names, change],
        rows=[[text.label(line.metric.name), line.a, line.b, answer.verdict(line)] for line in lines],
        left=(0, 3),
        styles=["unclear" if line.alone else line.verdict for line in lines],
        note=answer.next_step(compared),
    )


def side_by_side(runs: text.Runs, sort_by: str | None = None) -> Table:
    """A row per run, best first by `sort_by` (of `SIDE_BY_SIDE`), those without it last."""
    if sort_by is not None and sort_by not in SIDE_BY_SIDE:
        raise OptionError(f"--sort-by {sort_by}: choose from {', '.join(SIDE_BY_SIDE)}")
    ordered = list(runs.items())
    if sort_by is not None:
        sign = 1 if METRICS[sort_by].lower_is_better else -1
        known = {name: text.value(run, sort_by) for name, run in ordered}
        ordered.sort(key=lambda item: (known[item[0]] is None, sign * (known[item[0]] or 0.0)))
    rows = [[name, text.model(run), *(text.value(run, metric) for metric in SIDE_BY_SIDE)] for name, run in ordered]
    header = [_("run"), _("model"), *map(text.label, SIDE_BY_SIDE)]
    merged = [f"{name}: {text.number(share)} %" for name, run in ordered if (share := _merged_pct(run)) is not None]
    several = any(run.summary.trials > 1 for run in runs.values())
    notes = [_("Latencies are over the requests of all trials together.")] if several else []
    notes += [_("TBT is of tokens that shared chunks; gaps of 0 ms: {0}", "; ".join(merged))] if merged else []
    return Table(title=_("Side by side"), header=header, rows=rows, left=(0, 1), note=" ".join(notes))


def energy(runs: text.Runs) -> list[Table]:
    """Each role's joules, then what a token, a request and a joule came to; one line where nothing was measured."""
    missing: dict[str, list[str]] = {}
    for name, run in runs.items():
        if reason := run.summary.energy.not_measured or run.summary.energy.not_split:
            missing.setdefault(_(reason), []).append(name)
    why = [reason if len(of) == len(runs) else f"{', '.join(of)}: {reason}" for reason, of in missing.items()]
    note = _("not measured: {0}", "; ".join(why)) if why else ""
    if all(run.summary.energy.not_measured for run in runs.values()):
        return [Table(title=_("Energy"), note=note)]
    caps = [
        line if len(runs) == 1 else f"{name}, {line}"
        for name, analysis in runs.items()
        for line in text.power_caps(analysis)
    ]
    rows: list[list[Value]] = []
    for label, used in energy_roles(runs).items():
        known, waits = energy_parts(used), "" if used.phase_s is None else None  # a role without a phase has none
        parts = [known.get("active_j"), known.get("idle_j"), known.get("waiting_j", waits)]
        waited = "" if used.waiting_s is None else f"{text.number(used.waiting_s)} / {text.number(used.window_s)}"
        rows.append([label, used.total_j, *parts, waited])
    header = [_("role"), _("total, J"), _("active"), _("idle draw"), _("waiting"), _("waited, s")]
    figures = [[text.label(metric), *(text.value(run, metric) for run in runs.values())] for metric in ENERGY]
    measured = [row for row in figures if any(value is not None for value in row[1:])]
    cost, unknown = _("Energy: what a token and a request cost"), _("not measured")
    return [
        Table(title=_("Energy by role, J in the measured windows"), header=header, rows=rows, note="; ".join(caps)),
        Table(title=cost, header=["", *runs], rows=measured, note=note, missing=unknown),
    ]


def energy_roles(runs: text.Runs) -> dict[str, RoleEnergy]:
    """The roles of all runs, each with its run's name where that is needed to tell them apart."""
    return {
        role if role == name or len(runs) == 1 else f"{name}, {role}": used
        for name, run in runs.items()
        for role, used in run.summary.energy.roles.items()
    }


def energy_parts(role: RoleEnergy) -> dict[str, float]:
    """A role's joules in up to four parts, which add up to its total; without a measured idle power its phase is not split. `other_j` may be of
    its phase or of its waits."""
    parts: dict[str, float | None] = {}
    if role.phase_s is None or role.phase_j is not None:
        active_j = next((joules for joules in (role.active_j, role.phase_j, role.total_j) if joules is not None), None)
        parts = {"active_j": active_j, "idle_j": role.idle_j, "waiting_j": role.waiting_j}
    known = {name: joules for name, joules in parts.items() if joules is not None}
    other_j = (role.total_j or 0.0) - sum(known.values())
    return known | ({"other_j": other_j} if other_j > 1e-6 * (role.total_j or 0.0) else {})


def configuration(runs: text.Runs) -> tuple[Table, Table]:
    """Options, host and versions (the client's where the server was given by its URL): those that differ between the runs, and the others."""
    columns = []
    for run in runs.values():
        whose = "client." if is_foreign(run) else ""
        facts = _flat(f"{whose}host", run.host) | _flat(f"{whose}version", run.versions)
        columns.append(_flat("config", run.config) | facts)
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *(column.get(key, "") for column in columns)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    same = [row for row in rows if len(set(row[1:])) == 1]
    left, header = range(len(runs) + 1), ["", *runs]
    note, rest = _("What differs between the runs."), _("{0} options that are the same in all", len(same))
    return (
        Table(title=_("Configuration and environment"), header=header, rows=differing, left=left, note=note),
        Table(title=rest, header=header, rows=same, left=left),
    )


def _flat(name: str, value: object) -> dict[str, str]:
    """Nested values on one level, as config.load.rate; those that are not set are left out."""
    if isinstance(value, dict):
        return {path: leaf for key, inner in value.items() for path, leaf in _flat(f"{name}.{key}", inner).items()}
    if value in (None, "", [], ()):
        return {}
    return {name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


def warnings(name: str, analysis: RunAnalysis) -> list[Text]:
    """One red line per flag of a run."""
    return [Text.assemble((f"{name}, {flag}: ", "bold red"), detail) for flag, detail in text.warnings(analysis)]


def mismatches(compared: Comparison) -> list[Text]:
    """One line per thing that is not the same in both runs; red where figures may not be compared across it."""
    return [
        Text.assemble((_("differs: "), "bold red" if found.refused else "yellow"), _(str(found)))
        for found in compared.mismatches
    ]


def differing(found: Sequence[Differing]) -> list[Text]:
    """One line per thing that is not the same in two folders whose runs stand in one table."""
    return [
        Text.assemble((_("differs: "), "yellow"), f"{first}, {other}: {_(str(each))}") for first, other, each in found
    ]


def say(console: Console, *lines: str | Text) -> None:
    """Each line as it is: brackets in a path are no markup."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
