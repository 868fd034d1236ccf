"""A whole experiment on a site that is given to it: the order of starts, the gate, what is saved when, what the screen shows."""

import io
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment, trial, turns
from pdbench.analysis.run_analysis import analyze
from pdbench.config import DeploymentKind, LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.host import LocalHost
from pdbench.live import terminal
from pdbench.load.clients import LoadResult
from pdbench.load.generator import Progress
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, Flag, Gate, RequestError, Run, Trial, load_run, save_run
from pdbench.report import text
from pdbench.serving.deployment import Deployment, DeploymentInfo, States
from pdbench.serving.process import ServerState
from pdbench.site import Measurement, Site, stop_on_signals
from tests.support.processes import wait_until
from tests.support.proxy_processes import instance, proxy
from tests.support.sites import (
    JOINED,
    KINDS,
    ONE,
    OPTIONS,
    THREE,
    FakeDeployment,
    FakeSite,
    gate,
    gates_fixture,
    measured,
    run_pairs,
)

__all__ = ["gates_fixture"]


def test_every_start_of_prefill_and_decode_passes_the_gate(tmp_path: Path, gates: list[Gate]) -> None:
    gates += [gate(), gate(passed=False)]
    runs: dict[Path, Run] = {}
    printed = run_pairs(tmp_path, FakeSite(measured), runs, JOINED)
    assert printed.count("correctness gate") == 2 + 1  # A BB AA B; the second one is after the first load
    assert printed.count("correctness after the load: passed") == 2
    disaggregated = runs[tmp_path / "disaggregated_results"]
    assert disaggregated.gate is not None and not disaggregated.gate.passed
    assert [flag.name for flag in disaggregated.flags] == ["gate-failed"]
    assert runs[tmp_path / "single_results"].gate is None


def test_what_is_measured_is_on_disk_before_the_next_start(tmp_path: Path, gates: list[Gate]) -> None:
    on_disk: list[int] = []

    def load(number: int) -> LoadResult:
        folders = [tmp_path / f"{kind}_results" for kind in KINDS]
        on_disk.append(sum(len(load_run(folder).requests) for folder in folders if folder.exists()))
        return measured(number)

    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, FakeSite(load), runs)
    assert on_disk == [0, 1, 2, 3, 4, 5]
    assert list(runs) == [tmp_path / "single_results", tmp_path / "disaggregated_results"]
    assert all(len(one.requests) == 3 for one in runs.values())


def test_interrupted_run_is_saved_and_handlers_are_restored(tmp_path: Path, gates: list[Gate]) -> None:
    def load(number: int) -> LoadResult:
        flags = (Flag("interrupted", "stopped by Ctrl-C"),) if number == 2 else ()
        return measured(number, None, *flags)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    runs: dict[Path, Run] = {}
    with pytest.raises(KeyboardInterrupt):
        run_pairs(tmp_path, FakeSite(load), runs)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert {folder.name: len(load_run(folder).requests) for folder in runs} == {
        "single_results": 1,
        "disaggregated_results": 1,
    }
    assert "interrupted" in [flag.name for flag in load_run(tmp_path / "disaggregated_results").flags]


def test_run_without_a_request_leaves_earlier_results(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, FakeSite(measured), runs, ONE)

    def nothing(number: int) -> LoadResult:
        raise UserError("no request was measured")

    again: dict[Path, Run] = {}
    with pytest.raises(UserError, match="no request"):
        run_pairs(tmp_path, FakeSite(nothing), again, ONE)
    assert again == {}
    assert len(load_run(tmp_path / "single_results").requests) == 1


