"""Commands that read saved runs or devices."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from pdbench.cli.app import Language, app, check_loads, console
from pdbench.config import LiveConfig, LoadConfig, Policy
from pdbench.config.types import Gpus, Interval, Positive
from pdbench.errors import OptionError, UserError


@app.command
def compare(
    *folders: Path,
    fail_if: tuple[str, ...] = (),
    anyway: bool = False,
    primary: str | None = None,
    lang: Language = "en",
    picture: Path = Path("performance_comparison.png"),
) -> None:
    """Judge one saved run against another: is it better, by how much, how sure; --fail-if makes it a gate for CI.

    Parameters
    ----------
    folders
        Two results folders, A and B; default: single_results and disaggregated_results, where one is missing the other and replicas_results.
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
    from pdbench.live import monitor as room
    from pdbench.site import stop_on_signals

    with stop_on_signals():
        room.monitor(_indices(gpus), interval, duration, out, console)


@app.command
def watch(*urls: str, gpus: str | None = None, live: LiveConfig = LiveConfig()) -> None:
    """Follow servers that somebody else runs and loads in a live page: their /metrics, and this host's devices. Sends no load.

    Parameters
    ----------
    urls
        Addresses of vLLM or SGLang servers, as http://HOST:PORT (of prefill and decode, not of a proxy).
    gpus
        GPU indices with commas between, as 0,1; default: all.
    """
    from pdbench.http import split_url
    from pdbench.live import publisher, servers
    from pdbench.power.device import open_host
    from pdbench.site import stop_on_signals

    if not urls:
        raise UserError("watch needs the address of a server: `pdbench watch http://HOST:PORT ...`")
    names = {split_url(url, option="watch").authority: url for url in urls}
    readers = open_host(_indices(gpus))
    say = partial(console.print, markup=False, soft_wrap=True)
    with stop_on_signals(), publisher.opened(replace(live, live=True), console):
        say(f"watching {', '.join(names)}; Ctrl-C ends it")
        with servers.followed(names, readers, say), suppress(KeyboardInterrupt):
            while True:
                time.sleep(1.0)


def _indices(gpus: str | None) -> list[int] | None:
    try:
        return None if gpus is None else [*dict.fromkeys(int(index) for index in gpus.split(","))]
    except ValueError:
        raise OptionError(f"--gpus {gpus} is no list of GPU indices: write for example --gpus 0,1") from None


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
    *folders: Path,
    out: Path = Path("report"),
    sort_by: str | None = None,
    llm_d: bool = False,
    otlp: str | None = None,
    lang: Language = "en",
) -> None:
    """Draw saved runs: one HTML page with verdicts and interactive figures, Markdown, CSV of all requests, pictures.

    Parameters
    ----------
    folders
        Results folders; the first is the baseline. Default: those of single_results, replicas_results and disaggregated_results that are here.
        Or folders of `pdbench search`: their answers as one, with search.json and its picture. Or of `pdbench sweep`: their points in one table and
        one picture.
    out
        Folder for report.html, report.md, requests.csv and the pictures.
    sort_by
        Metric by which the side-by-side table is sorted, best first: tbt_p99_ms, output_tokens_per_s, ...
    llm_d
        Write each run as a benchmark report of llm-d (schema 0.2.1) too, with the power of each device.
    otlp
        Send each run to this OpenTelemetry receiver (OTLP/HTTP, as http://127.0.0.1:4318): a trace per request, its phases as spans.
    lang
        Language of page and tables.
    """
    from pdbench.files import check_writable
    from pdbench.report import commands, tables, text
    from pdbench.report import search as found
    from pdbench.report.search_files import check_no_measured_search, is_search, joined
    from pdbench.sweep import is_sweep

    with text.language(lang):
        several = any(is_search(folder) or is_sweep(folder) for folder in folders)
        if several and (sort_by or llm_d or otlp):
            raise UserError(
                "--sort-by, --llm-d and --otlp are for results folders, not for those of a search or a sweep"
            )
        if any(map(is_sweep, folders)):
            _report_sweeps(folders, out)
            return
        if any(map(is_search, folders)):
            document, differing = joined(folders, out)
            check_no_measured_search(out)
            check_writable(out)
            out.mkdir(parents=True, exist_ok=True)  # the runs are found from there
            found.present(document, out, console)
            tables.say(console, *tables.differing(differing))
            return
        commands.report(folders, out, sort_by, console, llm_d=llm_d, otlp=otlp)


def _report_sweeps(folders: Sequence[Path], out: Path) -> None:
    from pdbench import sweep
    from pdbench.files import check_writable
    from pdbench.report import sweep as report
    from pdbench.report import tables

    if other := next((folder for folder in folders if not sweep.is_sweep(folder)), None):
        raise UserError(f"{other} holds no sweep: sweeps cannot be mixed with results folders")
    if len(set(folders)) < len(folders):
        raise UserError("a sweep is named twice: name it once")
    if sweep.is_sweep(out) and [out] != [*folders]:
        raise UserError(
            f"{out} holds a sweep of its own, whose table and picture would be replaced: give another --out"
        )
    rows, differing = report.joined({folder: sweep.load(folder) for folder in folders})
    check_writable(out)
    report.show(rows, out, console)
    tables.say(console, *tables.differing(differing))
    tables.say(console, *report.missing(rows))


@app.command
def plan(
    *runs: Path,
    check: Annotated[tuple[Path, ...], Parameter(consume_multiple=True)] = (),
    deployment: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    search: Annotated[bool, Parameter(negative="")] = False,
    max_gpus: Gpus[int | None] = None,
    cheapest: Literal["gpus", "joules"] | None = None,
    prefill_policy: Policy = "least-work",
    decode_policy: Policy = "least-work",
    out: Path = Path("plan"),
    lang: Language = "en",
    load: LoadConfig = LoadConfig(),
) -> None:
    """Predict deployments that were not measured, from runs that were: latencies, throughput and joules with intervals, or a refusal.

    Without --check and --deployment: what the runs calibrate, and what they do not (docs/plan.md).

    Parameters
    ----------
    runs
        Results folders of single, replicas or disaggregated on one kind of GPU; or the --out folder of an earlier plan.
    check
        Other runs: predict them from their arrivals alone, beside what was measured.
    deployment
        What to predict: single, replicas:N, or NpMd (as in 3p5d); several are compared. The load is given as for bench.
    search
        Find the cheapest deployment that keeps the load's SLO (--slo-ttft-ms, --slo-tbt-ms) for 99 % of the requests.
    max_gpus
        How many GPUs it may have; default: 8.
    cheapest
        By number of GPUs (the default), or by joules per token.
    prefill_policy
        Which prefill instance the proxy chooses for a request, as with `pdbench proxy`.
    decode_policy
        Which decode instance, or replica.
    out
        Folder for the calibration, the tables and the pictures.
    lang
        Language of the tables.
    """
    from pdbench import planning
    from pdbench.report import text

    if not search and (max_gpus or cheapest):
        option = "--max-gpus" if max_gpus else "--cheapest"
        raise UserError(f"{option} limits a search: give --search too, or leave it out")
    check_loads([load])
    with text.language(lang):
        planning.plan(
            runs,
            check,
            deployment,
            load,
            out,
            console,
            most_gpus=(max_gpus or 8) if search else None,
            by_joules=cheapest == "joules",
            prefill_policy=prefill_policy,
            decode_policy=decode_policy,
        )
