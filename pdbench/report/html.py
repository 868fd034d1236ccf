"""The report: one HTML file that opens offline, verdicts first, then interactive figures, tables, configuration, flags.

Try: pdbench report single_results disaggregated_results && xdg-open report/report.html
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from pdbench.analysis import differences, verdicts
from pdbench.analysis.compare import Comparison, compare_estimates
from pdbench.records import Run
from pdbench.report import energy_tables, plots
from pdbench.report.digest import Digest
from pdbench.report.language import say
from pdbench.report.rows import Rows
from pdbench.report.tables import digest_rows

DEVICE_FIGURES = 8
COMPARED = 8


def page(runs: Sequence[Digest], names: Sequence[str], sort_by: str | None = None, language: str = "en") -> str:
    """The whole page for these runs; the first is the baseline that the next ones are judged against."""
    comparisons = [
        compare_digests(runs[0], run, (names[0], name))
        for run, name in zip(runs[1 : COMPARED + 1], names[1:], strict=False)
    ]
    title = say("against", language).format(a=names[0], b=names[1]) if len(runs) == 2 else " · ".join(names[:4])
    found = _plots(runs, names, language)
    body = [_header(runs, names, title, language), _flags(runs, names, language)]
    body += [_verdicts(one, language, len(comparisons) > 1) for one in comparisons]
    body += [_rows(digest_rows(runs, names, sort_by, language))]
    body += [_figure(identity, *words) for identity, (_, *words) in found.items()]
    body += [_rows(rows) for rows in energy_tables.both(*energy_of(runs, names), language)]
    body += [_configuration(runs, names, language)]
    data = json.dumps({identity: plot for identity, (plot, *_) in found.items()}, separators=(",", ":"))
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        lang="zh-Hans" if language == "zh" else "en",
        title=escape(f"pdbench: {title}"),
        body="\n".join(body),
        plots=data.replace("<", "\\u003c"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )


def energy_of(runs: Sequence[Digest], names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Summaries and names of the runs whose energy is tabulated: the first eight."""
    return [run.summary for run in runs[:COMPARED]], list(names[:COMPARED])


def compare_digests(a: Digest, b: Digest, names: tuple[str, str]) -> Comparison:
    """B against A, whatever differs between them; what does is named in the result."""
    found = differences.find(a.skeleton, b.skeleton)
    return compare_estimates(a.estimates, b.estimates, names, found, (a.skeleton.flags, b.skeleton.flags))


def _plots(runs: Sequence[Digest], names: Sequence[str], language: str) -> dict[str, tuple[plots.Plot, str, str]]:
    """Every figure that there is something to draw for: its id, the figure, heading and caption."""
    drawn: dict[str, tuple[plots.Plot | None, str, str]] = {
        "distributions": (plots.distributions(runs, names, language), "Latency distributions", "caption_distributions"),
        "ttft": (plots.ttft_parts(runs, names, language), "Where TTFT goes", "caption_ttft"),
        "tbt": (plots.tbt_over_time(runs, names, language), "TBT over time", "caption_tbt"),
    }
    for number, (run, name) in enumerate(zip(runs[:DEVICE_FIGURES], names, strict=False)):
        missing = [
            f"{say(key, language)}: {say('not measured', language)} ({why})"
            for key, why in run.missing.items()
            if key in ("power_w", "sm_clock_mhz")
        ]
        heading = f"{say('Devices of', language)} {name}"
        drawn[f"devices-{number}"] = (plots.devices(run, language), heading, "; ".join(missing) or "caption_devices")
    drawn["trade-off"] = (plots.trade_off(runs, names, language), "Trade-off", "caption_trade_off")
    drawn["energy"] = (plots.energy(runs, names, language), "Energy", "caption_energy")
    return {
        key: (plot, say(heading, language), say(caption, language))
        for key, (plot, heading, caption) in drawn.items()
        if plot
    }


def _header(runs: Sequence[Digest], names: Sequence[str], title: str, language: str) -> str:
    """Title, load and machine; a machine a run where they differ (one GPU against two), for the first four."""
    machines = dict(zip(names[:4], [run.machine for run in runs[:4]], strict=True))
    lines = [f"{name}: {machine}" for name, machine in machines.items()]
    lines = lines if len(set(machines.values())) > 1 else [runs[0].machine]
    shown = "<br>".join(map(escape, lines))
    return (
        f"<header><div><h1>{escape(title)}</h1><p>{escape(runs[0].load)}</p><p class='muted'>{shown}</p></div>"
        f"<button id='theme' type='button'>{escape(say('light / dark', language))}</button></header>"
    )


