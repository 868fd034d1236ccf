"""Servers in the record: what a scripted server counts and logs while it is measured stands in the saved run, that of the warm-up not."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.config import LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.records import Run, load_run
from pdbench.site import Site
from tests.conftest import serve_config
from tests.support.scripted_vllm import COUNTING_SERVER, Scripted
from tests.support.servers import ScriptedServer


class Host(Scripted):
    server = COUNTING_SERVER


def options(interval_s: float) -> Options:
    power = PowerConfig(power=False, metrics_interval_s=interval_s)
    return Options(load=LoadConfig(requests=12, concurrency=2, output_tokens=32, warmup=4), power=power)


@pytest.fixture(scope="module", params=[0.05, 0.0], ids=["read all the time", "read before and after"])
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, RunAnalysis, float]:
    folder = tmp_path_factory.mktemp("run")
    measuring = Options(serve=serve_config(folder / "logs"), load=options(0).load, power=options(request.param).power)
    design = PairConfig(pairs=1, resident=False)
    experiment.run(["single"], design, measuring, folder, Console(file=io.StringIO()), Site(host_class=Host), {})
    out = folder / "single_results"
    return load_run(out), load_analysis(out), request.param


def test_counters_are_in_the_run_and_the_warm_up_is_not_counted(measured: tuple[Run, RunAnalysis, float]) -> None:
    run, analysis, interval_s = measured
    (series,) = run.servers
    server = analysis.summary.servers["single-0"]
    assert (series.server, series.role, server.loads.preemptions) == ("single-0", "single", 12)
    assert len(series.t_s) == 2 if interval_s == 0 else server.loads.readings > 2 and server.loads.waiting_max == 3


def test_flags_name_server_instant_and_number(measured: tuple[Run, RunAnalysis, float]) -> None:
    _, analysis, interval_s = measured
    flags = {flag.name: flag.detail for flag in analysis.flags}
    assert flags["preempted"].startswith("single-0: 12 preemptions, first seen ")
    assert ("kv-full" in flags) == (interval_s > 0)
    assert re.match(
        r'single-0: "Triton kernel JIT compilation during inference: kernel_(9|18|27)\."( and 1 more)? in its log, first seen \d',
        flags["compiled-under-load"],
    )
    assert "kernel_2." not in flags["compiled-under-load"]


def test_foreign_server_with_metrics_is_recorded_too(tmp_path: Path) -> None:
    scope: dict = {}
    exec(COUNTING_SERVER.rsplit("\n\n", 1)[0], scope)  # its functions, without the server
    with ScriptedServer(scope["answer"]) as server:
        measuring = Options(
            load=options(0.05).load, power=options(0.05).power, serve=ServeConfig(log_dir=str(tmp_path))
        )
        experiment.bench(server.url, 1, measuring, tmp_path, Console(file=io.StringIO()), Site(), {})
    analysis = load_analysis(tmp_path / "bench_results")
    assert analysis.summary.servers["server"].loads.preemptions == 12
    assert "compiled-under-load" not in {flag.name for flag in analysis.flags}
