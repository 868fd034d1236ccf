"""What `pdbench search` found: a sentence, a table and a picture out of search.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.files import write_whole
from pdbench.report import tables, text
from pdbench.report.chart_types import BAD, MUTED, Axis, Chart, Panel, Series, shades

FILE, PICTURE = "search.json", "search.png"
COLUMNS = {
    "rate_per_s": "rate\n/s",
    "low": "low",
    "high": "high",
    "attained_pct": "within\nSLO %",
    "rate_per_s_per_gpu": "rate /s\nper GPU",
    "goodput_per_s_per_gpu": "goodput /s\nper GPU",
    "j_per_good_request": "J per good\nrequest",
    "goodput_per_w": "goodput\n/s per W",
    "loads": "loads",
    "load_s": "load\ns",
}


def present(document: dict[str, Any], out: Path, console: Console) -> list[RunAnalysis]:
    """Add what the saved runs say to the document, write it and its picture into `out`, print sentence and table.

    Returns the analyses of the runs at the rates found.
    """
    from pdbench.report import mpl

    analyses = []
    for point in document["points"]:
        goodput = load_analysis(out / point["run"]).summary.goodput
        point["j_per_good_request"] = goodput.j_per_good_request
        point["goodput_per_s"] = goodput.requests_per_s
    for entry in document["deployments"]:
        if "run" in entry:
            analysis = load_analysis(out / entry["run"])
            analyses.append(analysis)
            _enter(entry, analysis)
    document["sentence"] = sentence(document)
    write_whole(out / FILE, json.dumps(document, indent=1).encode())
    write_whole(out / PICTURE, mpl.picture(mpl.chart, chart(document), 16, 9))
    console.print(Text(document["sentence"], style="bold"))
    console.print(tables.terminal(table(document)))
    console.print(f"answer: {out / FILE}  picture: {out / PICTURE}", markup=False, highlight=False, soft_wrap=True)
    return analyses


def _enter(entry: dict[str, Any], analysis: RunAnalysis) -> None:
    """The figures at the rate found."""
    goodput, gpus = analysis.summary.goodput, analysis.gpus
    entry["gpus"] = gpus
    entry["rate_per_s_per_gpu"] = entry["rate_per_s"] / gpus if gpus and entry["rate_per_s"] else None
    entry["goodput_per_s"] = goodput.requests_per_s
    entry["goodput_per_s_per_gpu"] = goodput.requests_per_s_per_device
    entry["j_per_good_request"] = goodput.j_per_good_request
    entry["goodput_per_w"] = analysis.summary.energy.goodput_per_w


def _slo(document: Mapping[str, Any]) -> str:
    limits = [f"{name} {limit:g} ms" for name, limit in text.slo(document["slo"]).items()]
    return f"{' and '.join(limits)} for {document['attain_pct']:g} % of requests"


def sentence(document: Mapping[str, Any]) -> str:
    """The answer: each deployment's rate with its interval, best first, and what the best gains on the next."""
    per_gpu = all(entry.get("rate_per_s_per_gpu") for entry in document["deployments"])
    key = "rate_per_s_per_gpu" if per_gpu else "rate_per_s"
    ordered = sorted(document["deployments"], key=lambda entry: -(entry.get(key) or 0.0))
    found = [entry for entry in ordered if entry.get("rate_per_s")]
    parts: list[str] = []
    for entry in found:
        gpus = f" ({entry['gpus']} GPU{'s' * (entry['gpus'] > 1)})" if entry.get("gpus") else ""
        rate, low, high = (text.number(entry[name]) for name in ("rate_per_s", "low", "high"))
        bounds = f" ({low} to {high})" if entry["high"] is not None else " or more"
        verb = "carries " if not parts else ""
        parts.append(f"{entry['name']}{gpus} {verb}{rate}{' requests/s' if not parts else ''}{bounds}")
    words = f"Within {_slo(document)}, {', '.join(parts)}" if parts else f"No rate keeps {_slo(document)}"
    if len(found) > 1:
        best, second = found[:2]
        words += f": {best[key] / second[key]:.2g} times {second['name']}{' per GPU' if per_gpu else ''}"
        apart = best["low"] / (best["gpus"] if per_gpu else 1) > (second["high"] or float("inf")) / (
            second["gpus"] if per_gpu else 1
        )
        if not apart:
            words += ", which the intervals do not tell apart"
        joules = [entry.get("j_per_good_request") for entry in (best, second)]
        if all(joules):
            change = joules[0] / joules[1] - 1
            words += f", for {abs(change):.0%} {'less' if change < 0 else 'more'} energy per good request"
    for entry in ordered:
        if not entry.get("rate_per_s") and entry.get("closest"):
            near = entry["closest"]
            at = f"{text.number(near['rate_per_s'])} requests/s" if near["rate_per_s"] else "one request at a time"
            limit = text.SLO.get(entry.get("limited_by") or "", "no limit")
            words += f"; {entry['name']} holds no rate: closest is {text.number(near['attained_pct'])} % at {at}, {limit} breaks it"
        if entry.get("rate_per_s") and entry.get("attained_pct", 100.0) < document["attain_pct"]:
            words += (
                f"; {entry['name']}'s confirming run kept it for {text.number(entry['attained_pct'])} % of its requests"
            )
        if entry.get("client_limited"):
            words += f"; the client was the limit of {entry['name']}, which may carry more"
    return words + "."


