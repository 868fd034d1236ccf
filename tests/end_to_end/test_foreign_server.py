"""`pdbench bench` of a server that pdbench did not start: its model, where it runs, and which GPUs are its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze, load_analysis
from pdbench.config import LoadConfig, Options, PowerConfig
from pdbench.errors import UserError
from pdbench.http import offered_model
from pdbench.records import Run, load_run
from pdbench.serving import machine
from pdbench.site import Site
from tests.support.fake_nvml import child, environment
from tests.support.processes import ROOT, call_pdbench, run_pdbench
from tests.support.servers import Peer, ScriptedServer, completions, refusal, stream, tokens

TREE = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
with subprocess.Popen(["sleep", "60"]) as child:
    print(listener.getsockname()[1], child.pid, flush=True)
    sys.stdin.read()
    child.kill()
"""


def models(peer: Peer) -> bool:
    """What a server with one model answers to everything but a load."""
    peer.respond({"data": [{"id": "their-model"}]})
    return True


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    answer = stream(tokens(5))
    with ScriptedServer(lambda peer: models(peer) if peer.head.startswith(b"GET") else answer(peer)) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def ended() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def bench(nvml_library: Path, server: ScriptedServer, out: Path, *arguments: str, **settings: str) -> Run | str:
    """A saved run of `pdbench bench` where NVML knows two scripted GPUs, or what it said when it failed."""
    scripted = environment(nvml_library, gpus="2", **settings)
    scripted["PYTHONPATH"] = f"{ROOT}:{scripted['PYTHONPATH']}"
    load = ("--url", server.url, "--requests", "4", "--idle-s", "0")
    done = run_pdbench("bench", *load, *arguments, cwd=out, timeout_s=120, **scripted)
    return done.stderr if done.returncode else load_run(out / "bench_results")


def test_gpus_of_its_processes_are_sampled(
    nvml_library: Path, server: ScriptedServer, ended: int, tmp_path: Path
) -> None:
    run = bench(nvml_library, server, tmp_path, processes=f"0:{ended} 1:{os.getpid()}")
    assert run.roles["server"] == ["gpu1"]
    assert run.config["model"] == "their-model"
    assert "devices-unknown" not in {flag.name for flag in run.flags}


def test_foreign_server_without_gpu_info_is_flagged(
    nvml_library: Path, server: ScriptedServer, ended: int, tmp_path: Path
) -> None:
    run = bench(nvml_library, server, tmp_path, processes=f"0:{ended}")
    assert run.devices == []
    assert "devices-unknown" in {flag.name for flag in run.flags}


def test_named_gpus_are_sampled_and_must_be_all_of_the_servers(
    nvml_library: Path, server: ScriptedServer, ended: int, tmp_path: Path
) -> None:
    run = bench(nvml_library, server, tmp_path, "--single-gpus", "0", processes=f"1:{ended}")
    assert run.roles["server"] == ["gpu0"]
    stderr = bench(nvml_library, server, tmp_path, "--single-gpus", "0", processes=f"0:{os.getpid()} 1:{os.getpid()}")
    assert "computes on GPU 1, whose power would be missing: name all" in stderr


