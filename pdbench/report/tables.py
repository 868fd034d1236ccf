"""Tables for the terminal (rich) and for an issue or a paper (Markdown), from the same rows.

Try: pdbench compare single_results disaggregated_results
"""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pdbench.analysis import verdicts
from pdbench.analysis.compare import Comparison, compare
from pdbench.analysis.run_analysis import analyze
from pdbench.analysis.summary import summarize
from pdbench.errors import UserError
from pdbench.records import Flag, Run
from pdbench.report import energy_tables
from pdbench.report.digest import Digest
from pdbench.report.language import say
from pdbench.report.rows import Rows, figure
from pdbench.report.words import load_in_words, model_name

_STYLES = {"better": "green", "worse": "red", "same": "", "unclear": "dim", "unjudged": "dim"}


def summary_rows(run: Run, language: str = "en") -> Rows:
    """One run: every time with mean, p50, p90, p99 in ms, then throughput, energy and failures."""
    summary = run.summary or summarize(run)
    keys = ("ttft_ms", "tbt_ms", "e2e_ms", "client_ms", "queue_ms", "prefill_ms", "kv_transfer_ms", "decode_ms")
    known = [(key, summary.get(key)) for key in keys if summary.get(key) or key in ("ttft_ms", "tbt_ms", "e2e_ms")]
    rows = [
        [say(key, language), *(_stat(spread, name) for name in ("mean", "p50", "p90", "p99"))] for key, spread in known
    ]
    speed, requests = summary["throughput"], summary["requests"]
    rows.append([say("requests", language), f"{requests['succeeded']} / {requests['sent']}", "", "", ""])
    rows.append([say("output_tokens_per_s", language), figure(speed["output_tokens_per_s"]), "", "", ""])
    header = [say("milliseconds", language), say("mean", language), "p50", "p90", "p99"]
    return Rows(f"{run.name}: {load_in_words(run, language)}", header, rows, [""] * len(rows))


def device_rows(run: Run, language: str = "en") -> Rows:
    """One run's devices over the measured windows: power or use, clock, temperature, energy, and what was not measured."""
    devices = (run.summary or summarize(run))["devices"]
    header = [
        say(key, language)
        for key in ("device", "role", "power_w", "utilization", "clock_mhz", "temperature", "energy_j")
    ]
    rows = []
    for identity, one in devices.items():
        use = one["gpu_utilization_pct"] or one["cpu_utilization_pct"]
        clock = one["sm_clock_mhz"] or one["cpu_clock_mhz"]
        spreads = [_stat(spread, "mean") for spread in (one["power_w"], use, clock, one["temperature_c"])]
        rows.append([identity, one["role"] or "", *spreads, figure(one["energy"]["total_j"])])
    return Rows(say("devices", language), header, rows, [""] * len(rows))


def comparison_rows(comparison: Comparison, language: str = "en") -> Rows:
    """A row a metric: both figures and the verdict in words."""
    rows = []
    for line in comparison.differences:
        unit = f", {line.metric.unit}" if line.metric.unit else ""
        judged = f"{say(line.verdict, language)}: " if line.verdict in ("better", "worse") else ""
        figures = (verdicts.number(line.a), verdicts.number(line.b))
        rows.append([verdicts.title(line, language) + unit, *figures, judged + verdicts.judgement(line, language)])
    change = say("change seen" if comparison.one_trial else "change", language)
    header = [say("metric", language), *comparison.names, change]
    title = say("against", language).format(a=comparison.names[0], b=comparison.names[1])
    return Rows(
        title,
        header,
        rows,
        [_STYLES[line.verdict] for line in comparison.differences],
        (0, 3),
        verdicts.advice(comparison, language),
    )


def side_by_side_rows(
    runs: Sequence[Run], names: Sequence[str], sort_by: str | None = None, language: str = "en"
) -> Rows:
    """Several runs or models, a row each, best first by `sort_by` (a name of `FIGURES`); those without it come last."""
    return _side_by_side([run.summary or summarize(run) for run in runs], runs, names, sort_by, language)


def digest_rows(
    digests: Sequence[Digest], names: Sequence[str], sort_by: str | None = None, language: str = "en"
) -> Rows:
    """The same from digests."""
    return _side_by_side([one.summary for one in digests], [one.skeleton for one in digests], names, sort_by, language)


