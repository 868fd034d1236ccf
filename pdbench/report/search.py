"""What `pdbench search` found: a sentence, a table and a picture out of search.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.files import write_whole
from pdbench.report import tables, text
from pdbench.report.search_charts import chart, loads, searched, slo
from pdbench.report.text import translate as _

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
        _enter_scales(entry, document)
    document["sentence"] = sentence(document)
    write_whole(out / FILE, json.dumps(document, indent=1).encode())
    if searched(document):
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


def _enter_scales(entry: dict[str, Any], document: Mapping[str, Any]) -> None:
    """Goodput and energy at the rate held under every scale of the SLO: there the share of good requests is the one that must be,
    and the energy of a request is that of the loads around it."""
    share = document["attain_pct"] / 100
    spent = sorted(
        (point["rate_per_s"], point["j_per_good_request"] * point["attained_pct"] / 100)
        for point in loads(document, entry["name"])
        if point.get("j_per_good_request") and point.get("held") is not False
    )
    for scale in entry.get("slo_scale", ()):
        rate = scale["rate_per_s"]
        scale["goodput_per_s"] = share * rate
        if entry.get("gpus"):
            scale["goodput_per_s_per_gpu"] = share * rate / entry["gpus"]
        if spent and spent[0][0] <= rate <= spent[-1][0]:
            rates, joules = zip(*spent, strict=True)
            scale["j_per_good_request"] = float(np.interp(rate, rates, joules)) / share


def sentence(document: Mapping[str, Any]) -> str:
    """The answer: each deployment's rate with its interval, best first, and what the best gains on the next."""
    entries = searched(document)
    per_gpu = all(entry.get("rate_per_s_per_gpu") for entry in entries)
    key = "rate_per_s_per_gpu" if per_gpu else "rate_per_s"
    ordered = sorted(entries, key=lambda entry: -(entry.get(key) or 0.0))
    found = [entry for entry in ordered if entry.get("rate_per_s")]
    parts: list[str] = []
    for entry in found:
        words = "{0} (1 GPU)" if entry.get("gpus") == 1 else "{0} ({1} GPUs)"
        name = _(words, entry["name"], entry["gpus"]) if entry.get("gpus") else entry["name"]
        rate, low, high = (text.number(entry[name]) for name in ("rate_per_s", "low", "high"))
        bounds = _("({0} to {1})", low, high) if entry["high"] is not None else _("or more")
        parts.append(_("{0} {1} {2}" if parts else "{0} carries {1} requests/s {2}", name, rate, bounds))
    words = _("Within {0}, {1}", slo(document), _(", ").join(parts)) if parts else ""
    if not parts and entries:
        words = _("No rate keeps {0}", slo(document))
    if len(found) > 1:
        best, second = found[:2]
        gain = f"{best[key] / second[key]:.2g}"
        words += _(": {0} times {1} per GPU" if per_gpu else ": {0} times {1}", gain, second["name"])
        apart = best["low"] / (best["gpus"] if per_gpu else 1) > (second["high"] or float("inf")) / (
            second["gpus"] if per_gpu else 1
        )
        if not apart:
            words += _(", which the intervals do not tell apart")
        if best.get("j_per_good_request") and second.get("j_per_good_request"):
            change = _change(best["j_per_good_request"], second["j_per_good_request"])
            words += _(", for {0} energy per good request", change)
    for entry in ordered:
        if not entry.get("rate_per_s") and entry.get("closest"):
            near = entry["closest"]
            at = (
                _("{0} requests/s", text.number(near["rate_per_s"]))
                if near["rate_per_s"]
                else _("one request at a time")
            )
            share, limit = text.number(near["attained_pct"]), _limit(entry)
            words += _("; {0} holds no rate: closest is {1} % at {2}, {3} breaks it", entry["name"], share, at, limit)
        if entry.get("rate_per_s") and entry.get("attained_pct", 100.0) < document["attain_pct"]:
            share = text.number(entry["attained_pct"])
            words += _("; {0}'s confirming run kept it for {1} % of its requests", entry["name"], share)
        if entry.get("client_limited"):
            words += _("; the client was the limit of {0}, which may carry more", entry["name"])
    return words and words + _(".")


def _limit(entry: Mapping[str, Any]) -> str:
    return _(text.SLO.get(entry.get("limited_by") or "", "no limit"))


def _change(value: float, base: float) -> str:
    change = value / base - 1
    return _("{0}% less" if change < 0 else "{0}% more", f"{100 * abs(change):.0f}")


def table(document: Mapping[str, Any]) -> tables.Table:
    """A row per deployment."""
    entries = searched(document)
    known = {key: words for key, words in COLUMNS.items() if any(e.get(key) is not None for e in entries)}
    return tables.Table(
        title=_("The highest rate within {0}, with its 95 % interval", slo(document)),
        header=[_("deployment"), *map(_, known.values()), _("first limit\nto break")],
        rows=[
            [e["name"], *(e.get(key) for key in known), _(text.SLO.get(e.get("limited_by") or "", ""))] for e in entries
        ],
        left=(0, len(known) + 1),
    )
