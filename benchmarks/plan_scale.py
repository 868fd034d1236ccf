"""From what load on replicas, pairs of one prefill and one decode GPU, or xPyD win, at 8 to 1,000 GPUs: predicted from recorded runs.

Every deployment has all the GPUs and the same load. Of xPyD every eighth is tried. The winner of a figure has the least one in every draw
of costs, days and arrivals, all deployments beside each other in each. Writes a table (Markdown) and a picture.
Try: python benchmarks/plan_scale.py --runs docs/results/h200x2-calibrated --calibrate "calibrate/*/*_results" --out docs/results/plan/scale
"""

import argparse
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path

import numpy as np

from pdbench.config import LoadConfig
from pdbench.files import write_whole
from pdbench.plan.calibration import calibrate
from pdbench.plan.demand import demand_of_load
from pdbench.plan.deployment import unfit
from pdbench.plan.engine import Demand, Layout
from pdbench.plan.predict import GROWTH, Day, Draw, days_of, draw_of, guessed, usual_day
from pdbench.plan.records import Calibration
from pdbench.plan.simulate import simulate
from pdbench.records import load_run
from pdbench.report import mpl, tables, text
from pdbench.report.chart_types import BLUE, GREEN, GREY, PURPLE, Axis, Chart, Panel, Series