def _side_by_side(
    summaries: Sequence[dict[str, Any]], runs: Sequence[Run], names: Sequence[str], sort_by: str | None, language: str
) -> Rows:
    if sort_by is not None and sort_by not in FIGURES:
        raise UserError(f"--sort-by {sort_by}: choose from {', '.join(FIGURES)}", exit_code=2)
    found = [(name, model_name(run), figures_of(one)) for name, run, one in zip(names, runs, summaries, strict=True)]
    if sort_by is not None:
        sign = 1 if sort_by.endswith("_ms") or sort_by == "j_per_output_token" else -1
        found.sort(key=lambda one: (one[2][sort_by] is None, sign * (one[2][sort_by] or 0.0)))
    header = [say("run", language), say("model", language), *(say(key, language) for key in FIGURES)]
    rows = [[name, model, *(figure(value) for value in values.values())] for name, model, values in found]
    return Rows(say("side by side", language), header, rows, [""] * len(rows), (0, 1))


FIGURES = (
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tbt_p50_ms",
    "tbt_p99_ms",
    "e2e_p50_ms",
    "output_tokens_per_s",
    "j_per_output_token",
)


def figures_of(summary: dict[str, Any]) -> dict[str, float | None]:
    """The few figures that a side-by-side table shows, by the names that --sort-by takes."""
    values: dict[str, float | None] = {}
    for key in FIGURES:
        kind, _, rest = key.partition("_")
        spread = summary.get(f"{kind}_ms")
        if rest.startswith("p") and rest.endswith("_ms"):
            values[key] = spread[rest.removesuffix("_ms")] if spread else None
        else:
            values[key] = summary["throughput"].get(key) if key in summary["throughput"] else summary["energy"].get(key)
    return values


def table(rows: Rows) -> Group:
    """Rows for the terminal, title above and note below as wide as the terminal, not as the table."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(rows.header):
        made.add_column(escape(name), justify="left" if place in rows.left else "right", overflow="fold")
    for row, style in zip(rows.rows, rows.styles, strict=True):
        made.add_row(*(escape(text) for text in row), style=style)
    note = [Text(rows.note, style="dim")] if rows.note else []
    return Group(Text(rows.title, style="bold"), made, *note)


def summary_table(run: Run, language: str = "en") -> Group:
    """A run for the terminal: its figures, its energy, its devices, its flags in red."""
    summary = run.summary or summarize(run)
    tables = [table(summary_rows(run, language))]
    tables += [table(rows) for rows in energy_tables.both([summary], [run.name], language)]
    tables += [table(device_rows(run, language))] if run.devices else []
    return Group(*tables, *_flag_lines(run.name, run.flags))


def comparison_table(a: Run, b: Run, language: str = "en") -> Group:
    """Verdicts on B against A, whatever else differs between them, for the terminal."""
    return verdict_table(compare(analyze(a), analyze(b), anyway=True), language)


def verdict_table(comparison: Comparison, language: str = "en") -> Group:
    """Verdicts for the terminal, with what else differs and what a reader must know of either run."""
    lines = []
    for mismatch in comparison.mismatches:
        style = "bold red" if mismatch.refused else "yellow"
        lines.append(Text.from_markup(f"[{style}]{say('differs', language)}[/{style}] {escape(str(mismatch))}"))
    for name, flags in zip(comparison.names, comparison.flags, strict=True):
        lines += _flag_lines(name, flags)
    return Group(table(comparison_rows(comparison, language)), *lines)


def _flag_lines(name: str, flags: Sequence[Flag]) -> list[Text]:
    """One red line a flag."""
    return [
        Text.from_markup(f"[bold red]{escape(f'{name}, {flag.name}:')}[/bold red] {escape(flag.detail)}")
        for flag in flags
    ]


def markdown(rows: Rows) -> str:
    """The table as GitHub Markdown, its title as a heading."""
    sides = ["---" if place in rows.left else "---:" for place in range(len(rows.header))]
    lines = [rows.header, sides, *rows.rows]
    cells = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in lines]
    return f"## {rows.title}\n\n" + "\n".join(cells) + "\n" + (f"\n{rows.note}\n" if rows.note else "")


def _stat(spread: dict[str, float] | None, name: str) -> str:
    return figure(None if spread is None else spread[name])
