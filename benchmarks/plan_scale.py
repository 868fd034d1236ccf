"""From what load on replicas, pairs of one prefill and one decode GPU, or xPyD win, at 8 to 1,000 GPUs: predicted from recorded runs.

Every deployment has all the GPUs and the same load. Of xPyD every eighth is tried. The winner of a figure has the least one in every draw
of costs, speeds and arrivals, all deployments beside each other in each. Writes a table (Markdown) and a picture.
Try: python benchmarks/plan_scale.py --runs docs/results/h200x2-replicas --out docs/results/plan/scale-vllm-0.33
"""

import argparse
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from pdbench.config import LoadConfig
from pdbench.files import write_whole
from pdbench.plan.calibration import calibrate, drawn, role_of
from pdbench.plan.demand import demand_of_load
from pdbench.plan.engine import Demand, Deployment
from pdbench.plan.predict import Wanted, beyond, deployment_of, figures_of, outside_of, unfit
from pdbench.plan.records import Calibration
from pdbench.plan.simulate import simulate
from pdbench.records import load_run
from pdbench.report import mpl, tables, text
from pdbench.report.chart_types import BLUE, GREEN, GREY, PURPLE, Axis, Chart, Panel, Series
from pdbench.report.plan import deployment_name

METRICS = ("ttft_p99_ms", "tbt_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "j_per_output_token")
KINDS = {"replicas": PURPLE, "1P1D pairs": GREEN, "xPyD": BLUE}
SECONDS = 4.0
"""Length of a load: several times a request's time, and more where 1,000 requests take longer."""
GROWTH = 2.0
"""TTFT of the last third of a load over the first's, above which a deployment does not carry it: its figures would be the load's length."""
OVERLOADED = "its queue grows"


@dataclass
class Option:
    """A deployment of all GPUs. `parts` of them stand side by side, each with its own proxy and its share of the load."""

    kind: str
    wanted: Wanted
    parts: int = 1
    refusal: str | None = None
    figures: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        name = deployment_name(self.wanted)
        return name if self.parts == 1 else f"{self.parts} x {name}"

    def median(self, metric: str) -> float:
        return float(np.median([row[metric] for row in self.figures]))


def options_of(gpus: int) -> Iterator[Option]:
    yield Option("replicas", Wanted("replicas", {"replica": gpus}))
    yield Option("1P1D pairs", Wanted("disaggregated", {"prefill": 1, "decode": 1}), gpus // 2)
    for prefill in dict.fromkeys(round(gpus * eighth / 8) for eighth in range(1, 8)):
        yield Option("xPyD", Wanted("disaggregated", {"prefill": prefill, "decode": gpus - prefill}))


class Study:
    """One calibration. `requests` were simulated, `tried` deployments of each kind; `refused` for which reason."""

    def __init__(self, calibration: Calibration, draws: int) -> None:
        self.calibration, self.draws, self.requests = calibration, draws, 0
        self.tried = Counter[str]()
        self.refused = Counter[tuple[str, str]]()

    def demand(self, rate: float, draw: int) -> Demand:
        count = max(1000, round(SECONDS * rate))
        return demand_of_load(LoadConfig(rate=rate, requests=count, input_tokens=2048, output_tokens=128), draw)

    def simulate(self, option: Option, rate: float, draw: int | None) -> None:
        """At the costs' best estimate, or as they may be: draw n has the same luck for every role and deployment."""
        demand = self.demand(rate / option.parts, draw or 0)
        deployment: Deployment = deployment_of(self.calibration, option.wanted)
        if draw is not None:
            engines = {
                role: drawn(
                    role_of(self.calibration, role), np.random.default_rng(draw), np.random.default_rng(draw).uniform()
                )
                for role in deployment.engines
            }
            deployment = msgspec.structs.replace(deployment, engines=engines)
        result = simulate(deployment, demand, draw or 0)
        self.requests += len(demand)
        if draw is None:
            preempted = any(use.preemptions for use in result.instances)
            option.refusal = unfit(self.calibration, option.wanted, [demand]) or beyond(
                outside_of([result]), preempted, {}
            )
        option.figures.append(figures_of([result], self.calibration))
        if draw is None and option.figures[-1]["growth"] > GROWTH:
            option.refusal = OVERLOADED

    def point(self, gpus: int, rate: float) -> list[Option]:
        """The deployments of each kind that are best in some figure, with `draws` rows of figures; refused ones with none."""
        options = list(options_of(gpus))
        for option in options:
            self.simulate(option, rate, None)
            self.tried[option.kind] += 1
            if option.refusal:
                words = option.refusal.partition(" % of the busy time has ")[2] or option.refusal
                self.refused[option.kind, words.partition(":")[0]] += 1
        best: list[Option] = []
        for kind in KINDS:
            of_kind = [option for option in options if option.kind == kind]
            sure = [option for option in of_kind if option.refusal is None]
            chosen = (
                [min(sure, key=lambda option: option.median(metric)) for metric in METRICS] if sure else of_kind[:1]
            )
            best += [option for place, option in enumerate(chosen) if option not in chosen[:place]]
        for option in best:
            option.figures.clear()
            for draw in range(self.draws if option.refusal is None else 0):
                self.simulate(option, rate, draw)
        return best


@dataclass
class Verdict:
    """Of one figure at one point: the kinds' best, the winner, and whether it is that in every draw."""

    winner: Option | None
    sure: bool
    best: dict[str, Option]


def judge(options: Sequence[Option], metric: str) -> Verdict:
    best = {}
    for kind in KINDS:
        known = [option for option in options if option.kind == kind and option.figures]
        if known:
            best[kind] = min(known, key=lambda option: option.median(metric))
    if not best:
        return Verdict(None, False, best)
    winner = min(best.values(), key=lambda option: option.median(metric))
    others = [option for option in best.values() if option is not winner]
    sure = bool(others) and all(
        row[metric] < other_row[metric]
        for other in others
        for row, other_row in zip(winner.figures, other.figures, strict=True)
    )
    return Verdict(winner, sure, best)


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
            cells.append(f"{words}, {option.name}" if kind == "xPyD" else words)
        if verdict.winner is None:
            outcome = "not known"
        elif len(verdict.best) == 1:
            outcome = f"only {verdict.winner.kind} known"
        else:
            outcome = verdict.winner.kind if verdict.sure else f"not decided ({verdict.winner.kind})"
            outcome += "" if len(verdict.best) == len(KINDS) else ", of those known"
        rows.append([f"{gpus:,}", f"{load:g}", *cells, outcome])
    return tables.Table(title=text.label(metric), header=["GPUs", "requests/s per GPU", *KINDS, "least"], rows=rows)


def summary_of(points: Points) -> tables.Table:
    """For each figure and number of GPUs: which kind is least from which load on."""
    rows: list[list[tables.Value]] = []
    for metric in METRICS:
        for gpus in dict.fromkeys(gpus for gpus, _ in points):
            stretches: list[tuple[str, float, float]] = []
            for (of_gpus, load), options in points.items():
                if of_gpus != gpus:
                    continue
                verdict = judge(options, metric)
                if verdict.winner is None:
                    word = "nothing known"
                elif len(verdict.best) == 1:
                    word = f"only {verdict.winner.kind} known"
                else:
                    word = verdict.winner.kind if verdict.sure else "not decided"
                if stretches and stretches[-1][0] == word:
                    stretches[-1] = word, stretches[-1][1], load
                else:
                    stretches.append((word, load, load))
            words = [f"{word} {low:g}-{high:g}" if high > low else f"{word} {low:g}" for word, low, high in stretches]
            rows.append([text.label(metric), f"{gpus:,}", "; ".join(words)])
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
    parser.add_argument("--out", type=Path, required=True, help="written with .md and .png")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 6], help="requests/s per GPU")
    parser.add_argument("--draws", type=int, default=8)
    options = parser.parse_args()
    begin_s = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(options.runs / "runs.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        runs = {path.relative_to(folder): load_run(path) for path in sorted(Path(folder).glob("*_results"))}
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
        if known.engine.box and role != "prefill"
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
