"""Commands that choose their loads by what they have measured, on servers that stay up."""

import time
from dataclasses import asdict, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pdbench.cli.app import MEASURING, Language, Recipe, app, check_loads, console
from pdbench.cli.measure import kept, progress_to, servers_stay
from pdbench.config import ClusterConfig, DeploymentKind, LiveConfig, LoadConfig, Options, PairConfig
from pdbench.config.types import Count, Positive
from pdbench.errors import UserError
from pdbench.records import Run

if TYPE_CHECKING:
    from pdbench.analysis.run_analysis import RunAnalysis


@app.command(group_parameters=MEASURING)
def search(
    recipe: Recipe = None,
    /,
    *,
    slo: str = "",
    attain: str = "95%",
    vary: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    against: str | None = None,
    url: str | None = None,
    precision: str = "3%",
    tune: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    tune_at: Positive[float | None] = None,
    max_minutes: Positive[float | None] = None,
    lang: Language = "en",
    out: Path = Path("search"),
    options: Options = Options(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Find the highest rate that each deployment holds within an SLO, and what it costs there; the same command again resumes it.

    Parameters
    ----------
    slo
        Limits for each request in ms: ttft, tbt (mean TBT, TPOT), tbt_p90, tbt_p99 (of its own gaps), e2e; as in ttft=300,tbt=15.
    attain
        Share of requests that must meet them, as in 95%.
    vary
        KEY=V1,V2,... of any option; every combination is searched: prefill_instances=1,2.
    against
        Deployments to search, with commas between; default: as `pdbench run`.
    url
        Search the server that runs here instead of starting deployments.
    precision
        Half-width of the interval at which a search ends, as in 3%.
    tune
        KEY=V1,V2,... of clocks and power caps, prefill_clock=990,1200 single_clock=990,1200: finds for each deployment those of its roles
        with the least energy per request within the SLO.
    tune_at
        Requests/s at which --tune compares, instead of a search for the highest rate; default: what each deployment surely holds.
    max_minutes
        Time for the whole command; what is known then is the answer, with a wider interval.
    lang
        Language of sentence, tables and pictures.
    out
        Folder of the loads, search.json and the picture. --requests (default 500) limits each load,
        but for what it takes to fill the servers.
    """
    from pdbench import experiment, slo_loads, slo_search, sweep, turns
    from pdbench.analysis.run_analysis import load_analysis
    from pdbench.report import commands, text
    from pdbench.report import search as found
    from pdbench.serving import machine

    begin_s, progress = time.monotonic(), progress_to(live)
    options = sweep.with_slo(options, slo)
    points = sweep.points(options, vary) if vary else [sweep.Point({}, options)]
    until_s = inf if max_minutes is None else begin_s + 60 * max_minutes
    goal = slo_search.goal(attain, precision, until_s, tune_at)
    if tune_at and not tune:
        raise UserError("--tune-at says where --tune compares: give --tune KEY=V1,V2,... too")
    for point in points:
        slo_search.check(point.options.load, point.varied)
    check_loads([replace(point.options.load, rate=1.0) for point in points])
    models = None
    if url is not None:
        sweep.check_running(points, against)
        models = experiment.served_models(url, [point.options for point in points])
    with servers_stay(cluster, out, live, lambda: slo_search.saved(out)) as (site, servers):
        for point in points:
            site.check_gpus(point.options.serve, running=url is not None)
            for load in slo_search.kinds_of_loads(point.options.load):
                site.check_load(load)

        def deployment(kind: str, point: sweep.Point) -> slo_loads.Deployment:
            def measure(options: Options, folder: Path, judge: slo_loads.LoadJudge | None) -> Run:
                with kept(commands.keep) as runs:
                    if url is not None:
                        experiment.bench(url, 1, options, folder, progress, site, runs, judge)
                    else:
                        design, one = PairConfig(pairs=1, resident=False), turns.deployments(kind)
                        experiment.run(one, design, options, folder, progress, site, runs, servers=servers, judge=judge)
                return next(iter(runs.values()))

            name, axes = ",".join(filter(None, (kind, point.name))), slo_search.tuning(point.options, tune, kinds)[kind]
            return slo_loads.Deployment(name, point.options, measure, axes)

        kinds: list[str] = ["bench"]
        if url is None:
            kinds = [*dict.fromkeys(turns.deployments(against) if against else site.kinds())]
        # In an order in which servers start once for all points that differ in other options.
        serves = [point.options.serve for point in points]
        ordered = sorted(product(kinds, points), key=lambda each: serves.index(each[1].options.serve))
        deployments = [deployment(kind, point) for kind, point in ordered]
        nodes = cluster and asdict(cluster)
        command = {"url": url, "cluster": nodes, "options": [each.options.plain() for each in deployments]}
        command["machine"] = machine.own_identity()
        command["measured"] = [sweep.measured_of(each.options, models) for each in deployments]
        document, earlier = slo_search.start(out, command, goal, points[0].options.load)
        try:
            slo_search.find(deployments, goal, out, progress, document, earlier)
        finally:
            with text.language(lang):
                analyses = found.present(document, out, console) if document.points else []
    for sent in document.points:
        commands.exit_on_flags([load_analysis(out / sent.run)], sent.run, overload=True)
    commands.exit_on_flags(analyses)


@app.command(group_parameters=MEASURING)
def calibrate(
    recipe: Recipe = None,
    /,
    *,
    against: str = "single,disaggregated",
    trials: Count[int] = 5,
    max_minutes: Positive[float] = 30.0,
    out: Path = Path("calibration"),
    options: Options = Options(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Measure what `pdbench plan` is calibrated by, and say what that shows; the same command again resumes it.

    Each deployment's servers start once and get lengths that differ: at full speed, a burst of prompts, and ramps of the rate.

    Parameters
    ----------
    against
        Deployments to measure, with commas between: single, replicas, disaggregated.
    trials
        Ramps of each deployment: they tell how the machine's speed varies.
    max_minutes
        Time for the whole command: ramps are shortened to fit, and loads end when it is up.
    out
        Folder of the runs and of the calibration; `pdbench plan OUT` reads it.
    """
    from pdbench import calibrating, experiment, planning, turns
    from pdbench.report import commands

    kinds, limit_s, progress = turns.deployments(against), 60 * max_minutes, progress_to(live)
    options = replace(options, load=calibrating.spread(options.load, options.serve.max_model_len))
    analyses: list[RunAnalysis] = []
    with servers_stay(cluster, out, live, lambda: calibrating.saved(out)) as (site, servers):
        site.check_gpus(options.serve)

        def measure(kind: DeploymentKind, options: Options, folder: Path, deadline: calibrating.Deadline) -> Path:
            with kept(lambda run, path: analyses.append(commands.keep(run, path))) as runs:
                design = PairConfig(pairs=1, resident=False)
                experiment.run([kind], design, options, folder, progress, site, runs, servers=servers, judge=deadline)
            return next(iter(runs))

        plan = calibrating.schedule(kinds, trials, options.load.ramp_s, limit_s, on_gpu=site.on_gpu)
        found, gaps = calibrating.run(kinds, options, plan, limit_s, out, measure, progress)
    if found:
        planning.plan(found, (), (), LoadConfig(), out, console)
    if gaps:
        raise UserError(f"not measured, the same command tries again: {'; '.join(gaps)}")
    commands.exit_on_flags(analyses)
