"""Commands that start, load or check servers."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from pdbench.cli.app import MEASURING, Language, Recipe, app, check_loads, console
from pdbench.config import (
    ClusterConfig,
    LiveConfig,
    LoadConfig,
    Options,
    PairConfig,
    PowerConfig,
    ProxyConfig,
    ServeConfig,
    ServerConfig,
)
from pdbench.config.types import Count
from pdbench.errors import UserError
from pdbench.files import hold
from pdbench.live import publisher
from pdbench.records import Run

if TYPE_CHECKING:
    from pdbench import turns
    from pdbench.site import Site


@contextmanager
def _measuring(cluster: ClusterConfig | None, out: Path, live: LiveConfig) -> "Iterator[tuple[Site, dict[Path, Run]]]":
    """Where to measure, and the runs by folder to fill; they are shown afterwards, also what was measured before a failure.

    Raises UserError when the figures of a run do not count.
    """
    from pdbench.report import commands
    from pdbench.site import open_site, stop_on_signals

    runs: dict[Path, Run] = {}
    with (
        stop_on_signals(lambda: runs and f"what was measured is saved in {', '.join(map(str, runs))}"),
        hold(out),
        publisher.opened(live, console),
    ):
        try:
            with open_site(cluster) as site:
                yield site, runs
        finally:  # Ctrl-C during a slow picture ends it; the runs are saved already
            analyses = commands.finish(runs, out, console)
            publisher.leave(runs)
        commands.exit_on_flags(analyses)


@contextmanager
def servers_stay(
    cluster: ClusterConfig | None, out: Path, live: LiveConfig, saved: Callable[[], str]
) -> "Iterator[tuple[Site, turns.Servers]]":
    """Where to measure many runs, and servers that stay up between them; `saved` says on Ctrl-C what is left."""
    from pdbench import turns
    from pdbench.site import open_site, stop_on_signals

    with (
        stop_on_signals(saved),
        hold(out),
        publisher.opened(live, console),
        open_site(cluster) as site,
        closing(turns.Servers(site, progress_to(live), stay=True)) as servers,
    ):
        yield site, servers


@contextmanager
def kept(keep: Callable[[Run, Path], object]) -> Iterator[dict[Path, Run]]:
    """One load's runs by folder, to fill; what was measured, also before a failure, is given to `keep` and left to the live page."""
    runs: dict[Path, Run] = {}
    try:
        yield runs
    finally:
        for folder, run in runs.items():
            keep(run, folder)
        publisher.leave(runs)


def progress_to(live: LiveConfig) -> Console:
    """Where progress is printed: nowhere with --quiet."""
    return Console(quiet=True) if live.quiet else console


