"""Servers in the record: what a scripted server counts and logs while it is measured stands in the saved run, that of the warm-up not."""

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.analysis.run_analysis import RunAnalysis, load_analysis
from pdbench.config import LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.records import Run, load_run
from pdbench.serving.plan import ServerSpec
from pdbench.serving.vllm import Command, Setup
from pdbench.site import Site
from tests.conftest import serve_config
from tests.support.scripted_vllm import Scripted
from tests.support.servers import ScriptedServer

SERVER = """import sys, threading
from tests.support.servers import ScriptedServer, completions

requests, counting = 0, threading.Lock()
complete = completions(0.01)
LOGGED = "(EngineCore pid=9) WARNING 11-26 05:59:27 [jit_monitor.py:140] Triton kernel JIT compilation during inference: kernel_{}."

def answer(peer):
    global requests
    if peer.path.startswith("/metrics"):
        figures = {"vllm:num_preemptions_total": requests, "vllm:num_requests_waiting": 3, "vllm:kv_cache_usage_perc": 0.97}
        body = "".join(f'{name}{{engine="0"}} {value}\\n' for name, value in figures.items()).encode()
        peer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n%b" % (len(body), body))
        return True
    if peer.method == "POST":
        with counting:
            requests += 1
            if requests in (2, 9):
                print(LOGGED.format(requests), flush=True)
    return complete(peer)

ScriptedServer(answer, host=sys.argv[1], port=int(sys.argv[2])).serve_forever()
"""


class Host(Scripted):
    def command(self, spec: ServerSpec, config: ServeConfig, gpus: tuple[int, ...], setup: Setup) -> Command:
        argv = (sys.executable, "-c", SERVER, config.host, str(spec.port))
        return Command(spec.name, spec.role, argv, {}, f"http://{config.host}:{spec.port}")


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
    assert (
        '"Triton kernel JIT compilation during inference: kernel_9." in its log, first seen '
        in flags["compiled-under-load"]
    )
    assert "kernel_2" not in flags["compiled-under-load"]


def test_foreign_server_with_metrics_is_recorded_too(tmp_path: Path) -> None:
    scope: dict = {}
    exec(SERVER.rsplit("\n\n", 1)[0], scope)  # its functions, without the server
    with ScriptedServer(scope["answer"]) as server:
        measuring = Options(
            load=options(0.05).load, power=options(0.05).power, serve=ServeConfig(log_dir=str(tmp_path))
        )
        experiment.bench(server.url, 1, measuring, tmp_path, Console(file=io.StringIO()), Site(), {})
    analysis = load_analysis(tmp_path / "bench_results")
    assert analysis.summary.servers["server"].loads.preemptions == 12
    assert "compiled-under-load" not in {flag.name for flag in analysis.flags}
