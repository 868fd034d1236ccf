"""A pretended host with one GPU (NVML replaced) and scripted servers: every deployment runs on it, and its energy is counted once."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from pdbench import nvml, turns
from pdbench.analysis.run_analysis import analyze
from pdbench.config import DeploymentKind, Options, PairConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.records import load_run
from pdbench.serving import machine
from pdbench.serving.machine import Machine
from pdbench.serving.models import shape_model, weights_mib
from pdbench.site import Site
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
    load=LoadConfig(requests=16, concurrency=4, output_tokens=8, warmup=2, canaries=0.0),
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
    printed = child(nvml_library, code, gpus="1", processes="" if resident else "0:4242 1:4243")
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
            100 * (trial.end_s - trial.start_s), rel=0.25
        )  # the fake GPU draws 100 W
        arrived = [at_s for request in run.requests if not request.warmup for at_s in request.token_s]
        tokens = sum(trial.start_s <= at_s <= trial.end_s for at_s in arrived)
        assert energy.j_per_output_token == pytest.approx(energy.total_j / tokens)
        share = 0.8 / (3 if resident else 1) / (1 if kind == "single" else 2)
        shared = [flag.detail for flag in run.flags if flag.name == "gpu-shared"]
        assert len(shared) == (kind != "single") and all(f" {share} (" in detail for detail in shared)
        assert all(detail in printed for detail in shared)
        (in_use,) = [flag.detail for flag in run.flags if flag.name == "gpu-in-use"]
        whose = "others hold" if resident else "other processes (1) hold"
        assert in_use.startswith(f"gpu0: {whose} 65,536 of 144,384 MiB before any server starts") and in_use in printed
        if kind == "disaggregated":
            assert "KV goes through host memory (tcp)" in shared[0] and "share their GPUs" in (energy.not_split or "")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment's vLLM is for GPUs."""
    monkeypatch.setattr(machine, "installed_version", lambda name: None)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(shape_model(tmp_path_factory.mktemp("model") / "deepseek-v2-lite"))


@pytest.mark.parametrize(
    ("gib", "kind", "resident", "options", "refused"),
    [
        (80, "single", False, {}, None),
        (80, "disaggregated", False, {}, None),
        (80, "single", True, {}, "single-0 gets 0.27 of the memory of GPU 0, 21,845 MiB, and the model's weights take 29,958 MiB: .*--resident"),
        (141, "single", True, {}, None),
        (24, "single", False, {"tensor_parallel": 2}, None),
        (16, "single", False, {"tensor_parallel": 2}, "GPU 0, 1, 13,107 MiB, and its part of the model's weights take 14,979"),
        (24, "single", False, {}, "single-0 gets 0.8 "),
        (24, "single", False, {"vllm_args": "--quantization fp8"}, None),
        (24, "single", False, {"dtype": "float32"}, "single-0 gets"),
        (80, "single", False, {"vllm_args": "--gpu_memory_utilization=.3"}, "single-0 gets 0.3 "),
        (80, "single", False, {"vllm_args": "--gpu-memory-utilization much"}, None),
        (80, "single", False, {"vllm_args": "--gpu-memory-utilization .3 --kv-cache-memory-bytes 8G"}, None),
        (80, "replicas", False, {"prefill_gpus": (0,), "decode_gpus": (0,)}, None),
        (70, "disaggregated", False, {"prefill_gpus": (0,), "decode_gpus": (0,)}, "prefill-0 gets 0.4 of the memory of GPU 0, 28,672 MiB"),
        (
            141,
            "disaggregated",
            False,
            {"prefill_gpus": (0,), "decode_gpus": (0,), "decode_args": "--gpu-memory-utilization 0.7"},
            "the servers on GPU 0 are given 1.1 of its memory together",
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("cuda")
def test_weights_that_do_not_fit_are_refused_before_a_start(
    shape: str, gib: int, kind: DeploymentKind, resident: bool, options: dict[str, Any], refused: str | None
) -> None:
    gpus = tuple(nvml.Gpu(index, "H100", "580", 1024.0 * gib, 0.0) for index in (0, 1))
    config = ServeConfig(model=shape, load_format="dummy", **options)
    if resident:
        config = turns.side_by_side(("single", "replicas", "disaggregated"), config)[kind]
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        Site(Machine("0.33.0", gpus)).deployment(kind, config)


def test_weights_of_a_folder_are_those_that_its_index_names_and_16_bit_ones(tmp_path: Path) -> None:
    model, config = tmp_path / "model", {"torch_dtype": "float32"}
    model.mkdir()
    assert (
        weights_mib(str(model), halve_float32=True) is None and weights_mib("org/unknown", halve_float32=True) is None
    )
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(bytes(2**20))
    assert [weights_mib(str(model), halve_float32=halve) for halve in (True, False)] == [0.5, 1.0]
    (model / "consolidated.safetensors").write_bytes(bytes(2**20))
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 4 * 2**20}}))
    assert weights_mib(str(model), halve_float32=False) == 4.0
    (model / "model.safetensors.index.json").write_text("[]")
    assert weights_mib(str(model), halve_float32=False) is None


@pytest.mark.usefixtures("cuda")
def test_servers_that_share_a_gpu_start_in_turn_and_the_estimate_says_so() -> None:
    gpus = (nvml.Gpu(0, "H100", "580", None, None),)
    config = ServeConfig(prefill_gpus=(0,), decode_gpus=(0,))
    deployment = Site(Machine("0.33.0", gpus)).deployment("disaggregated", config)
    assert deployment.waves() == [["prefill-0"], ["decode-0", "proxy"]]
    load = dataclasses.replace(Options().load, duration_s=52.0)
    design, options = PairConfig(pairs=3, resident=False), dataclasses.replace(Options(), load=load)
    words = turns.announce(
        ("single", "disaggregated"), design, options, 6, {"single": 1, "disaggregated": 2}, on_gpu=True
    )
    assert words.endswith(": about 21 min")  # 6 starts of 100 and 200 s, 6 turns of 60 s
    alone = turns.announce(("single", "disaggregated"), design, options, 6, {}, on_gpu=True)
    assert alone.endswith(": about 16 min")
