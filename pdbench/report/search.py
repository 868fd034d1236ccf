"""What `pdbench search` found: sentences, tables and pictures out of search.json."""

from math import inf
from pathlib import Path

import msgspec
import numpy as np
from msgspec import structs
from rich.console import Console
from rich.text import Text

from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.files import write_whole
from pdbench.report import tables, text
from pdbench.report.search_charts import chart, clocks_chart, slo
from pdbench.report.text import translate as _
from pdbench.search.document import FILE, Choice, Document, Held

PICTURE, CLOCKS_PICTURE = "search.png", "search-clocks.png"
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


def save(document: Document, out: Path) -> None:
    write_whole(out / FILE, msgspec.json.format(msgspec.json.encode(document), indent=1))


def present(document: Document, out: Path, console: Console) -> list[RunAnalysis]:
    """Add what the saved runs say to the document, write it and its pictures into `out`, print sentence and tables.

    Returns the analyses of the runs at the rates and clocks found.
    """
    from pdbench.report import mpl

    analyses = []
    for point in document.points:
        goodput = load_analysis(out / point.run).summary.goodput
        point.j_per_good_request, point.goodput_per_s = goodput.j_per_good_request, goodput.requests_per_s
    for entry in document.deployments:
        if entry.run:
            analyses.append(load_analysis(out / entry.run))
            _enter(entry, analyses[-1])
        _enter_scales(entry, document)
        if entry.tuned and entry.tuned.run:
            analyses.append(load_analysis(out / entry.tuned.run))
    document.sentence = sentence(document)
    save(document, out)
    pictures = [out / PICTURE] if document.searched() else []
    for path in pictures:
        drawn = chart(document)
        write_whole(path, mpl.picture(mpl.chart, drawn, 16, 9 if len(drawn.panels) > 2 else 5.5))
    if document.tuned():
        pictures.append(out / CLOCKS_PICTURE)
        write_whole(out / CLOCKS_PICTURE, mpl.picture(mpl.chart, clocks_chart(document), 16, 8))
    if document.sentence:
        console.print(Text(document.sentence, style="bold"))
    for shown in (table(document) if document.searched() else None, clocks_table(document)):
        if shown:
            console.print(tables.terminal(shown))
    if pictures:
        names = " ".join(map(str, pictures))
        console.print(f"answer: {out / FILE}  picture: {names}", markup=False, highlight=False, soft_wrap=True)
    return analyses


def _enter(entry: Held, analysis: RunAnalysis) -> None:
    """The figures at the rate found."""
    goodput, gpus = analysis.summary.goodput, analysis.gpus
    entry.gpus, serve = gpus, analysis.config.get("serve") or {}
    if analysis.name == "disaggregated" and serve:
        entry.layout = f"{serve['prefill_instances']}P{serve['decode_instances']}D"
    entry.rate_per_s_per_gpu = entry.rate_per_s / gpus if gpus and entry.rate_per_s else None
    entry.goodput_per_s = goodput.requests_per_s
    entry.goodput_per_s_per_gpu = goodput.requests_per_s_per_device
    entry.j_per_good_request = goodput.j_per_good_request
    entry.goodput_per_w = analysis.summary.energy.goodput_per_w


def _enter_scales(entry: Held, document: Document) -> None:
    """Goodput and energy at the rate held under every scale of the SLO: there the share of good requests is the one that must be,
    and the energy of a request is that of the loads around it."""
    share = document.attain_pct / 100
    spent = sorted(
        (rate, point.j_per_good_request * point.attained_pct / 100)
        for rate, point in document.loads(entry.name)
        if point.j_per_good_request and point.held is not False
    )
    for scale in entry.slo_scale:
        scale.goodput_per_s = share * scale.rate_per_s
        if entry.gpus:
            scale.goodput_per_s_per_gpu = share * scale.rate_per_s / entry.gpus
        if spent and spent[0][0] <= scale.rate_per_s <= spent[-1][0]:
            rates, joules = zip(*spent, strict=True)
            scale.j_per_good_request = float(np.interp(scale.rate_per_s, rates, joules)) / share


