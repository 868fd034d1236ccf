"""A pretended host with one GPU (NVML replaced) and scripted servers: every deployment runs on it, and its energy is counted once."""

from pathlib import Path

import pytest

from pdbench import turns
from pdbench.analysis.run_analysis import analyze
from pdbench.records import load_run
from tests.conftest import serve_config
from tests.support.fake_nvml import child

RUN = """
import dataclasses, io
from pathlib import Path
from rich.console import Console
from pdbench import correctness, experiment, nvml
from pdbench.config import LoadConfig, Options, PairConfig, PowerConfig, ServeConfig
from pdbench.serving import machine
from pdbench.site import Site
from tests.support.scripted_vllm import Scripted
from tests.support.sites import gate

SERVER = '''import sys, time
from tests.support.servers import ScriptedServer, completions
def note(text):
    with open({starts!r}, "a") as file:
        file.write(text + "\\\\n")
note(sys.argv[2] + " begins")
time.sleep(0.5)
server = ScriptedServer(completions(0.02), host=sys.argv[1], port=int(sys.argv[2]))
note(sys.argv[2] + " listens")
server.serve_forever()
'''
machine.installed_version = lambda name: None
correctness.run = lambda info, nonce, reference=None: (gate(), ["text"])
host = type("Host", (Scripted,), {{"server": SERVER}})
printed = io.StringIO()
options = Options(
    serve=ServeConfig(**{serve!r}),
    load=LoadConfig(requests=32, concurrency=4, output_tokens=8, warmup=2, canaries=0.0),
    power=PowerConfig(idle_s=0.3, cooldown_s=0.0, metrics_interval_s=0.0),
)
experiment.run(
    ("single", "replicas", "disaggregated"), PairConfig(pairs=1, resident={resident}), options, Path({out!r}),
    Console(file=printed, width=300), Site(machine.Machine("0.33.0", nvml.gpus()), host), {{}},
)
print(printed.getvalue())
"""


@pytest.mark.parametrize("resident", [False, True])
def test_deployments_on_one_gpu(tmp_path: Path, nvml_library: Path, resident: bool) -> None:
    config, starts = serve_config(tmp_path / "logs", prefill_gpus=(0,), decode_gpus=(0,)), tmp_path / "starts"
    names = [name for name in config.plain() if name.endswith(("_port", "_gpus", "log_dir"))]
    serve = {name: getattr(config, name) for name in names}
    code = RUN.format(starts=str(starts), serve=serve, out=str(tmp_path), resident=resident)
    printed = child(nvml_library, code, gpus="1")
    # Each instance begins when the one before it listens; proxies may start beside the last one.
    proxies = {str(config.proxy_port + turns.PORTS_APART * place) for place in range(3)}
    steps = [(port, step) for port, step in map(str.split, starts.read_text().splitlines()) if port not in proxies]
    ports = [port for port, step in steps if step == "begins"]
    assert steps == [(port, step) for port in ports for step in ("begins", "listens")] and len(ports) == 5
    roles = {"single": "single", "replicas": "replica", "disaggregated": "prefill+decode"}
    for kind, role in roles.items():
        run = load_run(tmp_path / f"{kind}_results")
        assert [(device.id, device.role) for device in run.devices if device.kind == "gpu"] == [("gpu0", role)]
        analysis = analyze(run)
        energy = analysis.summary.energy
        (trial,) = run.trials
        assert analysis.gpus == 1 and list(energy.roles) == [role]
        assert energy.total_j == pytest.approx(
            100 * (trial.end_s - trial.start_s), rel=0.05
        )  # the fake GPU draws 100 W
        assert energy.j_per_output_token == pytest.approx(energy.total_j / (32 * 8), rel=0.05)
        share = 0.8 / (3 if resident else 1) / (1 if kind == "single" else 2)
        shared = [flag.detail for flag in run.flags if flag.name == "gpu-shared"]
        assert len(shared) == (kind != "single") and all(f" {share} (" in detail for detail in shared)
        assert all(detail in printed for detail in shared)
        if kind == "disaggregated":
            assert "KV goes through host memory (tcp)" in shared[0] and "share their GPUs" in (energy.not_split or "")
