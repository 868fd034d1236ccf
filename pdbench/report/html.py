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

from pdbench.analysis import verdicts
from pdbench.analysis.compare import Comparison, compare
from pdbench.records import Run
from pdbench.report import energy_tables, plots
from pdbench.report.digest import Digest
from pdbench.report.language import say
from pdbench.report.rows import Rows
from pdbench.report.tables import digest_rows
from pdbench.report.words import gate_in_words

ANSWERS: dict[str, dict[str, tuple[str, ...]]] = {
    "trials": {"better": ("better",), "worse": ("worse",), "same": ("same",), "not shown": ("unclear", "unjudged")},
    "one trial": {"better so far": ("better",), "worse so far": ("worse",), "same so far": ("same",)},
}
DEVICE_FIGURES = 8
COMPARED = 8


def page(runs: Sequence[Digest], names: Sequence[str], sort_by: str | None = None, language: str = "en") -> str:
    """The whole page for these runs; the first is the baseline that the next ones are judged against."""
    comparisons = [
        compare_digests(runs[0], run, (names[0], name))
        for run, name in zip(runs[1 : COMPARED + 1], names[1:], strict=False)
    ]
    more = [say("more", language).format(len(names) - 4)] if len(names) > 4 else []
    title = (
        say("against", language).format(a=names[0], b=names[1]) if len(runs) == 2 else " · ".join([*names[:4], *more])
    )
    found = _plots(runs, names, language)
    flags = _flags(runs, names, language)
    body = [_header(runs, names, title, language)]
    if len(comparisons) == 1:
        body += [_verdicts(comparisons[0], language, False, flags)]
    else:
        body += [flags, *(_verdicts(one, language, True, "") for one in comparisons)]
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
    return compare(a.analysis, b.analysis, True, names)


def _plots(runs: Sequence[Digest], names: Sequence[str], language: str) -> dict[str, tuple[plots.Plot, str, str]]:
    """Every figure that there is something to draw for: its id, the figure, heading and caption."""
    drawn: dict[str, tuple[plots.Plot | None, str, str]] = {
        "distributions": (plots.distributions(runs, names, language), "Latency distributions", "caption_distributions"),
        "ttft": (plots.ttft_parts(runs, names, language), "Where TTFT goes", "caption_ttft"),
        "tbt": (plots.tbt_over_time(runs, names, language), "TBT over time", "caption_tbt"),
    }
    for number, (run, name) in enumerate(zip(runs[:DEVICE_FIGURES], names, strict=False)):
        heading = f"{say('Devices of', language)} {name}"
        drawn[f"devices-{number}"] = (plots.devices(run, language), heading, _devices_caption(run, language))
    drawn["trade-off"] = (plots.trade_off(runs, names, language), "Trade-off", "caption_trade_off")
    drawn["energy"] = (plots.energy(runs, names, language), "Energy", "caption_energy")
    return {
        key: (plot, say(heading, language), say(caption, language))
        for key, (plot, heading, caption) in drawn.items()
        if plot
    }


def _devices_caption(run: Digest, language: str) -> str:
    """What is drawn, and where power was not measured: why, and what stands in for it."""
    caption = say("caption_devices_many" if run.in_flight[0] else "caption_devices", language)
    if "power_w" not in run.missing or not run.curves:
        return caption
    instead = say("cpu_utilization_pct", language)
    beside = f"; {say('stands in', language).format(instead)}" if "cpu_utilization_pct" in run.curves else ""
    return f"{caption} {say('power_w', language)}: {say('not measured', language)} ({run.missing['power_w']}){beside}."


def _header(runs: Sequence[Digest], names: Sequence[str], title: str, language: str) -> str:
    """Title, load, machine and correctness gate; a machine a run where they differ (one GPU against two), for the first four."""
    machines = dict(zip(names[:4], [run.machine for run in runs[:4]], strict=True))
    lines = [f"{name}: {machine}" for name, machine in machines.items()]
    lines = lines if len(set(machines.values())) > 1 else [runs[0].machine]
    shown = "<br>".join(map(escape, lines))
    gates = [(name, run.skeleton.gate) for run, name in zip(runs, names, strict=True) if run.skeleton.gate is not None]
    gate = "".join(
        f"<p class='gate {'better' if one.passed else 'worse'}'>{escape(f'{name}: ' if len(gates) > 1 else '')}{escape(gate_in_words(one, language))}</p>"
        for name, one in gates[:4]
    )
    gate = gate or f"<p class='gate muted'>{escape(say('gate not run', language))}</p>"
    return (
        f"<header><div><h1>{escape(title)}</h1><p>{escape(runs[0].load)}</p><p class='muted'>{shown}</p>{gate}</div>"
        f"<button id='theme' type='button'>{escape(say('light / dark', language))}</button></header>"
    )