def sentence(document: Document) -> str:
    """The answer: each deployment's rate with its interval, best first, and what the best gains on the next; then the cheapest clocks."""
    entries = document.searched()
    per_gpu = all(entry.rate_per_s_per_gpu for entry in entries)

    def rate_of(entry: Held) -> float:
        return (entry.rate_per_s_per_gpu if per_gpu else entry.rate_per_s) or 0.0

    ordered = sorted(entries, key=rate_of, reverse=True)
    found = [entry for entry in ordered if entry.rate_per_s]
    parts: list[str] = []
    for entry in found:
        words = "{0} (1 GPU)" if entry.gpus == 1 else "{0} ({1} GPUs)"
        name = _named(entry)
        name = _(words, name, entry.gpus) if entry.gpus else name
        rate, low, high = map(text.number, (entry.rate_per_s, entry.low, entry.high))
        bounds = _("({0} to {1})", low, high) if entry.high is not None else _("or more")
        parts.append(_("{0} {1} {2}" if parts else "{0} carries {1} requests/s {2}", name, rate, bounds))
    words = _("Within {0}, {1}", slo(document), _(", ").join(parts)) if parts else ""
    # Every load kept the SLO, and none says which rate does.
    unknown = [
        entry
        for entry in entries
        if not entry.rate_per_s and entry.closest and entry.closest.attained_pct >= document.attain_pct
    ]
    if not parts and len(unknown) < len(entries):
        words = _("No rate keeps {0}", slo(document))
    elif not parts and unknown:
        words = _("No rate is known yet within {0}", slo(document))
    if len(found) > 1:
        best, second = found[:2]
        gain = f"{rate_of(best) / rate_of(second):.2g}"
        words += _(": {0} times {1} per GPU" if per_gpu else ": {0} times {1}", gain, second.name)
        low_of_best, high_of_second = (
            (bound or 0.0) / ((entry.gpus or 1) if per_gpu else 1)
            for bound, entry in ((best.low, best), (second.high or inf, second))
        )
        if low_of_best <= high_of_second:
            words += _(", which the intervals do not tell apart")
        if best.j_per_good_request and second.j_per_good_request:
            words += _(", for {0} energy per good request", _change(best.j_per_good_request, second.j_per_good_request))
    for entry in ordered:
        if entry in unknown:
            if entry.high:
                words += _("; {0} carries less than {1}", entry.name, text.number(entry.high))
            words += "" if entry.client_limited else _("; {0} was not loaded for long enough", entry.name)
        elif not entry.rate_per_s and (near := entry.closest):
            at = _("{0} requests/s", text.number(near.rate_per_s)) if near.rate_per_s else _("one at a time")
            share, limit = text.number(near.attained_pct), _limit(entry)
            words += _("; {0} holds no rate: closest is {1} % at {2}, {3} breaks it", entry.name, share, at, limit)
        if entry.rate_per_s and entry.attained_pct is not None and round(entry.attained_pct, 1) < document.attain_pct:
            share = text.number(entry.attained_pct)
            words += _("; {0}'s confirming run kept it for {1} % of its requests", entry.name, share)
        if entry.client_limited:
            words += _("; the client was the limit of {0}, which may carry more", entry.name)
    return _(" ").join(filter(None, (words and words + _("."), _clocks_sentence(document))))


def _named(entry: Held) -> str:
    """With 2P2D where a deployment has several instances of a phase, which its GPUs alone do not say."""
    return entry.name if entry.layout in (None, "1P1D") else f"{entry.name} {entry.layout}"


def _limit(entry: Held | Choice) -> str:
    return _(text.SLO.get(entry.limited_by or "", "no limit"))


def _change(value: float, base: float) -> str:
    change = value / base - 1
    return _("{0}% less" if change < 0 else "{0}% more", f"{100 * abs(change):.0f}")


def _clocks_sentence(document: Document) -> str:
    """What the cheapest clocks cost and save; where all deployments had the same rate, also the best beside the next."""
    entries = sorted(document.tuned(), key=lambda each: each[1].j_per_good_request or inf)
    parts = []
    for name, found in entries:
        at, before = _("{0} requests/s", text.number(found.rate_per_s)), found.before
        if found.setting is None:
            parts.append(_("{0} keeps {1} at {2} with no clock: {3} breaks it", name, slo(document), at, _limit(found)))
            continue
        joules, clocks = text.number(found.j_per_good_request), text.setting(found.setting)
        words = _("{0} needs least energy at {1}: {2} J per good request at {3}", name, clocks, joules, at)
        if not before:
            words += _(" by what is measured so far")
        elif before.setting and before.setting != found.setting and before.j_per_good_request:
            change = _change(found.j_per_good_request or 0.0, before.j_per_good_request)
            words += _(", {0} than at {1}", change, text.setting(before.setting))
        if (found.attained_pct or 0.0) < document.attain_pct:
            share = text.number(found.attained_pct)
            words += _(", but the confirming run kept the SLO for {0} % of its requests", share)
        elif not found.kept:
            words += _(", but the confirming run did not hold these clocks, or its client was the limit")
        parts.append(words)
    known = [(name, found.rate_per_s, found.j_per_good_request) for name, found in entries if found.j_per_good_request]
    if len(known) > 1 and len({rate for _name, rate, _joules in known}) == 1:
        (first, _rate, least), (second, _rate, more) = known[:2]
        parts.append(_("each at its own cheapest, {0} needs {1} than {2}", first, _change(least, more), second))
    return _("; ").join(parts) + _(".") if parts else ""


def table(document: Document) -> tables.Table:
    """A row per deployment."""
    rows = [structs.asdict(entry) | {"name": _named(entry)} for entry in document.searched()]
    rows = [row if row["rate_per_s"] else row | {"low": None} for row in rows]
    known = {key: words for key, words in COLUMNS.items() if any(row[key] is not None for row in rows)}
    return tables.Table(
        title=_("The highest rate within {0}, with its 95 % interval", slo(document)),
        header=[_("deployment"), *map(_, known.values()), _("first limit\nto break")],
        rows=[
            [row["name"], *(row[key] for key in known), _(text.SLO.get(row["limited_by"] or "", ""))] for row in rows
        ],
        left=(0, len(known) + 1),
    )


def clocks_table(document: Document) -> tables.Table | None:
    """A row per deployment: the cheapest clocks and caps, and what they save."""
    rows: list[list[tables.Value]] = []
    for name, found in document.tuned():
        joules, usual = found.j_per_good_request, found.before.j_per_good_request if found.before else None
        clocks = _("none keeps the SLO") if found.setting is None else text.setting(found.setting)
        change_pct = 100 * (joules / usual - 1) if joules and usual else None
        rows.append([name, found.rate_per_s, clocks, found.attained_pct, joules, usual, change_pct, found.loads])
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