@app.command(group_parameters=MEASURING)
def run(
    recipe: Recipe = None,
    /,
    *,
    against: str | None = None,
    out: Path = Path(),
    design: PairConfig = PairConfig(),
    options: Options = Options(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Start each deployment, send it the same load, measure, compare: the whole job.

    Parameters
    ----------
    against
        Deployments to compare, with commas between: single, replicas, tensor-parallel, disaggregated; default: single, replicas
        and disaggregated, without replicas on a host without GPUs.
    out
        Folder in which the results folders go.
    """
    from pdbench import experiment, turns
    from pdbench.analysis import thresholds
    from pdbench.report import commands

    until = thresholds.parse_width(design.until) if design.until else None
    check_loads([options.load])
    with _measuring(cluster, out, live) as (site, runs):
        kinds = turns.deployments(against) if against else site.kinds()
        if until and len(kinds) < 2:
            raise UserError(f"--until compares deployments, and --against {kinds[0]} names one: name two or more")
        experiment.run(
            kinds,
            design,
            options,
            out,
            progress_to(live),
            site,
            runs,
            until and (lambda: commands.narrow_enough(runs, until)),
        )


@app.command(group_parameters=MEASURING)
def bench(
    recipe: Recipe = None,
    /,
    *,
    url: str = "http://127.0.0.1:8000",
    trials: Count[int] = 1,
    out: Path = Path(),
    server: ServerConfig = ServerConfig(),
    load: LoadConfig = LoadConfig(),
    power: PowerConfig = PowerConfig(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Send the load to servers that run, ours or any OpenAI-compatible ones, and measure.

    Parameters
    ----------
    url
        Where the server or the proxy answers.
    trials
        Repetitions.
    out
        Folder in which the results folder goes.
    """
    from pdbench import experiment

    served = ServeConfig(**asdict(server))
    options = Options(serve=served, load=load, power=power)
    check_loads([options.load])
    with _measuring(cluster, out, live) as (site, runs):
        experiment.bench(url, trials, options, out, progress_to(live), site, runs)


@app.command(group_parameters=MEASURING)
def sweep(
    recipe: Recipe = None,
    /,
    *,
    vary: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    against: str | None = None,
    url: str | None = None,
    trials: Count[int] = 1,
    slo: str = "",
    fresh_servers: bool = False,
    out: Path = Path("sweep"),
    lang: Language = "en",
    options: Options = Options(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Measure every combination of some options, one folder per point; the same command again resumes it.

    Parameters
    ----------
    vary
        KEY=V1,V2,... of any option, several for all combinations: concurrency=1,2,4,8 prefill_instances=1,2.
    against
        Deployments to measure at every point, with commas between; default: single,disaggregated.
    url
        Measure the server that runs here instead of starting deployments.
    trials
        Repetitions of each point.
    slo
        Limits of the goodput, as in ttft=200,tbt=50 (milliseconds).
    fresh_servers
        Start the servers at every point, and let the deployments take turns there; default: they stay up while only other
        options change, one deployment after the other.
    out
        Folder of the points, the summary table and the curves.
    lang
        Language of table and pictures.
    """
    from pdbench import experiment, sweep, turns
    from pdbench.report import commands, text
    from pdbench.report import sweep as sweeps

    points = sweep.points(sweep.with_slo(options, slo), vary)
    check_loads([point.options.load for point in points])
    if url is not None:
        sweep.check_running(points, against)
    against = against or "single,disaggregated"
    kinds = turns.deployments(against)
    progress = progress_to(live)
    parts = [""] if url is not None or fresh_servers else [*dict.fromkeys(kinds)]

    def measure(point: Options, folder: Path, part: str) -> list[Path]:
        # They are drawn once the sweep has noted that they are measured: Ctrl-C during a slow picture costs no measurement.
        with kept(commands.keep) as runs:
            if url is not None:
                experiment.bench(url, trials, point, folder, progress, site, runs)
            elif part:
                design = PairConfig(pairs=trials, resident=False)
                experiment.run(turns.deployments(part), design, point, folder, progress, site, runs, servers=servers)
            else:
                experiment.run(kinds, PairConfig(pairs=trials, join_starts=True), point, folder, progress, site, runs)
        return list(runs)

    nodes = cluster and asdict(cluster)
    together = against if url is None and fresh_servers else None  # else each deployment of a point is kept apart
    context = {"against": together, "url": url, "trials": trials, "cluster": nodes}
    models = experiment.served_models(url, [point.options for point in points]) if url is not None else None
    with servers_stay(cluster, out, live, lambda: sweep.saved(out)) as (site, servers):
        for point in points:
            site.check_load(point.options.load)
            site.check_gpus(point.options.serve, running=url is not None)
        measured = sweep.run(points, out, measure, console, context, parts, models)
        with text.language(lang):
            rows = sweeps.present(measured, out, console, progress)
    for varied, analysis in rows:
        commands.exit_on_flags([analysis], sweep.Point(varied, options).name)


@app.command
def serve(
    recipe: Recipe = None,
    /,
    *,
    single: bool = False,
    against: str | None = None,
    show: bool = False,
    serve: ServeConfig = ServeConfig(),
    cluster: ClusterConfig | None = None,
    live: LiveConfig = LiveConfig(),
) -> None:
    """Start prefill, decode and the proxy (or --single: one instance) and keep them up until Ctrl-C.

    Parameters
    ----------
    single
        One traditional instance.
    against
        Another deployment by name: replicas, tensor-parallel.
    show
        Print the command lines and start nothing.
    """
    import shlex

    from pdbench import turns
    from pdbench.host import LocalHost
    from pdbench.live import servers
    from pdbench.site import Site, open_site, stop_on_signals

    kind, *others = turns.deployments(against or ("single" if single else "disaggregated"))
    if others or (single and against):
        raise UserError("serve starts one deployment: give --single, or --against with one name")
    if show:
        for command in Site().deployment(kind, serve).commands.values():
            settings = "".join(f"{key}={shlex.quote(value)} " for key, value in command.environment.items())
            secrets = "".join(f" (set {name} to the same secret for all)" for name in command.secret_names)
            line = f"# {command.name}{secrets}\n{settings}{shlex.join(command.argv)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    with (
        stop_on_signals(),
        publisher.opened(live, console),
        open_site(cluster) as site,
        turns.started(site.deployment(kind, serve), progress_to(live)) as deployment,
        ExitStack() as following,
    ):
        info = deployment.info()
        try:
            console.print(f"[green]ready[/green]: {info.url}  model {info.model_name}  (Ctrl-C ends all)")
            if publisher.is_open():
                urls = {server.name: server.url for server in info.servers if server.role != "proxy"}
                here = [server for server in info.servers if server.host is None]
                following.enter_context(servers.followed(urls, LocalHost().open_readers(here)))
            while True:
                deployment.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            console.print("stopping")


@app.command
def doctor(
    recipe: Recipe = None, /, *, serve: ServeConfig = ServeConfig(), cluster: ClusterConfig | None = None
) -> None:
    """Say whether this machine (or every node of --cluster) can do it, and what to fix."""
    from pdbench import doctor
    from pdbench.site import open_site

    with open_site(cluster) as site:
        sys.exit(doctor.report(site.findings(serve), console))


@app.command
def proxy(recipe: Recipe = None, /, *, proxy: ProxyConfig = ProxyConfig()) -> None:
    """Forward requests to prefill and decode instances until Ctrl-C or SIGTERM; docs/proxy.md says how."""
    from pdbench.proxy.server import serve

    serve(proxy)
