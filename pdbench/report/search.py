"""What `pdbench search` found: its tables and pictures, out of search.json and the saved runs."""

from operator import attrgetter
from pathlib import Path

import numpy as np
from msgspec import structs
from rich.console import Console
from rich.text import Text

from pdbench.analysis.metrics import per
from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.files import write_whole
from pdbench.report import tables, text
from pdbench.report.chart_types import BAD, MUTED, Axis, Chart, Panel, Series, shades
from pdbench.report.search_files import save
from pdbench.report.search_sentence import named, sentence, slo
from pdbench.report.text import translate as _
from pdbench.search.document import FILE, Document, Held, keeps

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
MOST_USED = 1.5
"""Settings are drawn up to so many times the SLO."""


def present(document: Document, out: Path, console: Console) -> list[RunAnalysis]:
    """Add what the saved runs say to the document, write it and its pictures into `out`, print sentence and tables.

    Returns the analyses of the runs at the rates and clocks found.
    """
    from pdbench.report import mpl

    loaded, analyses, warnings = dict[str, RunAnalysis](), [], []

    def load(run: str) -> RunAnalysis:
        if run not in loaded:
            loaded[run] = load_analysis(out / run)
        return loaded[run]

    for point in document.points:
        analysis = load(point.run)
        goodput = analysis.summary.goodput
        settled = _settled(analysis)
        point.flags = sorted({flag.name for flag in analysis.flags})
        point.goodput_per_s = goodput.requests_per_s if settled else None
        point.j_per_good_request = goodput.j_per_good_request if settled else None
    for entry in document.deployments:
        if sent := next((point.run for point in document.points if point.deployment == entry.name), None):
            hardware = load(sent)  # of any of its loads: all run on the same servers
            entry.gpus, entry.layout = hardware.gpus, text.layout(hardware)
            entry.rate_per_s_per_gpu = per(entry.rate_per_s, entry.gpus)
        if entry.run:
            analyses.append(load(entry.run))
            _enter_figures(entry, analyses[-1], document.attain_pct)
        if run := entry.run or (entry.closest and entry.closest.run):
            warnings += tables.warnings(named(entry), load(run))
        _enter_scales(entry, document)
        if entry.tuned and entry.tuned.run:
            analyses.append(load(entry.tuned.run))
    document.sentence = sentence(document)
    save(document, out)
    pictures = {}
    if document.searched():
        pictures[PICTURE] = mpl.chart_picture(lambda: chart(document), 16, lambda rows: 9 if rows > 1 else 5.5)
    if document.tuned():
        pictures[CLOCKS_PICTURE] = mpl.chart_picture(lambda: clocks_chart(document), 16, lambda rows: 8)
    for name, picture in pictures.items():
        write_whole(out / name, picture)
    mpl.say_when_english(console)
    if document.sentence:
        console.print(Text(document.sentence, style="bold"))
    for shown in (table(document) if document.searched() else None, clocks_table(document)):
        if shown:
            console.print(tables.Terminal(shown))
    tables.say(console, *warnings)
    if pictures:
        tables.say(console, f"answer: {out / FILE}  picture: {' '.join(str(out / name) for name in pictures)}")
    return analyses


def _settled(analysis: RunAnalysis) -> bool:
    """Do goodput and energy say anything of the run's load: does it count, and were servers at some time as busy as it makes them?"""
    ramps = any(flag.name == "ramps-in-window" for flag in analysis.flags)
    return not ramps and not analysis.void(overload=True)


def _enter_figures(entry: Held, analysis: RunAnalysis, attain_pct: float) -> None:
    """Of the confirming run. One that does not count says nothing; one that ended before its servers were busy may refute, but not confirm."""
    goodput = analysis.summary.goodput
    settled = _settled(analysis)
    if analysis.void(overload=True) or (not settled and keeps(entry.attained_pct or 0.0, attain_pct)):
        entry.attained_pct = None
    entry.goodput_per_s = goodput.requests_per_s if settled else None
    entry.goodput_per_s_per_gpu = goodput.requests_per_s_per_device if settled else None
    entry.j_per_good_request = goodput.j_per_good_request if settled else None
    entry.goodput_per_w = analysis.summary.energy.goodput_per_w if settled else None


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
        scale.goodput_per_s_per_gpu = per(scale.goodput_per_s, entry.gpus)
        if spent and spent[0][0] <= scale.rate_per_s <= spent[-1][0]:
            rates, joules = zip(*spent, strict=True)
            scale.j_per_good_request = float(np.interp(scale.rate_per_s, rates, joules)) / share


