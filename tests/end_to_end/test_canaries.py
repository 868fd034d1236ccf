"""Canaries on real vLLM: a sound pair under load raises no alarm; KV corrupted on purpose is found in one trial, with its pair."""

import os
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.records import Run, load_run
from pdbench.serving import deployment as deployments_of
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from pdbench.site import Site
from tests.support.proxy_processes import Server, proxy

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]


def bench(running: DeploymentInfo, rule: str, tmp_path: Path, **load: object) -> Run:
    """A bench of this prefill and decode behind a proxy that corrupts by `rule`; decode has a second address, "localhost"."""
    (prefill,), (decode,) = running.urls("prefill"), running.urls("decode")
    second = decode.replace("127.0.0.1", "localhost")
    places = [_At(f"{prefill}@127.0.0.1:{running.config['kv_port']}")], [_At(decode), _At(second)]
    program = ("tests.support.corrupting_proxy", rule)
    options = ("--connector", "tcp", "--first-token", "decode")
    with proxy(tmp_path, *options, prefill=places[0], decode=places[1], program=program) as server:
        servers = [
            ServerInfo(name=name, role=name[:-2], url=url)
            for name, url in (("prefill-0", prefill), ("decode-0", decode), ("decode-1", second))
        ]
        servers.append(ServerInfo(name="proxy", role="proxy", url=server.url, event_log=str(server.log)))
        info = DeploymentInfo(
            name="disaggregated",
            url=server.url,
            model_name=running.model_name,
            model_path=running.model_path,
            owner_pid=os.getpid(),
            servers=servers,
        )
        deployments_of.save(info, tmp_path)
        settings = {"requests": 24, "concurrency": 6, "warmup": 6, "input_tokens": 60, "output_tokens": 12}
        # All of them: a tiny random model has so many near ties that several of its wrong answers are undecided.
        settings |= {"canaries": 1.0, **load}
        config = LoadConfig(**settings)  # type: ignore[arg-type]
        options_of = Options(ServeConfig(log_dir=str(tmp_path)), config, PowerConfig(power=False))
        runs: dict[Path, Run] = {}
        experiment.bench(server.url, 1, options_of, tmp_path, Console(quiet=True), Site(), runs)
        (folder,) = runs
        return load_run(folder)


class _At(Server):
    """An instance that runs already."""

    def __init__(self, url: str) -> None:
        self.url = url


def failed(run: Run) -> list[str]:
    return [flag.detail for flag in run.flags if flag.name == "canary-failed"]


def test_sound_pair_raises_no_alarm_and_a_corrupting_one_is_named(
    disaggregated: DeploymentInfo, tmp_path: Path
) -> None:
    run = bench(disaggregated, "after:1000000", tmp_path)
    verdicts = [request.canary.verdict for request in run.requests if request.canary]
    assert len(verdicts) == 24 and "wrong" not in verdicts and failed(run) == []
    assert run.gate is not None and run.gate.passed
    run = bench(disaggregated, "decode:localhost", tmp_path)
    assert "prefill-0 -> decode-1: " in failed(run)[0] and not any("decode-0: " in detail for detail in failed(run))
    assert run.gate is not None and not run.gate.passed


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "concurrency"), [("after:20", 6), ("above:4", 6)])
def test_corruption_that_begins_under_load_is_found(
    rule: str, concurrency: int, disaggregated: DeploymentInfo, tmp_path: Path
) -> None:
    run = bench(disaggregated, rule, tmp_path, concurrency=concurrency)
    assert failed(run) and "gate-failed" not in {flag.name for flag in run.flags}
    sound = bench(disaggregated, "above:4", tmp_path, concurrency=2)
    assert failed(sound) == []
