"""A real vLLM engine that is killed under load: the trial ends at once, although the API server still answers, and says why."""

import io
import threading
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig
from pdbench.errors import UserError
from pdbench.records import load_run
from pdbench.serving import deployment as deployments
from pdbench.site import Site
from tests.conftest import serve_config
from tests.support.processes import wait_until

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


@pytest.mark.parametrize(
    ("kind", "server"),
    [
        pytest.param("single", "single-0", id="single", marks=pytest.mark.slow),
        pytest.param("disaggregated", "decode-0", id="disaggregated"),
    ],
)
def test_engine_that_is_killed_ends_the_trial_with_the_reason(
    tmp_path: Path, kind: DeploymentKind, server: str
) -> None:
    config = serve_config(tmp_path / "logs")
    load = LoadConfig(rate=4.0, requests=4000, input_tokens=32, output_tokens=16, warmup=2)
    options = Options(serve=config, load=load, power=PowerConfig(power=False))
    killing: list[threading.Thread] = []
    killed: list[float] = []
    ended: list[float] = []

    class WatchedSite(Site):
        def run_load(self, load, on_progress, on_begin, problem):  # type: ignore[no-untyped-def]
            def kill() -> None:
                info = deployments.find(tmp_path / "logs", f"http://127.0.0.1:{port}")
                assert info is not None
                (root,) = next(each.pids for each in info.servers if each.name == server)
                children = psutil.Process(root).children(recursive=True)
                next(each for each in children if "EngineCore" in " ".join([each.name(), *each.cmdline()])).kill()
                killed.append(time.monotonic())

            def progress(done: int, total: int | None) -> None:
                if done >= 8 and not killing:
                    killing.append(threading.Thread(target=kill, daemon=True))
                    killing[0].start()

            try:
                return super().run_load(load, progress, on_begin, problem)
            finally:
                ended.append(time.monotonic())

    port = config.single_port if kind == "single" else config.proxy_port
    printed = io.StringIO()
    with pytest.raises(UserError) as raised:
        design = PairConfig(pairs=2, resident=False)
        experiment.run((kind,), design, options, tmp_path, Console(file=printed, width=200), WatchedSite(), {})
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"{server} died ") and "ended from outside" in first and "(line " in first, raised.value
    assert len(ended) == 1 and ended[0] - killed[0] < 2.0, (ended, killed)
    run = load_run(tmp_path / f"{kind}_results")
    assert [flag.name for flag in run.flags if flag.name in ("server-died", "client-limited")] == ["server-died"]
    assert first in printed.getvalue()
    wait_until(
        lambda: (
            not [
                each
                for each in psutil.process_iter(["cmdline"])
                if str(tmp_path) in " ".join(each.info["cmdline"] or [])
            ]
        )
    )