def table(document: Document) -> tables.Table:
    entries = [entry if entry.rate_per_s else structs.replace(entry, low=None) for entry in document.searched()]
    known = [key for key in COLUMNS if any(getattr(entry, key) is not None for entry in entries)]
    rows = []
    for entry in entries:
        values = {key: getattr(entry, key) for key in known}
        if "attained_pct" in values:
            values["attained_pct"] = text.attained(entry.attained_pct, document.attain_pct)
        rows.append([named(entry), *values.values(), _(text.SLO.get(entry.limited_by or "", ""))])
    header = [_("deployment"), *(_(COLUMNS[key]) for key in known), _("first limit\nto break")]
    title = _("The highest rate within {0}, with its 95 % interval", slo(document))
    return tables.Table(title=title, header=header, rows=rows, left=(0, len(known) + 1))


def clocks_table(document: Document) -> tables.Table | None:
    """A row per deployment: the cheapest clocks and caps, and what they save."""
    rows: list[list[tables.Value]] = []
    for name, found in document.tuned():
        joules, usual = found.j_per_good_request, found.before.j_per_good_request if found.before else None
        clocks = _("none keeps the SLO") if found.setting is None else text.setting(found.setting)
        change_pct = 100 * (joules / usual - 1) if joules and usual else None
        share = text.attained(found.attained_pct, document.attain_pct)
        rows.append([name, found.rate_per_s, clocks, share, joules, usual, change_pct, found.loads])
    known = [_(COLUMNS[key]) for key in ("rate_per_s", "attained_pct", "j_per_good_request", "loads")]
    header = [_("deployment"), known[0], _("cheapest clocks"), *known[1:3], _("as it was"), _("change %"), known[3]]
    title = _("The least energy within {0}", slo(document))
    return tables.Table(title=title, header=header, rows=rows, left=(0, 2)) if rows else None


def _colours(document: Document) -> dict[str, str]:
    names = [entry.name for entry in document.deployments]
    return dict(zip(names, shades([name.partition(",")[0] for name in names]), strict=True))


def chart(document: Document) -> Chart:
    """Attainment and energy against rate with what was found; goodput and energy against the SLO's scale."""
    entries, colours, goal = document.searched(), _colours(document), document.attain_pct
    per_gpu = all(entry.gpus for entry in entries)
    attained, joules, scaled, scaled_joules = (list[Series]() for _panel in range(4))
    for entry in sorted(entries, key=lambda entry: entry.rate_per_s or 0.0):  # for their labels
        name, shade, gpus = entry.name, colours[entry.name], entry.gpus or 1 if per_gpu else 1
        # A confirming run that was too short says nothing of its rate.
        points = [each for each in document.loads(name) if each[1].run != entry.run or entry.attained_pct is not None]
        if points:
            at, shares = [rate for rate, _point in points], [point.attained_pct for _rate, point in points]
            attained.append(Series(kind="points", name=name, x=at, y=shares, shade=shade, opacity=0.6, size=6))
        if entry.rate_per_s:
            low, high = entry.low or 0.0, entry.high or points[-1][0]
            attained.append(Series(x=[low, high], y=[goal, goal], shade=shade, width=5, opacity=0.5))
            found = f"{'' if entry.high else '≥ '}{text.number(entry.rate_per_s)}/s"
            attained.append(Series(kind="points", x=[entry.rate_per_s], y=[goal], labels=[found], shade=shade, size=11))
        for panel, figure in (
            (scaled, attrgetter("goodput_per_s_per_gpu" if per_gpu else "goodput_per_s")),
            (scaled_joules, attrgetter("j_per_good_request")),
        ):
            if scales := [each for each in entry.slo_scale if figure(each)]:
                x, y = [each.scale for each in scales], [figure(each) for each in scales]
                panel.append(Series(name=name, x=x, y=y, shade=shade, marker="o"))
        energy = [(rate / gpus, point.j_per_good_request) for rate, point in points if point.j_per_good_request]
        if energy:
            along, used = zip(*energy, strict=True)
            joules.append(Series(name=name, x=along, y=used, shade=shade, marker="o"))
            if entry.j_per_good_request and entry.rate_per_s:
                found_at, found_j = [entry.rate_per_s / gpus], [entry.j_per_good_request]
                joules.append(Series(kind="points", x=found_at, y=found_j, shade=BAD, size=15, hollow=True))
    rates = [rate for entry in entries for rate, _point in document.loads(entry.name)]
    if attained:
        attained.append(Series(name=_("goal"), x=[0, max(rates)], y=[goal, goal], shade=MUTED, dash="dot"))
    rate = Axis(label=_("requests/s per GPU" if per_gpu else "requests/s"), low=0)
    share, scale = Axis(label=_("% of requests"), low=0, high=104), Axis(label=_("all limits times"))
    energy_axis = Axis(label=_("J per good request"), low=0)
    goodput = _("Goodput per GPU against the SLO's scale" if per_gpu else "Goodput against the SLO's scale")
    energy_scaled = _("Energy per request within the SLO against its scale")
    sent, missing = Axis(label=_("requests/s"), low=0), _("no load was measured")
    panels = [
        Panel(title=_("Requests within the SLO"), series=attained, x=sent, y=share, not_measured=missing),
        Panel(title=_("Energy per request within the SLO"), series=joules, x=rate, y=energy_axis),
        Panel(title=goodput, series=scaled, x=scale, y=rate),
        Panel(title=energy_scaled, series=scaled_joules, x=scale, y=energy_axis),
    ]
    panels = [panels[0], *(panel for panel in panels[1:] if panel.series)]
    title, caption = _("The highest rate within {0}", slo(document)), _("bars: 95 % intervals")
    if any(series.hollow for series in joules):
        caption += _("; ringed: energy at the rate found")
    if not joules:
        caption += _("; energy is not measured")
    if flags := sorted({flag for point in document.points for flag in point.flags}):
        caption += _("; flags of loads ({0} says which have them): {1}", FILE, ", ".join(flags))
    return Chart(key="search", title=title, panels=panels, caption=caption)


