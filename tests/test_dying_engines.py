"""A real vLLM engine that is killed under load: the trial ends at once, although the API server still answers, and says why."""

import io
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import DeploymentKind, LoadConfig, Options, PairConfig, PowerConfig
from pdbench.errors import UserError
from pdbench.records import load_run
from tests.conftest import serve_config
from tests.support.dying import SOON_S, Doomed
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

    def kill_engine(log: Path, supervisor: int) -> None:
        children = psutil.Process(supervisor).children(recursive=True)
        next(each for each in children if "EngineCore" in " ".join([each.name(), *each.cmdline()])).kill()

    doomed = Doomed(tmp_path / "logs", server, kill_engine)
    printed = io.StringIO()
    with pytest.raises(UserError) as raised:
        design = PairConfig(pairs=2, resident=False)
        experiment.run((kind,), design, options, tmp_path, Console(file=printed, width=200), doomed.site(), {})
    first = str(raised.value).splitlines()[0]
    assert first.startswith(f"{server} died ") and "ended from outside" in first and "(line " in first, raised.value
    assert len(doomed.ended_s) == 1 and doomed.took_s() < SOON_S
    run = load_run(tmp_path / f"{kind}_results")
    assert [flag.name for flag in run.flags].count("server-died") == 1
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