@pytest.mark.parametrize("named", [["7"], ["0", "--single-gpus", "0"]], ids=["none of ours", "twice"])
def test_named_gpus_that_do_not_exist_are_refused(
    named: list[str], nvml_library: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    stderr = bench(nvml_library, server, tmp_path, "--single-gpus", *named)
    assert "this host's GPUs, [0, 1]" in stderr


def test_clock_is_locked_without_sampling_and_for_the_server_alone(
    nvml_library: Path, server: ScriptedServer, tmp_path: Path
) -> None:
    ours = {"processes": f"1:{os.getpid()}", "state": str(tmp_path / "state")}
    run = bench(nvml_library, server, tmp_path, "--no-power", "--single-clock", "900", **ours)
    assert [(hold["index"], hold["clock_mhz"]) for hold in run.config["clocks_held"]] == [(1, 900)]
    stderr = bench(nvml_library, server, tmp_path, "--prefill-clock", "900", **ours)
    assert "--single-clock" in stderr


def test_every_bench_has_new_prompts_and_the_saved_nonce_repeats_them(server: ScriptedServer, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    sent: list[list[bytes]] = []

    def measure(nonce: str | None = None) -> str:
        server.requests.clear()
        load = LoadConfig(requests=3, warmup=1, prompt_file=str(tmp_path / "prompts.txt"), nonce=nonce, canaries=0.0)
        runs: dict[Path, Run] = {}
        options = Options(load=load, power=PowerConfig(power=False))
        experiment.bench(server.url, 2, options, tmp_path, Console(quiet=True), Site(), runs)
        sent.append([peer.body for peer in server.requests if peer.method == "POST"])
        return load_run(tmp_path / "bench_results").config["load"]["nonce"]

    nonce = measure()
    assert measure() != nonce
    assert measure(nonce) == nonce
    first, second, again = sent
    assert first == again and len(set(first)) == 8 and not set(first) & set(second)


def test_server_of_another_host_has_no_power_here(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "is_this_host", lambda host: False)
    console = Console(quiet=True)

    def measure(power: PowerConfig) -> Run:
        options = Options(load=LoadConfig(requests=2, warmup=0), power=power)
        runs: dict[Path, Run] = {}
        experiment.bench(server.url, 1, options, tmp_path, console, Site(), runs)
        (folder,) = runs
        return load_run(folder)

    run = measure(PowerConfig())
    assert run.devices == []
    assert "power-elsewhere" in {flag.name for flag in run.flags}
    assert "power-elsewhere" not in {flag.name for flag in measure(PowerConfig(power=False)).flags}
    with pytest.raises(UserError, match="--single-clock 900"):
        measure(PowerConfig(single_clock=900))


def test_this_host_is_known_by_its_addresses() -> None:
    ours = ("127.0.0.1", "localhost", "127.8.9.10", "0.0.0.0")
    assert [host for host in ours if not machine.is_this_host(host)] == []
    assert not machine.is_this_host("192.0.2.1")


def test_server_is_the_listener_and_what_it_started(nvml_library: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TREE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        port, worker = map(int, process.stdout.readline().split())
        assert [listener.pid for listener in machine.listeners(port)] == [process.pid]
        code = f"from pdbench.power.tenants import gpus_of; print(gpus_of([{process.pid}]))"
        assert (
            child(nvml_library, code, gpus="4", processes=f"0:{os.getpid()} 2:{worker} 3:{process.pid}") == "[2, 3]\n"
        )
        process.stdin.close()


def test_model_is_requested_as_the_load_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key\r\n")
    with ScriptedServer(models) as server:
        assert offered_model(f"{server.url}/base/v1/") == "their-model"
        assert server.requests[0].head.startswith(b"GET /base/v1/models HTTP/1.1\r\n")
        assert server.requests[0].fields["authorization"] == "Bearer secret-key"
        monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
        with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
            offered_model(server.url)
        assert "secret" not in str(raised.value)


def nested(peer: Peer) -> bool:
    """JSON without end."""
    body = b"[" * 200_000
    peer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    return True


def test_answers_nested_without_end_are_no_traceback(tmp_path: Path) -> None:
    answer = stream(tokens(5))

    def respond(peer: Peer) -> bool:
        if peer.method == "GET":
            return models(peer)
        return answer(peer) if peer.json.get("stream") else nested(peer)

    with ScriptedServer(respond) as server:
        load = ("--url", server.url, "--requests", "4", "--no-power")
        done = call_pdbench("bench", *load, cwd=tmp_path)
        assert done.returncode == 0 and "canaries-off: no answer was checked" in done.stdout
        refused = call_pdbench("bench", *load, "--input-tokens", "8", cwd=tmp_path)
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "has no /tokenize" in refused.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refusal(b"401 Unauthorized", "no key"), "set OPENAI_API_KEY"),
        (refusal(b"404 Not Found", "no such path"), "give --model NAME"),
        (refusal(b"503 Service Unavailable", "no decode instance is ready"), "not ready: try again once they are"),
        (lambda peer: False, "no OpenAI-compatible server answers"),
        (lambda peer: nested(peer), "answers 200 and names no model: give --model NAME"),
        (
            lambda peer: peer.respond({"data": [{"id": "a\x1b[2J"}]}),
            r"names a model 'a\\x1b\[2J', which cannot be shown",
        ),
        (lambda peer: peer.respond({"data": [{"id": None}]}), "names no model"),
        (
            lambda peer: peer.respond({"data": [{"id": "a"}, {"id": "b"}]}),
            r"offers several models \(a, b\): say which by",
        ),
    ],
    ids=["key", "path", "starting", "nobody", "nested", "letters", "null", "several"],
)
def test_server_without_a_model_is_one_line_with_the_remedy(answer, message) -> None:
    with ScriptedServer(answer) as server, pytest.raises(UserError, match=message) as raised:
        offered_model(server.url)
    assert len(str(raised.value).splitlines()) == 1