def clocks_chart(document: Document) -> Chart:
    """Every setting's energy against how much of the SLO it used, with those that nothing beats in both; what the cheapest saves."""
    entries, colours = document.tuned(), _colours(document)
    settings: list[Series] = []
    for name, best in entries:
        shade = colours[name]
        points = sorted(
            (point.slo_used, point.j_per_good_request)
            for _rate, point in document.loads(name, clocks=True)
            if "/clocks-" in point.run  # those with the same arrivals
            and point.j_per_good_request
            and point.held is not False
            and point.slo_used
            and point.slo_used < MOST_USED
        )
        if not points:
            continue
        front = [point for place, point in enumerate(points) if all(point[1] < other[1] for other in points[:place])]
        (x, y), (along, lowest) = zip(*points, strict=True), zip(*front, strict=True)
        settings.append(Series(kind="points", name=name, x=x, y=y, shade=shade, size=6, opacity=0.6))
        settings.append(Series(x=along, y=lowest, shade=shade))
        words = f"{name}: {text.setting(best.setting or {})}"
        for point in (point for point in document.points if point.run == best.run):
            used, joules = [point.slo_used], [point.j_per_good_request]
            settings.append(Series(kind="points", name=words, x=used, y=joules, shade=BAD, size=12, hollow=True))
    bars = [
        (f"{name}, {_(words)}", choice.j_per_good_request, colours[name], opacity)
        for name, best in entries
        if best.before and best.before.j_per_good_request
        for words, choice, opacity in (("as it was", best.before, 0.5), ("cheapest clocks", best, 1.0))
    ]
    saved = [
        Series(kind="bar", x=[place], y=[used_j], labels=[text.number(used_j)], shade=shade, opacity=opacity)
        for place, (_name, used_j, shade, opacity) in enumerate(bars)
    ]
    rates = dict.fromkeys(best.rate_per_s for _name, best in entries)
    spent = Axis(label=_("J per good request"), low=0)
    used_share = Axis(label=_("share of the SLO used (1: just kept)"), low=0, high=MOST_USED)
    title, missing = _("Energy and speed of every setting, same arrivals"), _("no setting kept the SLO")
    panels = [Panel(title=title, series=settings, x=used_share, y=spent, lines=[1.0], not_measured=missing)]
    title, missing = _("What the cheapest clocks save"), _("no setting is confirmed yet")
    names = Axis(names=[name for name, *_rest in bars])
    panels.append(Panel(title=title, series=saved, x=names, y=spent, not_measured=missing))
    at = _(", ").join(_("{0} requests/s", text.number(rate)) for rate in rates)
    return Chart(
        key="clocks",
        title=_("The least energy within {0}", slo(document)),
        panels=panels,
        caption=_("{0}; lines: what no other setting beats in both; ringed: the cheapest, with other arrivals", at),
    )
