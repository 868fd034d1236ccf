"""What `pdbench search` found: sentences, tables and pictures out of search.json."""

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
from pdbench.report.search_charts import chart, clocks_chart, loads, searched, slo, tuned
from pdbench.report.text import translate as _

FILE, PICTURE, CLOCKS_PICTURE = "search.json", "search.png", "search-clocks.png"
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
    """Add what the saved runs say to the document, write it and its pictures into `out`, print sentence and tables.

    Returns the analyses of the runs at the rates and clocks found.
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
        if entry.get("tuned", {}).get("run"):
            analyses.append(load_analysis(out / entry["tuned"]["run"]))
    document["sentence"] = sentence(document)
    write_whole(out / FILE, json.dumps(document, indent=1).encode())
    pictures = [out / PICTURE] if searched(document) else []
    for path in pictures:
        drawn = chart(document)
        write_whole(path, mpl.picture(mpl.chart, drawn, 16, 9 if len(drawn.panels) > 2 else 5.5))
    if tuned(document):
        pictures.append(out / CLOCKS_PICTURE)
        write_whole(out / CLOCKS_PICTURE, mpl.picture(mpl.chart, clocks_chart(document), 16, 8))
    if document["sentence"]:
        console.print(Text(document["sentence"], style="bold"))
    for shown in (table(document) if searched(document) else None, clocks_table(document)):
        if shown:
            console.print(tables.terminal(shown))
    if pictures:
        names = " ".join(map(str, pictures))
        console.print(f"answer: {out / FILE}  picture: {names}", markup=False, highlight=False, soft_wrap=True)
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
    """The answer: each deployment's rate with its interval, best first, and what the best gains on the next; then the cheapest clocks."""
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
    # Every load kept the SLO, and none says which rate does.
    unknown = [
        entry
        for entry in entries
        if not entry.get("rate_per_s") and entry.get("closest", {}).get("attained_pct", 0.0) >= document["attain_pct"]
    ]
    if not parts and len(unknown) < len(entries):
        words = _("No rate keeps {0}", slo(document))
    elif not parts and unknown:
        words = _("No rate is known yet within {0}", slo(document))
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
        if entry in unknown:
            if entry.get("high"):
                words += _("; {0} carries less than {1}", entry["name"], text.number(entry["high"]))
            words += "" if entry.get("client_limited") else _("; {0} was not loaded for long enough", entry["name"])
        elif not entry.get("rate_per_s") and entry.get("closest"):
            near = entry["closest"]
            at = _("{0} requests/s", text.number(near["rate_per_s"])) if near["rate_per_s"] else _("one at a time")
            share, limit = text.number(near["attained_pct"]), _limit(entry)
            words += _("; {0} holds no rate: closest is {1} % at {2}, {3} breaks it", entry["name"], share, at, limit)
        if entry.get("rate_per_s") and round(entry.get("attained_pct", 100.0), 1) < document["attain_pct"]:
            share = text.number(entry["attained_pct"])
            words += _("; {0}'s confirming run kept it for {1} % of its requests", entry["name"], share)
        if entry.get("client_limited"):
            words += _("; the client was the limit of {0}, which may carry more", entry["name"])
    return _(" ").join(filter(None, (words and words + _("."), _clocks_sentence(document))))


def _limit(entry: Mapping[str, Any]) -> str:
    return _(text.SLO.get(entry.get("limited_by") or "", "no limit"))


def _change(value: float, base: float) -> str:
    change = value / base - 1
    return _("{0}% less" if change < 0 else "{0}% more", f"{100 * abs(change):.0f}")


def _clocks_sentence(document: Mapping[str, Any]) -> str:
    """What the cheapest clocks cost and save; where all deployments had the same rate, also the best beside the next."""
    entries = sorted(tuned(document), key=lambda entry: entry["tuned"].get("j_per_good_request") or float("inf"))
    parts = []
    for entry in entries:
        found, before = entry["tuned"], entry["tuned"].get("before", {})
        at = _("{0} requests/s", text.number(found["rate_per_s"]))
        if found["setting"] is None:
            parts.append(
                _("{0} keeps {1} at {2} with no clock: {3} breaks it", entry["name"], slo(document), at, _limit(found))
            )
            continue
        joules, clocks = text.number(found["j_per_good_request"]), text.setting(found["setting"])
        words = _("{0} needs least energy at {1}: {2} J per good request at {3}", entry["name"], clocks, joules, at)
        if not before:
            words += _(" by what is measured so far")
        elif before["setting"] != found["setting"] and before["j_per_good_request"]:
            change = _change(found["j_per_good_request"], before["j_per_good_request"])
            words += _(", {0} than at {1}", change, text.setting(before["setting"]))
        if found["attained_pct"] < document["attain_pct"]:
            words += _(
                ", but the confirming run kept the SLO for {0} % of its requests", text.number(found["attained_pct"])
            )
        elif not found["kept"]:
            words += _(", but the confirming run did not hold these clocks, or its client was the limit")
        parts.append(words)
    known = [entry for entry in entries if entry["tuned"].get("j_per_good_request")]
    if len(known) > 1 and len({entry["tuned"]["rate_per_s"] for entry in known}) == 1:
        first, second = known[:2]
        change = _change(first["tuned"]["j_per_good_request"], second["tuned"]["j_per_good_request"])
        parts.append(_("each at its own cheapest, {0} needs {1} than {2}", first["name"], change, second["name"]))
    return _("; ").join(parts) + _(".") if parts else ""


def table(document: Mapping[str, Any]) -> tables.Table:
    """A row per deployment."""
    entries = [e if e.get("rate_per_s") else e | {"low": None} for e in searched(document)]
    known = {key: words for key, words in COLUMNS.items() if any(e.get(key) is not None for e in entries)}
    return tables.Table(
        title=_("The highest rate within {0}, with its 95 % interval", slo(document)),
        header=[_("deployment"), *map(_, known.values()), _("first limit\nto break")],
        rows=[
            [e["name"], *(e.get(key) for key in known), _(text.SLO.get(e.get("limited_by") or "", ""))] for e in entries
        ],
        left=(0, len(known) + 1),
    )


def clocks_table(document: Mapping[str, Any]) -> tables.Table | None:
    """A row per deployment: the cheapest clocks and caps, and what they save."""
    rows = []
    for entry in tuned(document):
        found, before = entry["tuned"], entry["tuned"].get("before", {})
        joules, usual = found.get("j_per_good_request"), before.get("j_per_good_request")
        rows.append(
            [
                entry["name"],
                found["rate_per_s"],
                _("none keeps the SLO") if found["setting"] is None else text.setting(found["setting"]),
                found.get("attained_pct"),
                joules,
                usual,
                100 * (joules / usual - 1) if joules and usual else None,
                found.get("loads"),
            ]
        )
    header = [
        "deployment",
        "rate\n/s",
        "cheapest clocks",
        "within\nSLO %",
        "J per good\nrequest",
        "as it was",
        "change %",
        "loads",
    ]
    title = _("The least energy within {0}", slo(document))
    return tables.Table(title=title, header=[*map(_, header)], rows=rows, left=(0, 2)) if rows else None