def table(document: Mapping[str, Any]) -> tables.Table:
    """A row per deployment."""
    known = {
        key: words for key, words in COLUMNS.items() if any(e.get(key) is not None for e in document["deployments"])
    }
    rows = [
        [entry["name"], *(entry.get(key) for key in known), text.SLO.get(entry.get("limited_by") or "", "")]
        for entry in document["deployments"]
    ]
    return tables.Table(
        title=f"The highest rate within {_slo(document)}, with its 95 % interval",
        header=["deployment", *known.values(), "first limit\nto break"],
        rows=rows,
        left=(0, len(known) + 1),
    )


def chart(document: Mapping[str, Any]) -> Chart:
    """Attainment against rate with what was found; goodput against the SLO's scale; energy against rate."""
    entries: Sequence[dict[str, Any]] = document["deployments"]
    colours = dict(
        zip(
            (entry["name"] for entry in entries),
            shades([entry["name"].partition(",")[0] for entry in entries]),
            strict=True,
        )
    )
    per_gpu = all(entry.get("gpus") for entry in entries) and bool(entries)
    attained, scaled, joules = [], [], []
    for entry in entries:
        name, shade, gpus = entry["name"], colours[entry["name"]], entry["gpus"] if per_gpu else 1
        points = sorted(
            (point for point in document["points"] if point["deployment"] == name and point["rate_per_s"]),
            key=lambda point: point["rate_per_s"],
        )
        if points:
            at, shares = [point["rate_per_s"] for point in points], [point["attained_pct"] for point in points]
            attained.append(Series(kind="points", name=name, x=at, y=shares, shade=shade, opacity=0.6, size=6))
        if entry.get("rate_per_s"):
            goal, high = document["attain_pct"], entry["high"] or max(point["rate_per_s"] for point in points)
            attained.append(Series(x=[entry["low"], high], y=[goal, goal], shade=shade, width=5, opacity=0.5))
            found = f"{text.number(entry['rate_per_s'])}/s"
            attained.append(
                Series(kind="points", x=[entry["rate_per_s"]], y=[goal], labels=[found], shade=shade, size=11)
            )
        if scales := entry.get("slo_scale"):
            x, y = (
                [each[key] / (gpus if key == "rate_per_s" else 1) for each in scales] for key in ("scale", "rate_per_s")
            )
            scaled.append(Series(name=name, x=x, y=y, shade=shade, marker="o"))
        energy = [point for point in points if point.get("j_per_good_request")]
        if energy:
            at, used = [e["rate_per_s"] / gpus for e in energy], [e["j_per_good_request"] for e in energy]
            joules.append(Series(name=name, x=at, y=used, shade=shade, marker="o"))
            if entry.get("j_per_good_request"):
                at = [entry["rate_per_s"] / gpus]
                joules.append(
                    Series(kind="points", x=at, y=[entry["j_per_good_request"]], shade=BAD, size=15, hollow=True)
                )
    every = " per GPU" if per_gpu else ""
    if attained:
        rates = [point["rate_per_s"] for point in document["points"] if point["rate_per_s"]]
        goal = document["attain_pct"]
        attained.append(Series(name="goal", x=[0, max(rates)], y=[goal, goal], shade=MUTED, dash="dot"))
    panels = [
        Panel(
            title="Requests within the SLO",
            series=attained,
            x=Axis(label="requests/s", low=0),
            y=Axis(label="% of requests", low=0, high=104),
            not_measured="no load was measured",
        ),
        Panel(
            title=f"Rate held{every} against the SLO's scale",
            series=scaled,
            x=Axis(label="all limits times"),
            y=Axis(label=f"requests/s{every}", low=0),
            not_measured="no scale is known well enough",
        ),
        Panel(
            title="Energy per request within the SLO",
            series=joules,
            x=Axis(label=f"requests/s{every}", low=0),
            y=Axis(label="J", low=0),
            not_measured="no device has an energy counter here",
        ),
    ]
    return Chart(
        key="search", title=f"The highest rate within {_slo(document)}", panels=panels, caption="bars: 95 % intervals"
    )
