"""The pictures of a search: shares, goodput and energy against rates and the SLO's scale; energy of clocks."""

from operator import attrgetter

from pdbench.report import text
from pdbench.report.chart_types import BAD, MUTED, Axis, Chart, Panel, Series, shades
from pdbench.report.text import translate as _
from pdbench.search.document import Document

MOST_USED = 1.5
"""Settings are drawn up to so many times the SLO."""


def slo(document: Document) -> str:
    limits = [f"{_(name)} {limit:g} ms" for name, limit in text.slo(document.slo).items()]
    return _("{0} for {1} % of requests", _(" and ").join(limits), f"{document.attain_pct:g}")


def _colours(document: Document) -> dict[str, str]:
    names = [entry.name for entry in document.deployments]
    return dict(zip(names, shades([name.partition(",")[0] for name in names]), strict=True))


def chart(document: Document) -> Chart:
    """Attainment and energy against rate with what was found; goodput and energy against the SLO's scale."""
    entries, colours = document.searched(), _colours(document)
    per_gpu = all(entry.gpus for entry in entries) and bool(entries)
    attained: list[Series] = []
    joules: list[Series] = []
    scaled: list[Series] = []
    scaled_joules: list[Series] = []
    goal = document.attain_pct
    for entry in sorted(entries, key=lambda entry: entry.rate_per_s or 0.0):  # for their labels
        name, shade, gpus = entry.name, colours[entry.name], entry.gpus or 1 if per_gpu else 1
        points = document.loads(name)
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
                at = [entry.rate_per_s / gpus]
                joules.append(
                    Series(kind="points", x=at, y=[entry.j_per_good_request], shade=BAD, size=15, hollow=True)
                )
    rates = [rate for entry in entries for rate, _point in document.loads(entry.name)]
    if attained:
        attained.append(Series(name=_("goal"), x=[0, max(rates)], y=[goal, goal], shade=MUTED, dash="dot"))
    rate = _("requests/s per GPU" if per_gpu else "requests/s")
    panels = [
        Panel(
            title=_("Requests within the SLO"),
            series=attained,
            x=Axis(label=_("requests/s"), low=0),
            y=Axis(label=_("% of requests"), low=0, high=104),
            not_measured=_("no load was measured"),
        ),
        Panel(
            title=_("Energy per request within the SLO"),
            series=joules,
            x=Axis(label=rate, low=0),
            y=Axis(label="J", low=0),
        ),
        Panel(
            title=_("Goodput per GPU against the SLO's scale" if per_gpu else "Goodput against the SLO's scale"),
            series=scaled,
            x=Axis(label=_("all limits times")),
            y=Axis(label=rate, low=0),
            not_measured=_("no scale is known well enough"),
        ),
        Panel(
            title=_("Energy per request within the SLO against its scale"),
            series=scaled_joules,
            x=Axis(label=_("all limits times")),
            y=Axis(label="J", low=0),
            not_measured=_("no scale is known well enough"),
        ),
    ]
    title, caption = _("The highest rate within {0}", slo(document)), _("bars: 95 % intervals")
    if not joules:
        panels, caption = panels[::2], caption + _("; energy is not measured")
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
        chosen = [point for point in document.points if point.run == best.run]
        for point in chosen:
            used, joules = [point.slo_used], [point.j_per_good_request]
            words = f"{name}: {text.setting(best.setting or {})}"
            settings.append(Series(kind="points", name=words, x=used, y=joules, shade=BAD, size=12, hollow=True))
    bars = [
        (f"{name}, {_(words)}", choice.j_per_good_request, colours[name], opacity)
        for name, best in entries
        if best.before and best.before.j_per_good_request
        for words, choice, opacity in (("as it was", best.before, 0.5), ("cheapest clocks", best, 1.0))
    ]
    saved = [
        Series(kind="bar", x=[place], y=[spent], labels=[text.number(spent)], shade=shade, opacity=opacity)
        for place, (_name, spent, shade, opacity) in enumerate(bars)
    ]
    rates = dict.fromkeys(best.rate_per_s for _name, best in entries)
    panels = [
        Panel(
            title=_("Energy and speed of every setting, same arrivals"),
            series=settings,
            x=Axis(label=_("share of the SLO used (1: just kept)"), low=0, high=1.5),
            y=Axis(label=_("J per good request"), low=0),
            lines=[1.0],
            not_measured=_("no setting kept the SLO"),
        ),
        Panel(
            title=_("What the cheapest clocks save"),
            series=saved,
            x=Axis(names=[name for name, *_rest in bars]),
            y=Axis(label=_("J per good request"), low=0),
            not_measured=_("no setting is confirmed yet"),
        ),
    ]
    at = _(", ").join(_("{0} requests/s", text.number(rate)) for rate in rates)
    return Chart(
        key="clocks",
        title=_("The least energy within {0}", slo(document)),
        panels=panels,
        caption=_("{0}; lines: what no other setting beats in both; ringed: the cheapest, with other arrivals", at),
    )