METRICS = ("ttft_p99_ms", "tbt_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "j_per_output_token")
KINDS = {"replicas": PURPLE, "1P1D pairs": GREEN, "xPyD": BLUE}
SECONDS = 4.0
"""Length of a load: several times a request's time, and more where 1,000 requests take longer."""


@dataclass
class Option:
    """A deployment of all GPUs. `parts` of them stand side by side, each with its own proxy and its share of the load. `figures` are those
    of each draw."""

    kind: str
    layout: Layout
    parts: int = 1
    figures: list[dict[str, float]] = field(default_factory=list)

    def median(self, metric: str) -> float:
        return float(np.median([row[metric] for row in self.figures]))


def options_of(gpus: int) -> Iterator[Option]:
    yield Option("replicas", Layout("replicas", {"replica": gpus}))
    yield Option("1P1D pairs", Layout("disaggregated", {"prefill": 1, "decode": 1}), gpus // 2)
    for prefill in dict.fromkeys(round(gpus * eighth / 8) for eighth in range(1, 8)):
        yield Option("xPyD", Layout("disaggregated", {"prefill": prefill, "decode": gpus - prefill}))


class Study:
    """One calibration. `requests` were simulated, `tried` deployments of each kind; `refused` for which reason."""

    def __init__(self, calibration: Calibration, draws: int) -> None:
        self.calibration, self.draws, self.requests = calibration, draws, 0
        self.tried = Counter[str]()
        self.refused = Counter[tuple[str, str]]()

    def demand(self, rate: float, number: int) -> Demand:
        load = LoadConfig(rate=rate, requests=max(1000, round(SECONDS * rate)), input_tokens=2048, output_tokens=128)
        return demand_of_load(load, number)

    def draw(self, day: Day, rate: float) -> Draw:
        demand = self.demand(rate, day.number)
        self.requests += len(demand)
        return draw_of([simulate(day.deployment, demand, day.number)], self.calibration, pauses=day.pauses)

    def point(self, gpus: int, rate: float) -> list[Option]:
        """The deployments of each kind that are best in some figure at the costs' best estimate, with their draws' figures."""
        best: list[Option] = []
        for kind, of_kind in groupby(options_of(gpus), key=lambda option: option.kind):
            sure: list[tuple[Option, Draw]] = []
            for option in of_kind:
                usual = self.draw(usual_day(self.calibration, option.layout), rate / option.parts)
                refusal = unfit(self.calibration, option.layout, [self.demand(rate / option.parts, 0)])
                refusal = refusal or guessed(usual)
                refusal = "its queue grows" if usual.growth > GROWTH else refusal
                self.tried[kind] += 1
                if refusal:
                    words = refusal.partition(" % of the busy time has ")[2] or refusal
                    self.refused[kind, words.partition(":")[0]] += 1
                else:
                    sure.append((option, usual))
            if sure:
                figures = np.array([[usual.figures[metric] for metric in METRICS] for _, usual in sure])
                best += [sure[place][0] for place in dict.fromkeys(figures.argmin(axis=0))]
        for option in best:
            for day in islice(days_of(self.calibration, option.layout), self.draws):
                option.figures.append(self.draw(day, rate / option.parts).figures)
        return best


@dataclass
class Verdict:
    """Of one figure at one point: the best of each kind that is known, the winner, and whether it is that in every draw."""

    best: dict[str, Option]
    winner: Option | None = None
    sure: bool = False

    @property
    def words(self) -> str:
        if self.winner is None:
            return "nothing known"
        if len(self.best) == 1:
            return f"only {self.winner.kind} known"
        return self.winner.kind if self.sure else "not decided"


def judge(options: Sequence[Option], metric: str) -> Verdict:
    best = {
        kind: min((option for option in options if option.kind == kind), key=lambda option: option.median(metric))
        for kind in dict.fromkeys(option.kind for option in options)
    }
    if not best:
        return Verdict(best)
    winner = min(best.values(), key=lambda option: option.median(metric))
    others = [option for option in best.values() if option is not winner]
    pairs = [pair for other in others for pair in zip(winner.figures, other.figures, strict=True)]
    return Verdict(best, winner, bool(others) and all(own[metric] < other[metric] for own, other in pairs))


Points = dict[tuple[int, float], list[Option]]


def table_of(points: Points, metric: str) -> tables.Table:
    rows: list[list[tables.Value]] = []
    for (gpus, load), options in points.items():
        verdict = judge(options, metric)
        cells: list[tables.Value] = []
        for kind in KINDS:
            option = verdict.best.get(kind)
            if option is None:
                cells.append("refused")
                continue
            values = [row[metric] for row in option.figures]
            words = f"{text.number(option.median(metric))} ({text.number(min(values))}-{text.number(max(values))})"
            cells.append(f"{words}, {option.layout.name}" if kind == "xPyD" else words)
        outcome = verdict.words
        if verdict.winner and len(verdict.best) > 1:
            outcome += "" if verdict.sure else f" ({verdict.winner.kind})"
            outcome += "" if len(verdict.best) == len(KINDS) else ", of those known"
        rows.append([f"{gpus:,}", f"{load:g}", *cells, outcome])
    return tables.Table(title=text.label(metric), header=["GPUs", "requests/s per GPU", *KINDS, "least"], rows=rows)


def summary_of(points: Points) -> tables.Table:
    """For each figure and number of GPUs: which kind is least from which load on."""
    rows: list[list[tables.Value]] = []
    for metric in METRICS:
        for gpus, of_gpus in groupby(points.items(), key=lambda point: point[0][0]):
            words = [(judge(options, metric).words, load) for (_, load), options in of_gpus]
            stretches = [(word, [load for _, load in group]) for word, group in groupby(words, key=itemgetter(0))]
            parts = [
                f"{word} {'-'.join(f'{load:g}' for load in dict.fromkeys((loads[0], loads[-1])))}"
                for word, loads in stretches
            ]
            rows.append([text.label(metric), f"{gpus:,}", "; ".join(parts)])
    return tables.Table(title="Least at which load", header=["figure", "GPUs", "requests/s per GPU"], rows=rows)


def refusals_of(study: Study) -> tables.Table:
    """How many of the deployments that were tried are refused, and why."""
    rows: list[list[tables.Value]] = []
    for kind in KINDS:
        reasons = {why: count for (of_kind, why), count in study.refused.items() if of_kind == kind}
        words = "; ".join(f"{why} ({count})" for why, count in reasons.items())
        rows.append([kind, f"{sum(reasons.values())} of {study.tried[kind]}", words])
    return tables.Table(
        title="Refused", header=["", "refused", "its queue grows, or more than 5 % of the busy time has ..."], rows=rows
    )


def chart_of(points: Points, title: str) -> Chart:
    """Who is least at which load and number of GPUs: full where sure, hollow where not decided, small grey where nothing is known."""
    sizes = sorted({gpus for gpus, _ in points})
    ticks = [float(size) for size in sizes], [f"{size:,}" for size in sizes]
    panels = []
    for metric in METRICS:
        groups: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for (gpus, load), options in points.items():
            verdict = judge(options, metric)
            key = (verdict.winner.kind, verdict.sure) if verdict.winner else ("not known", False)
            groups.setdefault(key, []).append((load, gpus))
        series = []
        for (kind, sure), places in sorted(groups.items()):
            x, y = zip(*places, strict=True)
            shade = KINDS.get(kind, GREY)
            name = kind if sure or kind == "not known" else f"{kind}, not decided"
            marker = "x" if kind == "not known" else "o"
            series.append(
                Series(kind="points", name=name, x=x, y=y, shade=shade, hollow=not sure, marker=marker, size=11)
            )
        y_axis = Axis(label="GPUs", log=True, low=0.6 * sizes[0], high=40 * sizes[-1], ticks=ticks)
        panels.append(
            Panel(title=text.label(metric), series=series, x=Axis(label="requests/s per GPU", low=0), y=y_axis)
        )
    caption = "Full: least in every draw. Hollow: least in the median, not in every draw, or the others are refused."
    return Chart(key="scale", title=title, panels=panels, caption=caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="a folder with runs.tar.xz")
    parser.add_argument("--calibrate", default="*_results", help="which of the archive's runs calibrate")
    parser.add_argument("--out", type=Path, required=True, help="written with .md and .png")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 6], help="requests/s per GPU")
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    begin_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(options.runs / "runs.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        runs = {path.relative_to(folder): load_run(path) for path in sorted(Path(folder).glob(options.calibrate))}
        calibration = calibrate(runs)
    study = Study(calibration, options.draws)
    points: Points = {}
    for gpus in options.gpus:
        for load in options.loads:
            points[gpus, load] = study.point(gpus, load * gpus)
            print(f"{gpus:,} GPUs, {load:g} requests/s each: {time.process_time() - begin_s:.0f} s of CPU", flush=True)
    source = calibration.sources[0]
    title = f"{source.gpu}, vLLM {source.vllm}: which deployment of all GPUs is best"
    boxes = [
        f"{role} up to {known.engine.box.sequences} sequences, {known.engine.box.prompt_tokens:,} prompt tokens in a step"
        for role, known in calibration.roles.items()
        if role != "prefill"
    ]
    words = (
        f"{study.requests:,} requests simulated in {time.process_time() - begin_s:.0f} s of CPU, {options.draws} draws. "
        f"The runs reached: {'; '.join(boxes)}."
    )
    shown = [summary_of(points), refusals_of(study), *(table_of(points, metric) for metric in METRICS)]
    write_whole(options.out.with_suffix(".md"), ("\n\n".join([words, *map(tables.markdown, shown)]) + "\n").encode())
    picture = mpl.chart_picture(lambda: chart_of(points, title), 14, lambda rows: 14)
    write_whole(options.out.with_suffix(".png"), picture)


if __name__ == "__main__":
    main()