def test_trial_in_which_every_request_failed_ends_the_run(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    with pytest.raises(UserError, match=r"every request to .* failed, the first with reset: peer: gone; read the"):
        run_pairs(tmp_path, FakeSite(lambda number: measured(number, RequestError("reset", "peer: gone"))), runs)
    assert [folder.name for folder in runs] == ["single_results"]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("refused", "nothing listens there"),
        ("connect", "cannot reach it"),
        ("timeout", "lower the load"),
        ("http_400", "its message says"),
        ("http_503", "read the servers' logs"),
    ],
)
def test_remedy_fits_the_class_of_failure(tmp_path: Path, gates: list[Gate], kind: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"the first with {kind}: why; .*{remedy}"):
        run_pairs(tmp_path, FakeSite(lambda number: measured(number, RequestError(kind, "why"))), {})


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({}, "^64 output tokens .* leave no room for a prompt in the 10 tokens that the model takes"),
        ({"input_tokens": 40}, "^--input-tokens 40 and --output-tokens 64 are 104 tokens .*--max-model-len 104$"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_by_what_was_asked_for(load: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        experiment._check_lengths(LoadConfig(**load), 10)
    experiment._check_lengths(LoadConfig(**load), 512)


def test_lost_client_ends_the_run_with_what_was_measured(tmp_path: Path, gates: list[Gate]) -> None:
    runs: dict[Path, Run] = {}
    with pytest.raises(UserError, match="client 1: the process died"):
        run_pairs(
            tmp_path,
            FakeSite(lambda number: measured(number, None, Flag("client-lost", "client 1: the process died"))),
            runs,
        )
    assert [flag.name for flag in runs[tmp_path / "single_results"].flags] == ["client-lost"]


@pytest.mark.parametrize("died", [None, "single-0 died with exit code 137: killed"])
def test_client_that_ends_because_a_server_dies_is_not_blamed(
    tmp_path: Path, gates: list[Gate], monkeypatch: pytest.MonkeyPatch, died: str | None
) -> None:
    def warming_up(number: int) -> LoadResult:
        raise UserError("client 0: the warm-up failed: refused")

    asked = count()  # the server still seems to live when the client ends
    monkeypatch.setattr(FakeDeployment, "death", lambda _: died if next(asked) else None)
    runs: dict[Path, Run] = {}
    with pytest.raises(UserError, match="client 0" if died is None else "^single-0 died .* no request was measured"):
        run_pairs(tmp_path, FakeSite(warming_up), runs)
    assert runs == {}


def test_deployment_named_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        experiment.run(("single", "single"), ONE, OPTIONS, tmp_path, Console(quiet=True), FakeSite(measured), {})


def started(*states: States, terminal: bool = False, log_dir: str = "logs") -> str:
    """What is printed while a deployment passes through these states."""
    printed = io.StringIO()
    deployment = FakeDeployment("replicas", ServeConfig(log_dir=log_dir), states)
    with turns.started(deployment, Console(file=printed, width=200, force_terminal=terminal)):
        return printed.getvalue()


def test_start_into_a_file_reports_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.0)
    ready = ServerState(pid=1, healthy=True, age_s=5.0)
    waits = [ServerState(pid=2, age_s=age_s) for age_s in (0.0, 10.0, 20.0)]
    printed = started(*({"replica-0": ready, "replica-1": state} for state in waits))
    assert "replica-1 starting, 10 s" in printed
    assert printed.count("replica-0: ready after 5 s at http://127.0.0.1:1") == 1


def test_load_into_a_file_reports_its_progress(
    tmp_path: Path, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "LINE_EVERY_S", 0.1)

    class SlowSite(FakeSite):
        def run_load(
            self,
            load: TrialLoad,
            on_progress: Callable[..., None],
            on_begin: Callable[[], object],
            problem: Callable[[], str | None],
        ) -> LoadResult:
            time.sleep(0.3)
            on_progress(Progress(7, 30))
            time.sleep(0.3)
            return super().run_load(load, on_progress, on_begin, problem)

    printed = run_pairs(tmp_path, SlowSite(measured), {}, ONE)
    for line in (r"  single, trial 1: warm-up, \d+ s\n", r"  single, trial 1: 7 of 30 requests, \d+ s\n"):
        assert re.search(line, printed), printed


def test_counts_of_every_trial_stand_in_the_flags(tmp_path: Path, gates: list[Gate]) -> None:
    flags = Flag("tokens-unknown", "3 responses: a reason"), Flag("fields-refused", "the server refuses seed: a remedy")
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, FakeSite(lambda number: measured(number // 2, None, *flags)), runs, THREE)
    run = runs[tmp_path / "single_results"]
    assert [flag.detail for flag in run.flags] == [
        flags[0].detail, flags[1].detail, "trial 2: 3 responses: a reason", "trial 3: 3 responses: a reason",
    ]  # fmt: skip
    shown = dict(text.warnings(analyze(run)))
    assert shown["tokens-unknown"] == "3 responses; trial 2, trial 3: 3 responses: a reason"
    assert shown["fields-refused"] == "the server refuses seed: a remedy"


def test_trial_that_sends_nothing_is_an_error(tmp_path: Path, gates: list[Gate]) -> None:
    nothing = LoadResult([], Trial(index=0, start_s=0.0, end_s=0.0), [])
    with pytest.raises(UserError, match="trial 1 sent no request"):
        run_pairs(tmp_path, FakeSite(lambda number: nothing), {})


def test_load_line_says_what_is_sent_and_what_the_servers_take(tmp_path: Path, gates: list[Gate]) -> None:
    class SmallSite(FakeSite):
        def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
            deployment = FakeDeployment(kind, config)
            deployment.limit = 8
            return deployment

    printed = io.StringIO()
    for concurrency in (8, 16):
        options = Options(load=LoadConfig(concurrency=concurrency, nonce="ab"), power=PowerConfig(power=False))
        console = Console(file=printed, width=200)
        experiment.run(("single",), ONE, options, tmp_path, console, SmallSite(measured), {})
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("  load: ")]
    assert lines == [
        "  load: 8 at a time, 16 requests, at most 64 tokens out, after a warm-up of 8, nonce ab",
        "  load: 16 at a time, 16 requests, at most 64 tokens out, after a warm-up of 16, nonce ab; "
        "the servers work on 8 at once (--max-num-seqs), the others wait in their queue",
    ]


def test_signal_while_results_are_saved_counts_afterwards(
    tmp_path: Path, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(run: Run, folder: Path) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return save_run(run, folder)

    monkeypatch.setattr(experiment, "save_run", save)
    runs: dict[Path, Run] = {}
    with pytest.raises(UserError, match="interrupted: saved"), stop_on_signals(lambda: runs and "saved"):
        run_pairs(tmp_path, FakeSite(measured), runs)
    assert list(runs) == [tmp_path / "single_results"] and (tmp_path / "single_results").exists()


def test_brackets_in_the_folder_of_logs_are_no_markup() -> None:
    assert "logs in [/a] [b]/" in started(log_dir="[/a] [b]")


def test_restarted_server_is_ready_again() -> None:
    first, second = (ServerState(pid=pid, healthy=True, age_s=5.0) for pid in (1, 2))
    printed = started({"replica-0": first}, {"replica-0": second})
    assert "replica-0: ready after 5 s" in printed and "replica-0: ready again after 5 s" in printed


class LoggedSite(FakeSite):
    """Prefill and decode behind a proxy that log into a folder; `lines` is what the proxy logs during the load."""

    def __init__(self, folder: Path, lines: str) -> None:
        super().__init__(self.answered)
        self.folder, self.lines = folder, lines

    def deployment(self, kind: DeploymentKind, config: ServeConfig) -> Deployment:
        deployment = super().deployment(kind, config)
        info = deployment.info()
        for server in info.servers:
            server.event_log = str(self.folder / f"{server.name}.events.jsonl")
        deployment.info = lambda: info  # type: ignore[method-assign]
        return deployment

    def measurement(self, info: DeploymentInfo, power: PowerConfig, clock: Clock) -> Measurement:
        return Measurement([(LocalHost(), info.servers)], power, clock)

    def answered(self, number: int) -> LoadResult:
        result = measured(number)
        result.requests[0].token_s, result.requests[0].phases["queue"] = [0.5], (0.1, 0.4)
        with suppress(FileNotFoundError), (self.folder / "proxy.events.jsonl").open("r+") as log:
            log.write(self.lines)
        return result


PROXIED = '{"event":"request","request_id":"r1","prefill_sent_s":1.0,"decode_sent_s":2.0}\n'


@pytest.mark.parametrize(
    ("present", "lines", "flagged"),
    [
        (("proxy", "prefill-0", "decode-0"), PROXIED, []),
        (("prefill-0", "decode-0"), PROXIED, ["proxy"]),
        (("proxy", "prefill-0", "decode-0"), "", ["proxy"]),
        (("proxy", "prefill-0"), PROXIED, ["decode-0"]),
        ((), "", ["prefill-0", "decode-0", "proxy"]),
    ],
    ids=["all there", "proxy's is gone", "proxy's is empty", "decode's is gone", "all gone"],
)
def test_missing_event_log_is_flagged_and_decodes_queue_is_not_the_requests(
    tmp_path: Path, gates: list[Gate], present: tuple[str, ...], lines: str, flagged: list[str]
) -> None:
    for name in present:
        (tmp_path / f"{name}.events.jsonl").touch()
    runs: dict[Path, Run] = {}
    site = LoggedSite(tmp_path, lines)
    experiment.run(("disaggregated",), ONE, OPTIONS, tmp_path / "out", Console(quiet=True), site, runs)
    (measured_run,) = runs.values()
    flags = [flag for flag in measured_run.flags if flag.name == "event-log-missing"]
    assert [flag.detail.split()[0] for flag in flags] == flagged
    assert "queue" not in measured_run.requests[0].phases


def bench_of_proxy(
    folder: Path,
    has_prefill: bool,
    load: Callable[[int], LoadResult],
    power: PowerConfig,
    console: Console | None = None,
) -> Run:
    """A bench of a proxy that logs elsewhere than --log-dir says."""
    console = console or Console(quiet=True)
    options = replace(OPTIONS, power=power, serve=ServeConfig(model="m", log_dir=str(folder / "other")))
    runs: dict[Path, Run] = {}
    with instance(folder, "a") as a, instance(folder, "b") as b:
        instances = {"prefill": [a], "decode": [b]} if has_prefill else {"decode": [a, b]}
        with proxy(folder, **instances) as server:
            experiment.bench(server.url, 1, options, folder / "out", console, FakeSite(load), runs)
    (run,) = runs.values()
    return run


@pytest.mark.parametrize("has_prefill", [True, False])
def test_bench_of_a_proxy_that_logs_elsewhere_says_so(tmp_path: Path, has_prefill: bool) -> None:
    def load(number: int) -> LoadResult:
        result = measured(number)
        result.requests[0].phases["queue"] = (0.1, 0.4)
        return result

    run = bench_of_proxy(tmp_path, has_prefill, load, OPTIONS.power)
    assert [flag.name for flag in run.flags] == ["event-log-missing"] * has_prefill
    assert list(run.requests[0].phases) == ["decode_queue" if has_prefill else "queue"]


def test_bench_says_that_it_replaces_what_was_measured(tmp_path: Path) -> None:
    for told in (False, True):
        console = Console(file=io.StringIO(), width=500)
        bench_of_proxy(tmp_path, False, measured, PowerConfig(idle_s=0), console)
        words = f"replaces the earlier results in {tmp_path}/out/bench_results (another --out keeps them)"
        assert (words in console.file.getvalue()) == told


@pytest.mark.parametrize("has_prefill", [True, False])
def test_process_of_a_proxy_is_not_measured_as_the_server(tmp_path: Path, has_prefill: bool) -> None:
    run = bench_of_proxy(tmp_path, has_prefill, measured, PowerConfig(idle_s=0))
    assert run.devices == []
    details = {flag.name: flag.detail for flag in run.flags}
    assert ("event-log-missing" in details) == has_prefill
    assert "is a pdbench proxy" in details["devices-unknown"] and f"--log-dir {tmp_path} " in details["devices-unknown"]


def test_host_that_sleeps_during_the_load_is_flagged(
    tmp_path: Path, gates: list[Gate], monkeypatch: pytest.MonkeyPatch
) -> None:
    gates.append(gate())
    asleep_s = count(step=5.0)
    monkeypatch.setattr(trial, "_asleep_s", lambda: next(asleep_s))
    runs: dict[Path, Run] = {}
    run_pairs(tmp_path, FakeSite(measured), runs, ONE)
    for run in runs.values():
        assert ["slept 5.0 s" in flag.detail for flag in run.flags if flag.name == "host-slept"] == [True]


def test_large_file_is_not_read_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "SILENCE_S", 0.01)
    printed = io.StringIO()

    class SlowSite(Site):
        def check_options(self, load: LoadConfig, power: PowerConfig) -> None:
            wait_until(lambda: "reading t.csv" in printed.getvalue())

    experiment._check_options(SlowSite(), Options(load=LoadConfig(trace="t.csv")), Console(file=printed))
