"""The pictures of a search: shares, goodput and energy against rates and the SLO's scale; energy of clocks."""

from collections.abc import Mapping
from typing import Any

from pdbench.report import text
from pdbench.report.chart_types import BAD, MUTED, Axis, Chart, Panel, Series, shades
from pdbench.report.text import translate as _

MOST_USED = 1.5
"""Settings are drawn up to so many times the SLO."""


def searched(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The deployments whose highest rate was searched."""
    return [entry for entry in document["deployments"] if "low" in entry]


def tuned(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in document["deployments"] if "tuned" in entry]


def loads(document: Mapping[str, Any], name: str, *, clocks: bool = False) -> list[dict[str, Any]]:
    """The loads of a deployment at rates, or at one rate with other clocks."""
    return [
        point
        for point in document["points"]
        if point["deployment"] == name and point["rate_per_s"] and bool(point.get("setting")) == clocks
    ]


def slo(document: Mapping[str, Any]) -> str:
    limits = [f"{_(name)} {limit:g} ms" for name, limit in text.slo(document["slo"]).items()]
    return _("{0} for {1} % of requests", _(" and ").join(limits), f"{document['attain_pct']:g}")


def _colours(document: Mapping[str, Any]) -> dict[str, str]:
    names = [entry["name"] for entry in document["deployments"]]
    return dict(zip(names, shades([name.partition(",")[0] for name in names]), strict=True))


def chart(document: Mapping[str, Any]) -> Chart:
    """Attainment and energy against rate with what was found; goodput and energy against the SLO's scale."""
    entries, colours = searched(document), _colours(document)
    per_gpu = all(entry.get("gpus") for entry in entries) and bool(entries)
    attained: list[Series] = []
    joules: list[Series] = []
    scaled: list[Series] = []
    scaled_joules: list[Series] = []
    goal = document["attain_pct"]
    for entry in sorted(entries, key=lambda entry: entry.get("rate_per_s") or 0.0):  # for their labels
        name, shade, gpus = entry["name"], colours[entry["name"]], entry["gpus"] if per_gpu else 1
        points = sorted(loads(document, name), key=lambda point: point["rate_per_s"])
        if points:
            at, shares = [point["rate_per_s"] for point in points], [point["attained_pct"] for point in points]
            attained.append(Series(kind="points", name=name, x=at, y=shares, shade=shade, opacity=0.6, size=6))
        if entry.get("rate_per_s"):
            high = entry["high"] or max(point["rate_per_s"] for point in points)
            attained.append(Series(x=[entry["low"], high], y=[goal, goal], shade=shade, width=5, opacity=0.5))
            found = f"{'' if entry['high'] else '≥ '}{text.number(entry['rate_per_s'])}/s"
            attained.append(
                Series(kind="points", x=[entry["rate_per_s"]], y=[goal], labels=[found], shade=shade, size=11)
            )
        for panel, figure in (
            (scaled, "goodput_per_s_per_gpu" if per_gpu else "goodput_per_s"),
            (scaled_joules, "j_per_good_request"),
        ):
            if scales := [each for each in entry.get("slo_scale", ()) if each.get(figure)]:
                x, y = ([each[key] for each in scales] for key in ("scale", figure))
                panel.append(Series(name=name, x=x, y=y, shade=shade, marker="o"))
        energy = [point for point in points if point.get("j_per_good_request")]
        if energy:
            at, used = [e["rate_per_s"] / gpus for e in energy], [e["j_per_good_request"] for e in energy]
            joules.append(Series(name=name, x=at, y=used, shade=shade, marker="o"))
            if entry.get("j_per_good_request"):
                at = [entry["rate_per_s"] / gpus]
                joules.append(
                    Series(kind="points", x=at, y=[entry["j_per_good_request"]], shade=BAD, size=15, hollow=True)
                )
    rates = [point["rate_per_s"] for entry in entries for point in loads(document, entry["name"])]
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


def clocks_chart(document: Mapping[str, Any]) -> Chart:
    """Every setting's energy against how much of the SLO it used, with those that nothing beats in both; what the cheapest saves."""
    entries, colours = tuned(document), _colours(document)
    settings: list[Series] = []
    for entry in entries:
        name, shade, best = entry["name"], colours[entry["name"]], entry["tuned"]
        points = sorted(
            (point["slo_used"], point["j_per_good_request"])
            for point in loads(document, name, clocks=True)
            if "/clocks-" in point["run"]  # those with the same arrivals
            and point.get("j_per_good_request")
            and point["held"] is not False
            and (point["slo_used"] or MOST_USED) < MOST_USED
        )
        if not points:
            continue
        front = [point for place, point in enumerate(points) if all(point[1] < other[1] for other in points[:place])]
        (x, y), (along, lowest) = zip(*points, strict=True), zip(*front, strict=True)
        settings.append(Series(kind="points", name=name, x=x, y=y, shade=shade, size=6, opacity=0.6))
        settings.append(Series(x=along, y=lowest, shade=shade))
        chosen = [point for point in document["points"] if point["run"] == best.get("run")]
        for point in chosen:
            used, joules = [point["slo_used"]], [point["j_per_good_request"]]
            words = f"{name}: {text.setting(best['setting'])}"
            settings.append(Series(kind="points", name=words, x=used, y=joules, shade=BAD, size=12, hollow=True))
    known = [entry for entry in entries if entry["tuned"].get("before", {}).get("j_per_good_request")]
    bars = []
    for words, hatch, entry_of in (
        ("as it was", "/", lambda entry: entry["tuned"]["before"]),
        ("cheapest clocks", "", lambda entry: entry["tuned"]),
    ):
        for entry in known:
            name, spent = f"{entry['name']}, {_(words)}", entry_of(entry)["j_per_good_request"]
            bars.append((name, spent, colours[entry["name"]], hatch))
    order = sorted(bars, key=lambda bar: [entry["name"] for entry in known].index(bar[0].rpartition(", ")[0]))
    saved = [
        Series(
            kind="bar", x=[place], y=[spent], labels=[text.number(spent)], shade=shade, opacity=0.5 if hatch else 1.0
        )
        for place, (_name, spent, shade, hatch) in enumerate(order)
    ]
    rates = dict.fromkeys(entry["tuned"]["rate_per_s"] for entry in entries)
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
            x=Axis(names=[name for name, *_rest in order]),
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
