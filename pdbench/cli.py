"""The commands: each reads its options and calls one function of the rooms below. Nothing is measured or judged here."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import cyclopts
from cyclopts import App, Group, Parameter
from cyclopts.config import Dict as Settings
from rich.console import Console
from rich.markup import escape

from pdbench import __version__, recipe
from pdbench.config import (
    ClusterConfig,
    LoadConfig,
    Options,
    PairConfig,
    PowerConfig,
    ProxyConfig,
    ServeConfig,
    ServerConfig,
)
from pdbench.errors import UserError
from pdbench.files import hold
from pdbench.ranges import Count, Interval, Positive
from pdbench.records import Run

if TYPE_CHECKING:
    from pdbench.site import Site

console = Console()
_HELP = "Does prefill/decode disaggregation pay, in milliseconds and in joules?"
app = App(name="pdbench", help=_HELP, version=__version__, suppress_keyboard_interrupt=False)
_RECIPE_HELP = "A TOML file that sets options; a flag overrides what it sets."
Recipe = Annotated[Path | None, Parameter(help=_RECIPE_HELP, validator=recipe.check)]
DEFAULTS = Options()
_MEASURING = Group("Measurement and output", sort_key=0)
_WITH_RECIPE = ("run", "bench", "sweep", "serve", "doctor", "proxy")
"""Commands that take a recipe; each ignores options of the others."""


def _recipe_settings(arguments: list[str]) -> list[Settings]:
    """A recipe (a .toml file) gives every option that no flag sets."""
    if not arguments or arguments[0] not in _WITH_RECIPE:
        return []
    paths = [Path(text) for text in arguments[1:] if text.endswith(".toml") and not text.startswith("-")]
    if len(paths) > 1:
        raise UserError(f"several recipes, {' and '.join(map(str, paths))}: name one, and give the rest as flags")
    if not paths:
        return []
    settings = recipe.read(paths[0])
    foreign = set.union(*(_options(command) for command in _WITH_RECIPE)) - _options(arguments[0])
    settings = {key: value for key, value in settings.items() if key not in foreign}
    return [Settings(settings, use_commands_as_keys=False, source=str(paths[0]))]


@contextmanager
def _measuring(cluster: ClusterConfig | None, out: Path) -> "Iterator[tuple[Site, dict[Path, Run]]]":
    """Where to measure, and the runs by folder to fill; they are shown afterwards, also what was measured before a failure.

    Raises UserError when the figures of a run do not count.
    """
    from pdbench.cluster import open_site
    from pdbench.report import commands
    from pdbench.site import stop_on_signals

    runs: dict[Path, Run] = {}
    with stop_on_signals(lambda: runs and f"what was measured is saved in {', '.join(map(str, runs))}"), hold(out):
        try:
            with open_site(cluster) as site:
                yield site, runs
        finally:  # Ctrl-C during a slow picture ends it; the runs are saved already
            analyses = commands.finish(runs, out, console)
    commands.exit_on_flags(analyses)


@app.command(group_parameters=_MEASURING)
def run(
    recipe: Recipe = None,
    /,
    *,
    against: str | None = None,
    out: Path = Path(),
    design: PairConfig | None = None,
    options: Options = DEFAULTS,
    cluster: ClusterConfig | None = None,
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

    design = design or PairConfig()
    until = thresholds.parse_width(design.until) if design.until else None
    thresholds.check_metric(options.load.primary, "--primary")
    with _measuring(cluster, out) as (site, runs):
        kinds = turns.deployments(against) if against else site.kinds()
        experiment.run(
            kinds, design, options, out, console, site, runs, until and (lambda: commands.narrow_enough(runs, until))
        )


@app.command(group_parameters=_MEASURING)
def bench(
    recipe: Recipe = None,
    /,
    *,
    url: str = "http://127.0.0.1:8000",
    trials: Count[int] = 1,
    out: Path = Path(),
    server: ServerConfig | None = None,
    load: LoadConfig | None = None,
    power: PowerConfig | None = None,
    cluster: ClusterConfig | None = None,
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

    served = ServeConfig(**asdict(server or ServerConfig()))
    options = Options(serve=served, load=load or LoadConfig(), power=power or PowerConfig())
    with _measuring(cluster, out) as (site, runs):
        experiment.bench(url, trials, options, out, console, site, runs)


@app.command
def serve(
    recipe: Recipe = None,
    /,
    *,
    single: bool = False,
    against: str | None = None,
    show: bool = False,
    serve: ServeConfig | None = None,
    cluster: ClusterConfig | None = None,
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
    from pdbench.cluster import open_site
    from pdbench.site import Site, stop_on_signals

    kind = turns.deployments(against or ("single" if single else "disaggregated"))[0]
    if show:
        for command in Site().deployment(kind, serve or ServeConfig()).commands.values():
            settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in command.environment.items())
            secrets = "".join(f" (set {name} to the same secret for all)" for name in command.secret_names)
            print(f"# {command.name}{secrets}\n{settings} {shlex.join(command.argv)}")
        return
    with (
        stop_on_signals(),
        open_site(cluster) as site,
        turns.started(site.deployment(kind, serve or ServeConfig()), console) as deployment,
    ):
        info = deployment.info()
        console.print(f"[green]ready[/green]: {info.url}  model {info.model_name}  (Ctrl-C ends all)", highlight=False)
        try:
            while True:
                deployment.check()
                time.sleep(0.5)
        except KeyboardInterrupt:
            console.print("stopping")


@app.command
def doctor(recipe: Recipe = None, /, *, serve: ServeConfig | None = None, cluster: ClusterConfig | None = None) -> None:
    """Say whether this machine (or every node of --cluster) can do it, and what to fix."""
    from pdbench import doctor
    from pdbench.cluster import open_site

    with open_site(cluster) as site:
        sys.exit(doctor.report(site.findings(serve or ServeConfig()), console))


def _options(command: str) -> set[str]:
    """The options of a command, as a recipe names them."""
    names = (name for argument in app[command].assemble_argument_collection() for name in argument.names)
    return {name[2:].replace("-", "_") for name in names if name.startswith("--")}


@app.command
def proxy(recipe: Recipe = None, /, *, proxy: ProxyConfig | None = None) -> None:
    """Forward requests to prefill and decode instances until Ctrl-C or SIGTERM; docs/proxy.md says how."""
    from pdbench.proxy.server import serve

    serve(proxy or ProxyConfig())


@app.command
def compare(
    *folders: Path,
    fail_if: tuple[str, ...] = (),
    anyway: bool = False,
    primary: str | None = None,
    lang: Literal["en", "zh"] = "en",
    picture: Path = Path("performance_comparison.png"),
) -> None:
    """Judge one saved run against another: is it better, by how much, how sure; --fail-if makes it a gate for CI.

    Parameters
    ----------
    folders
        Two results folders, A and B; default: single_results and disaggregated_results.
    fail_if
        Condition on B against A, as in "tbt_p99_ms > +5%" (several allowed): exit code 1 when met, 3 when it cannot be told,
        2 when nothing could be judged.
    anyway
        Compare also what was not measured alike; what differs is then named.
    primary
        Metric that is judged at 5 % alone, the others as a family (docs/statistics.md); default: the runs' own --primary.
    lang
        Language of the table.
    picture
        Where the picture goes.
    """
    from pdbench.report import commands, text

    try:
        with text.language(lang):
            sys.exit(commands.compare_folders(folders, fail_if, anyway, picture, console, primary))
    except UserError as error:
        raise UserError(str(error), exit_code=2) from None  # 1 says that a condition is met


@app.command
def monitor(
    *,
    gpus: str | None = None,
    interval: Interval[float] = 0.1,
    duration: Positive[float | None] = None,
    out: Path | None = None,
) -> None:
    """Watch power, clocks and utilisation of this host's devices: a live table, and a file when it ends.

    Parameters
    ----------
    gpus
        GPU indices with commas between, as 0,1; default: all.
    interval
        Seconds between samples, 0.01 to 10.
    duration
        Seconds to watch; default: until Ctrl-C.
    out
        File for what was read: .json (everything, the fine power curve too) or .csv (the samples).
    """
    from pdbench.power import monitor as room
    from pdbench.site import stop_on_signals

    try:
        indices = None if gpus is None else [int(index) for index in gpus.split(",")]
    except ValueError:
        raise UserError(f"--gpus {gpus} is no list of GPU indices: write for example --gpus 0,1") from None
    with stop_on_signals():
        room.monitor(indices, interval, duration, out, console)


@app.command
def plot(source: Path, /, *, picture: Path | None = None) -> None:
    """Draw the curves of devices: power with utilisation behind it, clocks, temperature, power against utilisation.

    Parameters
    ----------
    source
        A file of `pdbench monitor`, a *_gpu_data.json, or a results folder.
    picture
        Where the PNG goes; default: beside the source.
    """
    from pdbench.report import commands

    commands.plot(source, picture, console)


@app.command
def report(
    *folders: Path, out: Path = Path("report"), sort_by: str | None = None, lang: Literal["en", "zh"] = "en"
) -> None:
    """Draw saved runs: one HTML page with verdicts and interactive figures, Markdown, CSV of all requests, pictures.

    Parameters
    ----------
    folders
        Results folders; the first is the baseline. Default: single_results and disaggregated_results.
    out
        Folder for report.html, report.md, requests.csv and the pictures.
    sort_by
        Metric by which the side-by-side table is sorted, best first: tbt_p99_ms, output_tokens_per_s, ...
    lang
        Language of page and tables.
    """
    from pdbench.report import commands, text

    with text.language(lang):
        commands.report(folders, out, sort_by, console)


@app.command(group_parameters=_MEASURING)
def sweep(
    recipe: Recipe = None,
    /,
    *,
    vary: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    against: str = "single,disaggregated",
    url: str | None = None,
    trials: Count[int] = 1,
    slo: str = "",
    out: Path = Path("sweep"),
    options: Options = DEFAULTS,
    cluster: ClusterConfig | None = None,
) -> None:
    """Measure every combination of some options, one folder per point; the same command again resumes it.

    Parameters
    ----------
    vary
        KEY=V1,V2,... of any option, several for all combinations: concurrency=1,2,4,8 prefill_instances=1,2.
    against
        Deployments to measure at every point, with commas between.
    url
        Measure the server that runs here instead of starting deployments.
    trials
        Repetitions of each point.
    slo
        Limits of the goodput, as in ttft=200,tbt=50 (milliseconds).
    out
        Folder of the points, the summary table and the curves.
    """
    from pdbench import experiment, sweep, turns
    from pdbench.cluster import open_site
    from pdbench.report import commands
    from pdbench.site import stop_on_signals

    points = sweep.points(sweep.with_slo(options, slo), vary)
    kinds = turns.deployments(against)

    def measure(point: Options, folder: Path) -> list[Path]:
        runs: dict[Path, Run] = {}
        try:
            if url is not None:
                experiment.bench(url, trials, point, folder, console, site, runs)
            else:
                experiment.run(kinds, PairConfig(pairs=trials, join_starts=True), point, folder, console, site, runs)
        finally:
            for measured, run in runs.items():
                commands.finish({measured: run}, folder, console)
        return list(runs)

    nodes = cluster and asdict(cluster)
    context = {"against": None if url else against, "url": url, "trials": trials, "cluster": nodes}
    with stop_on_signals(lambda: sweep.saved(out)), hold(out), open_site(cluster) as site:
        commands.present_sweep(sweep.run(points, out, measure, console, context), out, console)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a UserError becomes one line on stderr and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        app.config = _recipe_settings(arguments)
        app(arguments, exit_on_error=False, print_error=False)
    except UserError as error:
        stderr.print(f"[red]pdbench:[/red] {escape(str(error))}")
        sys.exit(error.exit_code)
    except cyclopts.CycloptsError as error:
        stderr.print(f"[red]pdbench:[/red] {escape(str(error).strip())} Try `pdbench --help`.")
        sys.exit(2)
