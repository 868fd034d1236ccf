"""Servers end with all they started, however their parent ends."""

import dataclasses
import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest

from pdbench import doctor, nvml
from pdbench.config import ServeConfig
from pdbench.errors import UserError
from pdbench.http import get
from pdbench.serving import deployment_info, machine
from pdbench.serving.deployment_info import DeploymentInfo
from pdbench.serving.process import ServerProcess


def wait_until(condition, timeout_s=30.0):
    """Poll a condition, so that no test depends on how fast the machine is."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not reached"
        time.sleep(0.05)


def tree(script: str) -> tuple[str, ...]:
    return ("bash", "-c", script)


STUBBORN = "setsid sleep 7001 & sleep 7002 & trap '' TERM; echo up; while true; do sleep 7003; done"


def marked() -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(mark in (process.info["cmdline"] or []) for mark in ("7001", "7002", "7003"))
    ]


def test_close_ends_children_that_changed_their_session_and_ignore_sigterm(tmp_path: Path) -> None:
    process = ServerProcess("one", tree(STUBBORN), {}, "http://127.0.0.1:9", tmp_path / "one.log")
    wait_until(lambda: len(marked()) >= 3)
    process.close()
    assert process.exit_code() is not None
    assert marked() == []


def test_sigkill_of_the_parent_leaves_nothing(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(f"""
                import time
                from pathlib import Path
                from pdbench.serving.process import ServerProcess
                ServerProcess("one", ("bash", "-c", {STUBBORN!r}), {{}}, "http://127.0.0.1:9", Path({str(tmp_path / "one.log")!r}))
                time.sleep(600)
            """),
        ]
    )
    wait_until(lambda: len(marked()) >= 3)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: marked() == [])


def test_sigkill_of_the_supervisor_ends_the_server(tmp_path: Path) -> None:
    process = ServerProcess("one", ("sleep", "7001"), {}, "http://127.0.0.1:9", tmp_path / "one.log")
    wait_until(lambda: len(marked()) >= 2)  # the supervisor's own command line names it, too
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: marked() == [])
    process.close()


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_exit_code_and_log_survive(tmp_path: Path, script: str, code: int) -> None:
    process = ServerProcess("one", tree(f"echo last words; {script}"), {}, "http://127.0.0.1:9", tmp_path / "one.log")
    wait_until(lambda: process.exit_code() is not None)
    assert process.exit_code() == code
    assert process.log_tail() == "last words"
    process.close()


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("OSError: [Errno 98] Address already in use", "pdbench doctor"),
        ("torch.OutOfMemoryError: CUDA out of memory", "--gpu-memory-utilization"),
        ("RuntimeError: No CUDA GPUs are available", "nvidia-smi"),
        ("error: unrecognized arguments: --nonsense", "--vllm-args"),
    ],
)
def test_the_likely_cause_is_named(tmp_path: Path, line: str, remedy: str) -> None:
    process = ServerProcess(
        "one", ("bash", "-c", f"echo '{line}'; exit 1"), {}, "http://127.0.0.1:9", tmp_path / "one.log"
    )
    wait_until(lambda: process.exit_code() is not None)
    assert remedy in (process.likely_cause() or "")
    process.close()


def test_servers_that_another_process_owns_stay_known(tmp_path: Path) -> None:
    one = DeploymentInfo(name="single", url="http://127.0.0.1:1", model_name="m", owner_pid=os.getppid())
    deployment_info.save(one, tmp_path)
    deployment_info.forget(tmp_path)
    assert deployment_info.find(tmp_path, one.url) == one
    one.owner_pid = os.getpid()
    deployment_info.save(one, tmp_path)
    deployment_info.forget(tmp_path)
    assert deployment_info.find(tmp_path, one.url) is None
    deployment_info.forget(tmp_path)


def test_gpu_without_reported_memory_is_a_gpu() -> None:
    first, second = nvml.Gpu(0, "GB10", "580.95", None, None), nvml.Gpu(1, "H200", "580.95", 143771.0, 4.0)
    found = list(
        doctor._start(ServeConfig(), dataclasses.replace(machine.inspect(), gpus=(first, second), vllm=(0, 32)))
    )
    assert any("its memory is not told" in one.text for one in found)


def test_an_instance_that_is_asked_directly_is_known_with_its_own_devices(tmp_path: Path) -> None:
    urls = {
        name: f"http://127.0.0.1:{port}" for port, name in enumerate(("prefill-0", "prefill-1", "decode-0", "proxy"), 1)
    }
    gpus = {"prefill": [0, 1, 2, 3], "decode": [4, 5]}
    processes = {"prefill": [11, 12], "decode": [13], "proxy": [14]}
    whole = DeploymentInfo(
        name="disaggregated", url=urls["proxy"], model_name="m", urls=urls, gpus=gpus, processes=processes
    )
    whole.owner_pid = os.getpid()
    deployment_info.save(whole, tmp_path)
    assert deployment_info.find(tmp_path, "http://localhost:4") == whole
    one = deployment_info.find(tmp_path, "http://localhost:2")
    assert one is not None and one.name == "bench" and one.model_name == "m"
    assert (one.gpus, one.processes) == ({"prefill": [2, 3]}, {"prefill": [12]})
    assert deployment_info.find(tmp_path, "http://localhost:5") is None


def test_a_folder_of_logs_belongs_to_one_deployment(tmp_path: Path) -> None:
    claim = deployment_info.claim(tmp_path / "logs")
    with pytest.raises(UserError, match="--log-dir"):
        deployment_info.claim(tmp_path / "logs")
    claim.close()
    deployment_info.claim(tmp_path / "logs").close()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give --log-dir a folder that you may write"):
        deployment_info.claim(tmp_path / "file" / "logs")


@pytest.mark.parametrize(
    ("visible", "left"),
    [
        (None, [0, 1, 2, 3]),
        ("3,1", [3, 1]),
        ("GPU-2f,0", [2, 0]),
        ("", []),
        ("1,-1,0", [1]),
        ("0,0", [0]),
        ("GPU-", []),
        ("7", []),
    ],
)
def test_gpus_that_are_not_allotted_to_us_are_left_alone(
    visible: str | None, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = tuple(nvml.Gpu(index, "H200", "580", 143771.0, 4.0, f"GPU-{index}f00") for index in range(4))
    monkeypatch.setattr(nvml, "gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in machine.inspect().gpus] == left


def test_doctor_minds_the_gpus_that_a_run_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_version", lambda name: None)
    gpus = tuple(nvml.Gpu(index, "H200", "580", 1000.0, 900.0 if index in (1, 2) else 0.0) for index in range(3))
    here = machine.Machine(vllm=(0, 32, 0), vllm_text="0.32.0", gpus=gpus)
    states = {one.text[:5]: one.state for one in doctor._start(ServeConfig(), here)}
    assert [states[f"GPU {index}"] for index in range(3)] == [doctor.FINE, doctor.WRONG, doctor.NOTE]


def test_get_returns_the_body_of_a_200_alone() -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 503)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert get(url, "/health", 5.0) == b"ok"
    assert get(url, "/other", 5.0) is None
    server.shutdown()
    server.server_close()
    assert get(url, "/health", 5.0) is None