def _flags(runs: Sequence[Digest], names: Sequence[str], language: str) -> str:
    """A line a run and kind of flag, then the failed requests."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        for flag in run.skeleton.flags:
            kinds.setdefault((name, flag.name), []).append(flag.detail)
    lines = [
        f"<li><b>{escape(name)}, {escape(kind)}:</b> {escape('; '.join(details))}</li>"
        for (name, kind), details in kinds.items()
    ]
    failed = [
        f"<li><b>{escape(name)}:</b> {escape(say('failed requests', language))}: {run.summary['requests']['failed']} ({escape(_errors(run))})</li>"
        for run, name in zip(runs, names, strict=True)
        if run.summary["requests"]["failed"]
    ]
    return f"<ul class='flags' id='flags'>{''.join(lines + failed)}</ul>" if lines + failed else ""


def _errors(run: Digest) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in run.summary["errors"].items())


def _verdicts(comparison: Comparison, language: str, titled: bool, flags: str) -> str:
    """The answer in one sentence, what a reader must mind, then a row a metric."""
    title = say("against", language).format(a=comparison.names[0], b=comparison.names[1])
    heading = f"<h2>{escape(title)}</h2>" if titled else ""
    judged = not comparison.one_trial
    rows = "".join(
        f"<tr><td>{escape(verdicts.title(one, language))}</td>"
        f"<td class='number'>{escape(verdicts.values(one))}</td>"
        + f"<td><span class='tag {one.verdict}'>{_tag(one.verdict, language)}</span></td>" * judged
        + f"<td>{escape(verdicts.judgement(one, language))}</td></tr>"
        for one in comparison.differences
    )
    differing = "".join(
        f"<li>{escape(say('differs', language))} {escape(str(one))}</li>"
        for one in comparison.mismatches
        if one.refused
    )
    warning = f"<ul class='flags'>{differing}</ul>" if differing else ""
    columns = {"metric": "", "values": " class='number'"}
    columns |= {"verdict": "", "change": ""} if judged else {"change seen": ""}
    head = "".join(f"<th{side}>{escape(say(key, language))}</th>" for key, side in columns.items())
    return (
        f"<section class='verdicts'>{heading}<ul class='answer'>{answer(comparison, language)}</ul>{flags}{warning}"
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p class='muted'>{escape(say('abbreviations', language))}</p></section>"
    )


def answer(comparison: Comparison, language: str = "en") -> str:
    """What B is better at, worse at, the same at, and what these trials cannot tell: an HTML list item each.

    One trial has no verdicts: what it hints at, with the advice to measure again.
    """
    items = []
    for word, held in ANSWERS["one trial" if comparison.one_trial else "trials"].items():
        found = [
            one for one in comparison.differences if (one.leaning if comparison.one_trial else one.verdict) in held
        ]
        texts = [verdicts.title(one, language) for one in found]
        if held[0] in ("better", "worse"):
            changes = [verdicts.judgement(one, language).split(" (")[0] for one in found]
            texts = [f"{title} {change}" for title, change in zip(texts, changes, strict=True)]
        if texts:
            items.append(f"<li><b class='{held[0]}'>{escape(say(word, language))}</b> {escape(', '.join(texts))}</li>")
    if not items:
        return f"<li>{escape(say('nothing to compare', language))}</li>"
    trials = min(one.trials for one in comparison.differences)
    sure = say("sure", language).format(k=trials)
    return f"<li>{escape(verdicts.advice(comparison, language) or sure)}</li>{''.join(items)}"


def _tag(verdict: str, language: str) -> str:
    return escape(say(verdict, language)) if verdict in ("better", "worse") else ""


def _rows(rows: Rows) -> str:
    note = f"<p class='muted'>{escape(rows.note)}</p>" if rows.note else ""
    return f"<h2>{escape(rows.title)}</h2>{_table(rows)}{note}"


def _table(rows: Rows) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if i in rows.left else ' class=number'}>{escape(text)}</{tag}>" for i, text in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows.rows)
    return f"<div class='scroll'><table><thead><tr>{cells('th', rows.header)}</tr></thead><tbody>{body}</tbody></table></div>"


def _figure(identity: str, heading: str, caption: str) -> str:
    return (
        f"<h2>{escape(heading)}</h2><figure><figcaption>{escape(caption)}</figcaption>"
        f"<div class='plot' id='{identity}'></div></figure>"
    )


def _configuration(runs: Sequence[Digest], names: Sequence[str], language: str) -> str:
    """Options, host and versions of the first eight runs side by side: those that differ, and folded away the others."""
    flat = [_flat(run.skeleton) for run in runs[:COMPARED]]
    rows = {key: [one.get(key, "") for one in flat] for key in dict.fromkeys(key for one in flat for key in one)}
    header = ["", *names[:COMPARED]]
    differing = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
    equal = [[key, *values] for key, values in rows.items() if len(set(values)) == 1]
    heading = say("configuration", language)
    left = tuple(range(len(header)))
    shown = f"<h2>{escape(heading)}</h2>" + (
        f"<p class='muted'>{escape(say('caption_configuration', language))}</p>"
        f"<div class='differs'>{_table(Rows('', header, differing, [], left))}</div>"
        if differing
        else ""
    )
    folded = f"<summary>{escape(say('same options', language).format(len(equal)))}</summary>"
    return f"{shown}<details>{folded}{_table(Rows('', header, equal, [], left))}</details>"


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