def _flags(runs: Sequence[Digest], names: Sequence[str], language: str) -> str:
    lines = [
        f"<li><b>{escape(name)}, {escape(flag.name)}:</b> {escape(flag.detail)}</li>"
        for run, name in zip(runs, names, strict=True)
        for flag in run.skeleton.flags
    ]
    failed = [
        f"<li><b>{escape(name)}:</b> {escape(say('failed requests', language))}: {run.summary['requests']['failed']} ({escape(_errors(run))})</li>"
        for run, name in zip(runs, names, strict=True)
        if run.summary["requests"]["failed"]
    ]
    return f"<ul class='flags' id='flags'>{''.join(lines + failed)}</ul>" if lines + failed else ""


def _errors(run: Digest) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in run.summary["errors"].items())


def _verdicts(comparison: Comparison, language: str, titled: bool) -> str:
    """The answer in one sentence, then a row a metric."""
    title = say("against", language).format(a=comparison.names[0], b=comparison.names[1])
    heading = f"<h2>{escape(title)}</h2>" if titled else ""
    rows = "".join(
        f"<tr><td>{escape(verdicts.title(one, language))}</td>"
        f"<td class='number'>{escape(verdicts.values(one))}</td>"
        f"<td><span class='tag {one.verdict}'>{_tag(one.verdict, language)}</span></td>"
        f"<td>{escape(verdicts.judgement(one, language))}</td></tr>"
        for one in comparison.differences
    )
    differing = "".join(
        f"<li>{escape(say('differs', language))} {escape(str(one))}</li>"
        for one in comparison.mismatches
        if one.refused
    )
    warning = f"<ul class='flags'>{differing}</ul>" if differing else ""
    head = "".join(
        f"<th{side}>{escape(say(key, language))}</th>"
        for key, side in (("metric", ""), ("values", " class='number'"), ("verdict", ""), ("change", ""))
    )
    return (
        f"<section class='verdicts'>{heading}<ul class='answer'>{answer(comparison, language)}</ul>{warning}"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def answer(comparison: Comparison, language: str = "en") -> str:
    """What B is better at, worse at, the same at, and what these trials cannot tell: an HTML list item each."""
    groups = {"better": ("better",), "worse": ("worse",), "same": ("same",), "not shown": ("unclear", "unjudged")}
    items = []
    for word, held in groups.items():
        found = [one for one in comparison.differences if one.verdict in held]
        if word in ("better", "worse"):
            texts = [
                f"{verdicts.title(one, language)} {verdicts.judgement(one, language).split(' (')[0]}" for one in found
            ]
        else:
            texts = [verdicts.title(one, language) for one in found]
        if texts:
            items.append(f"<li><b class='{word}'>{escape(say(word, language))}</b> {escape(', '.join(texts))}</li>")
    return "".join(items) or f"<li>{escape(say('nothing to compare', language))}</li>"


def _tag(verdict: str, language: str) -> str:
    return escape(say(verdict, language)) if verdict in ("better", "worse") else ""


def _rows(rows: Rows) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if i in rows.left else ' class=number'}>{escape(text)}</{tag}>" for i, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows.rows)
    return (
        f"<h2>{escape(rows.title)}</h2><div class='scroll'><table><thead><tr>{cells('th', rows.header)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>" + (f"<p class='muted'>{escape(rows.note)}</p>" if rows.note else "")
    )


def _figure(identity: str, heading: str, caption: str) -> str:
    return (
        f"<h2>{escape(heading)}</h2><figure><figcaption>{escape(caption)}</figcaption>"
        f"<div class='plot' id='{identity}'></div></figure>"
    )


def _configuration(runs: Sequence[Digest], names: Sequence[str], language: str) -> str:
    """Options, host and versions of the first eight runs side by side; rows that differ are marked and come first."""
    shown = list(zip(runs, names, strict=True))[:COMPARED]
    flat = [_flat(run.skeleton) for run, _ in shown]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = [(len({one.get(key, "") for one in flat}) > 1, key, [one.get(key, "") for one in flat]) for key in keys]
    rows.sort(key=lambda row: not row[0])
    head = "".join(f"<th>{escape(name)}</th>" for _, name in shown)
    body = "".join(
        f"<tr{' class=differs' if differs else ''}><td>{escape(key)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for differs, key, values in rows
    )
    return (
        f"<h2>{escape(say('configuration', language))}</h2><p class='muted'>{escape(say('caption_configuration', language))}</p>"
        f"<details open><summary>{len(rows)}</summary><div class='scroll'><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _flat(run: Run) -> dict[str, str]:
    """`section.option` -> text, for everything that a person may want to look up."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        elif value not in (None, "", [], ()):
            found[prefix] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    for section, value in (("config", run.config), ("host", run.host), ("version", run.versions)):
        walk(section, value)
    if run.gate is not None:
        found["gate"] = f"{'passed' if run.gate.passed else 'FAILED'}: {run.gate.detail}"
    return found