def test_adapters_and_other_names_of_a_model_are_no_other_model() -> None:
    offered = [
        {"id": "m", "root": "/m", "parent": None},
        {"id": "alias", "root": "/m"},
        {"id": "lora", "root": "/l", "parent": "m"},
    ]
    with ScriptedServer(lambda peer: peer.respond({"object": "list", "data": offered})) as server:
        assert offered_model(server.url) == "m"


def test_password_in_the_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="OPENAI_API_KEY") as raised:
        offered_model("http://me:pass-word@127.0.0.1:9")
    assert "pass-word" not in str(raised.value)


@pytest.fixture
def slow_server(tmp_path: Path) -> Iterator[ScriptedServer]:
    """Its loads take long enough for samples; a file `third` is there once the third answer begins."""
    answer = stream(tokens(5), pause_s=0.1)

    def respond(peer: Peer) -> bool:
        if peer.method == "GET":
            return models(peer)
        if sum(each.method == "POST" and bool(each.json.get("stream")) for each in scripted.requests) == 3:
            (tmp_path / "third").touch()
        return answer(peer)

    with ScriptedServer(respond) as scripted:
        yield scripted


TWO = ("--single-gpus", "0", "--single-gpus", "1")


def test_gpus_that_somebody_set_differ_from_others_and_are_flagged(
    nvml_library: Path, slow_server: ScriptedServer, tmp_path: Path
) -> None:
    settings = {"limit_w": "500", "locked_mhz": "1410", "ecc": "0", "persistence": "0"}
    free, changed = (bench(nvml_library, slow_server, tmp_path, *TWO, **found) for found in ({}, settings))
    assert isinstance(free, Run) and isinstance(changed, Run)
    details = [[flag.detail for flag in analyze(run).flags if flag.name == "clocks-set"] for run in (free, changed)]
    assert details[0] == [] and [detail[:4] for detail in details[1]] == ["gpu0", "gpu1"]
    assert "it ran at 1410 of 1980 MHz at most" in details[1][0]
    changed.host["mps"] = True
    changed.config["load"]["nonce"] = free.config["load"]["nonce"]
    assert {str(mismatch) for mismatch in compare(analyze(free), analyze(changed)).mismatches} == {
        "GPUs as found, power limit: 700 W against 500 W",
        "GPUs as found, persistence: on against off",
        "GPUs as found, ecc: on against off",
        "GPUs as found, MPS: off against on",
        "GPUs as found, highest clock in MHz: 1980 against 1410",
    }
    lock = {"requested_clock_mhz": 1410, "requested_power_cap_w": 500, "role": "server"}
    changed.config["clocks_held"] = [lock | {"index": index} for index in (0, 1)]  # by pdbench itself
    changed.flags = []
    ours = analyze(changed)
    assert not any(flag.name == "clocks-set" for flag in ours.flags)
    assert {mismatch.what for mismatch in compare(analyze(free), ours).mismatches} == {
        "GPUs as found, persistence",
        "GPUs as found, ecc",
        "GPUs as found, MPS",
    }


def test_gpu_that_falls_off_the_bus_during_a_load_is_flagged(
    nvml_library: Path, slow_server: ScriptedServer, tmp_path: Path
) -> None:
    run = bench(nvml_library, slow_server, tmp_path, *TWO, lost=f"1:{tmp_path / 'third'}")
    assert isinstance(run, Run)
    analysis = load_analysis(tmp_path / "bench_results")
    [detail] = [flag.detail for flag in analysis.flags if flag.name == "device-lost"]
    assert detail.startswith("gpu1: nothing could be read after") and "(GPU is lost)" in detail
    assert analysis.summary.energy.total_j is None and analysis.summary.energy.not_measured == "gpu1: GPU is lost"
    assert analysis.summary.devices["gpu0"].energy.energy_j


@pytest.mark.parametrize("foreign", [0, 400])
def test_tokens_for_somebody_else_are_flagged(tmp_path: Path, foreign: int) -> None:
    """The server counts them: here another client's answers come with each of the load's."""
    counted = 0

    def answer(peer: Peer) -> bool:
        nonlocal counted
        if peer.path.startswith("/metrics"):
            body = f'vllm:generation_tokens_total{{engine="0"}} {counted}.0\n'.encode()
            peer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            return True
        if peer.method == "POST" and peer.json.get("stream"):
            counted += 3 + foreign
        return completions()(peer)

    with ScriptedServer(answer) as server:
        load = (
            "--url",
            server.url,
            "--requests",
            "4",
            "--warmup",
            "0",
            "--output-tokens",
            "3",
            "--trials",
            "1",
            "--no-power",
        )
        done = call_pdbench("bench", *load, "--out", "own", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [flag.name for flag in load_analysis(tmp_path / "own/bench_results").flags]
    assert ("other-traffic" in found) == bool(foreign)
