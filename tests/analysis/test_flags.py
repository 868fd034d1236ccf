"""Devices that were throttled, measured too briefly, or whose meters disagree are flagged; silent ones are not."""

import heapq
from collections.abc import Sequence
from dataclasses import asdict

import msgspec
import pytest

from pdbench.analysis.run_analysis import analyze
from pdbench.config import LoadConfig
from pdbench.events import EngineFacts, PromptEvent, ProxyEvent, ServerSeries
from pdbench.load.clients import run_load
from pdbench.load.generator import ClientResult
from pdbench.load.plan import TrialLoad
from pdbench.load.self_check import window
from pdbench.records import Canary, Clock, DeviceRecord, DeviceSample, Flag, Gate, RequestRecord, Run, Trial
from pdbench.report import text
from tests.support.runs import build_run
from tests.support.servers import ScriptedServer, stream, tokens


def a_run(
    seconds: float, *, power_w: float | None = 100.0, counter_w: float = 100.0, throttle: list[str] | None = None
) -> Run:
    samples = [
        DeviceSample(
            t_s=i / 10, power_w=power_w, energy_j=None if power_w is None else counter_w * i / 10, throttle=throttle
        )
        for i in range(int(seconds * 10) + 1)
    ]
    device = DeviceRecord(id="gpu0", kind="gpu", name="H200", role="prefill", samples=samples)
    trial = Trial(index=0, start_s=0.0, end_s=seconds)
    clock = Clock(monotonic_s=0.0, unix_s=0.0)
    return Run(name="single", clock=clock, config={}, host={}, versions={}, trials=[trial], devices=[device])


def names(run: Run) -> list[str]:
    return [flag.name for flag in analyze(run).flags]


def test_long_quiet_run_has_no_flag() -> None:
    assert names(a_run(40, throttle=["gpu_idle", "clocks_setting"])) == []


@pytest.mark.parametrize(("stolen_pct", "trials"), [((2.0, None, 4.9), []), ((6.0, 12.3, None), ["trial 2"])])
def test_cores_that_the_hypervisor_took_are_flagged(stolen_pct: tuple[float | None, ...], trials: list[str]) -> None:
    run = a_run(40)
    run.trials = [
        Trial(index=index, start_s=10.0 * index, end_s=10.0 * index + 10, cpu_steal_pct=pct)
        for index, pct in enumerate(stolen_pct)
    ]
    found = [flag.detail for flag in analyze(run).flags if flag.name == "cpu-steal"]
    assert [detail.partition(":")[0] for detail in found] == trials and all("took 12 %" in detail for detail in found)


def test_power_cap_is_flagged() -> None:
    assert names(a_run(40, throttle=["sw_power_cap"])) == ["throttled"]


def test_flags_of_several_hosts_name_the_host_of_each_device() -> None:
    """gpu0 of both hosts had one name, and where one was flagged when the run was saved, the other never was."""
    run = a_run(40, throttle=["sw_power_cap"])
    run.devices = [msgspec.structs.replace(run.devices[0], host=host) for host in ("10.0.0.1", "fd00::2")]
    details = [flag.detail.partition(": ")[0] for flag in analyze(run).flags]
    assert details == ["10.0.0.1/gpu0", "fd00::2/gpu0"]
    run.flags = analyze(run).flags[:1]
    assert [flag.detail.partition(": ")[0] for flag in analyze(run).flags] == details
    run.devices[1].samples = run.devices[1].samples[:200]
    assert "fd00::2/gpu0" in (analyze(run).summary.energy.not_measured or "")


def test_window_under_30_s_is_flagged_as_short_for_energy() -> None:
    assert names(a_run(20)) == ["short-window"]


def test_counter_and_integral_that_disagree_are_flagged() -> None:
    assert names(a_run(40, counter_w=110.0)) == ["energy-residual"]


@pytest.mark.parametrize(("busy_pct", "flagged"), [(None, False), (0.0, False), (4.0, False), (30.0, True)])
def test_idle_power_of_a_gpu_at_work_is_flagged(busy_pct: float | None, flagged: bool) -> None:
    run = a_run(40)
    run.devices[0].idle_power_w = {"bare": 71.0, "engine_ready": 240.0}
    run.devices[0].idle_utilization_pct = {"bare": 0.0, "engine_ready": busy_pct}
    details = [flag.detail for flag in analyze(run).flags if flag.name == "idle-busy"]
    assert len(details) == flagged
    for detail in details:
        assert "busy for 30 % of the time in which its engine_ready idle power" in detail
        with text.language("zh"):
            assert "请在无人使用该 GPU 时重新测量" in text.translate(detail) and "busy" not in text.translate(detail)


def test_device_without_a_meter_has_no_energy_flag() -> None:
    assert names(a_run(5, power_w=None)) == []


def test_flags_of_a_saved_run_stand_once() -> None:
    """In another version's words, perhaps; those of the run itself come first."""
    run = a_run(20)
    run.flags = [Flag("interrupted", "Ctrl-C"), Flag("short-window", "gpu0: too short, in other words")] * 2
    assert names(run) == ["interrupted", "short-window"]


@pytest.mark.parametrize(
    ("graph_sizes", "busy_pct", "compute_s", "flagged"),
    [
        ([1, 128], 10.0, 0.1, "CUDA graphs end at 128 tokens"),
        ([], 10.0, 0.1, "there are no CUDA graphs"),
        ([1, 128], 40.0, 0.1, None),  # the GPU itself takes that long
        ([1, 4096], 10.0, 0.1, None),  # the graphs are there
        (None, 10.0, 0.1, None),
    ],
)
def test_prompts_that_wait_for_the_host_are_flagged(
    graph_sizes: list[int] | None, busy_pct: float, compute_s: float, flagged: str | None
) -> None:
    run = a_run(40)
    run.engines = {"prefill-0": EngineFacts(role="prefill", graph_sizes=graph_sizes)}
    run.devices[0].samples = [
        msgspec.structs.replace(sample, gpu_utilization_pct=busy_pct) for sample in run.devices[0].samples
    ]
    run.requests = [
        RequestRecord(
            id=str(i), planned_s=i / 4, sent_s=i / 4, token_s=[i / 4 + 0.2, i / 4 + 0.21], end_s=i / 4 + 0.21, prompt_tokens=2048, output_tokens=2,
            phases={"compute": (i / 4, i / 4 + compute_s)},
        )
        for i in range(160)
    ]  # fmt: skip
    details = [flag.detail for flag in analyze(run).flags if flag.name == "prefill-waits-for-host"]
    assert len(details) == (flagged is not None)
    if flagged:
        assert "a prompt of 2048 tokens takes prefill 100 ms and keeps its GPU busy for 25: " + flagged in details[0]


@pytest.mark.parametrize(("together", "alone", "flagged"), [(1, False, True), (8, False, False), (1, True, False)])
def test_prompts_in_one_step_and_those_of_decode_alone_do_not_wait_for_the_host(
    together: int, alone: bool, flagged: bool
) -> None:
    """Eight prompts that share a step of 100 ms keep the GPU busy all the time; so does each that prefill computes, beside nine that decode takes."""
    run = a_run(40)
    run.engines = {"prefill-0": EngineFacts(role="prefill", graph_sizes=[1, 128])}
    busy_pct = 10.0 if together == 1 and not alone else 40.0
    run.devices[0].samples = [
        msgspec.structs.replace(sample, gpu_utilization_pct=busy_pct) for sample in run.devices[0].samples
    ]
    for i in range(160 * together):
        at_s = i // together / 4
        run.requests.append(
            RequestRecord(
                id=str(i), planned_s=at_s, sent_s=at_s, token_s=[at_s + 0.2, at_s + 0.21], end_s=at_s + 0.21, prompt_tokens=2048, output_tokens=2,
                phases={"compute": (at_s, at_s + 0.1)},
            )
        )  # fmt: skip
    for i in range(1600 if alone else 0):
        at_s = i / 40
        run.requests.append(
            RequestRecord(
                id=f"alone{i}", planned_s=at_s, sent_s=at_s, token_s=[at_s + 0.2, at_s + 0.21], end_s=at_s + 0.21, prompt_tokens=2048, output_tokens=2,
                phases={"compute": (at_s, at_s + 0.1)},
            )
        )  # fmt: skip
        run.events.append(
            ProxyEvent(request_id=f"alone{i}", decode="http://d", decode_sent_s=at_s, decode_alone="short")
        )
    assert ("prefill-waits-for-host" in names(run)) == flagged


@pytest.mark.parametrize(
    ("together", "ms_of_three", "budget", "flagged"),
    [
        (3, 150.0, 4096, True),  # 24 us per token, 13 in a step of two
        (3, 90.0, 4096, False),  # as long per token as in a step of two
        (2, 150.0, 4096, False),
        (3, 150.0, 8192, False),  # the graphs reach
    ],
)
def test_steps_of_more_prompts_than_a_graph_holds_are_flagged_where_they_take_longer(
    together: int, ms_of_three: float, budget: int, flagged: bool
) -> None:
    run = a_run(40)
    run.engines = {"prefill-0": EngineFacts(role="prefill", graph_sizes=[1, budget])}
    for step in range(100):
        at_s, prompts = step * 0.3, together if step % 4 == 0 else 2
        took_s = (ms_of_three if prompts == 3 else 53.0) / 1e3
        run.events += [
            PromptEvent(
                server="prefill-0", request_id=f"{step}-{i}", prompt_tokens=2048, begin_s=[at_s], end_s=[at_s + took_s], tokens=[2048]
            )
            for i in range(prompts)
        ]  # fmt: skip
    details = [flag.detail for flag in analyze(run).flags if flag.name == "steps-beyond-graphs"]
    expected = "prefill: 33 % of the prompts were computed in steps of more than 4096 tokens, where the CUDA graphs end, and which took 1.9 times"
    assert [detail[: len(expected)] for detail in details] == [expected] * flagged


@pytest.mark.parametrize(("server", "late_s", "flagged"), [("decode-0", 0.1, True), ("decode-0", 0.015, False), ("prefill-0", 0.1, False)])  # fmt: skip
def test_decode_whose_engine_gets_requests_many_steps_late_is_flagged(
    server: str, late_s: float, flagged: bool
) -> None:
    run = a_run(40)
    run.requests = [
        RequestRecord(
            id=str(i), planned_s=i / 4, sent_s=i / 4, token_s=[i / 4 + 0.01 * n for n in range(1, 20)], end_s=i / 4 + 0.2, prompt_tokens=2048,
            output_tokens=19,
        )
        for i in range(100)
    ]  # fmt: skip
    run.events = [
        PromptEvent(server=server, request_id=str(i), arrived_s=i / 4, taken_s=i / 4 + late_s) for i in range(100)
    ]
    details = [flag.detail for flag in analyze(run).flags if flag.name == "api-server-busy"]
    late = "decode-0: half of the requests came to its engine over 100 ms late, where a step takes 10: "
    assert [detail[: len(late)] for detail in details] == [late] * flagged
    assert all('--decode-args "--api-server-count 2"' in detail for detail in details)
    run.config["serve"] = {"vllm_args": "--api-server-count 2", "decode_args": "--api-server-count=4"}
    assert all('"--api-server-count 8"' in flag.detail for flag in analyze(run).flags if flag.name == "api-server-busy")


def slow_start(first: int, factor: float, concurrency: int = 8, **load: object) -> Run:
    """Two trials of 48 requests in which the first ones of the second took `factor` times as long."""
    run = build_run(
        "single", trials=2, requests=48, concurrency=concurrency, gpu=False, load={"concurrency": concurrency, **load}
    )
    for request in [request for request in run.requests if request.trial == 1][:first]:
        late_s = (factor - 1) * (request.end_s - request.sent_s)
        request.token_s = [at_s + late_s for at_s in request.token_s]
        request.end_s += late_s
    return run


def test_first_requests_that_take_far_longer_are_flagged_with_the_remedy() -> None:
    (flag,) = analyze(slow_start(8, 10.0)).flags
    assert flag.name == "cold-start"
    assert flag.detail.startswith("trial 2: the first 8 requests took ") and flag.detail.endswith("with --warmup 8")
    (flag,) = analyze(slow_start(8, 10.0, warmup=20)).flags
    assert flag.detail.endswith("with --warmup 40")


def test_canaries_that_a_cache_may_know_do_not_hide_a_cold_start() -> None:
    """Their times are not known: without them the first requests are still far slower than the others."""
    run = slow_start(10, 10.0)
    for request in run.requests[5::12]:
        request.canary = Canary(number=0, repeated=True)
    assert "cold-start" in names(run)


def test_a_slow_first_token_at_a_rate_is_a_cold_start_too() -> None:
    run = slow_start(0, 1.0, rate=5.0)
    for request in run.requests[:8]:
        request.token_s[0] = request.sent_s + 10 * (request.token_s[0] - request.sent_s)
        request.token_s[1:] = [max(at_s, request.token_s[0]) for at_s in request.token_s[1:]]
    assert "cold-start" in names(run)


def test_ordinary_noise_few_requests_and_changing_loads_are_no_cold_start() -> None:
    assert names(slow_start(8, 1.5)) == []
    assert "cold-start" in names(slow_start(8, 1.5, rate=5.0))  # of its TTFT
    assert names(slow_start(1, 50.0)) == []
    assert names(slow_start(8, 10.0, concurrency=25)) == []
    assert names(slow_start(8, 10.0, stages="5:10,1:10")) == []


def test_failed_gate_is_flagged_once() -> None:
    failed = Gate(
        passed=False, prompts=4, equal_outputs=3, prompt_tokens=1, external_kv_tokens=0, detail="3 of 4 equal"
    )
    assert names(build_run(gate=failed, gpu=False)) == ["gate-failed"]


def arriving(tokens_at_a_time: int, share: float = 1.0, drafts: float | None = None) -> Run:
    """A run in which this share of the answers comes in pieces of so many tokens, each when its last one would have come."""
    run = build_run("single", trials=1, requests=40, gpu=False)
    for request in run.requests[: round(share * len(run.requests))]:
        at_s = request.token_s
        request.token_s = [
            at_s[min(i // tokens_at_a_time * tokens_at_a_time + tokens_at_a_time, 64) - 1] for i in range(64)
        ]
        request.first_tokens = tokens_at_a_time
    if drafts is not None:
        run.servers = [
            ServerSeries(server="s", role="single", t_s=[0.0, 1.0], values={"accepted_tokens": [0.0, drafts]})
        ]
    return run


def test_streams_that_something_holds_back_are_flagged() -> None:
    (flag,) = analyze(arriving(64)).flags
    assert flag.name == "answers-at-once" and flag.detail.startswith("40 of 40 answers came at one instant")
    assert names(arriving(64, share=0.2)) == ["answers-at-once"]
    assert names(arriving(64, share=0.05)) == []


def test_tokens_that_come_together_are_flagged_unless_drafts_were_accepted() -> None:
    (flag,) = analyze(arriving(4)).flags
    assert flag.name == "tokens-together" and "76 % of the tokens" in flag.detail
    assert names(arriving(2)) == ["tokens-together"] and names(arriving(2, drafts=0.0)) == ["tokens-together"]
    assert names(arriving(2, drafts=70.0)) == [] and names(arriving(1)) == [] and names(arriving(4, share=0.3)) == []


@pytest.mark.parametrize(("requests", "flagged"), [(16, True), (120, False)])
def test_closed_loop_of_few_requests_per_stream_is_flagged(requests: int, flagged: bool) -> None:
    """8 streams that stay together end 8 requests at a time. A window that begins with a sending, as they did, has 9 of 16."""
    load = LoadConfig(concurrency=8, requests=requests, warmup=0)
    with ScriptedServer(stream(tokens(5), pause_s=0.02)) as server:
        result = run_load(TrialLoad(load, server.url, "m", Clock.start()))
    run = Run(name="r", clock=Clock(0, 0), config={"load": asdict(load)}, host={}, versions={})
    run.trials, run.requests = [result.trial], result.requests
    run.trials[0].start_s = min(each.sent_s or 0.0 for each in run.requests)
    assert ("few-per-stream" in names(run)) == flagged
    run.config["load"]["phase"] = "decode"
    assert "few-per-stream" not in names(run)
    run.config["load"] |= {"phase": "both", "rate": 8.0}
    assert "few-per-stream" not in names(run)


def ran(load: LoadConfig, lasted_s: Sequence[float]) -> Run:
    """A load whose requests last so long in turn; a closed loop's streams take the next one as soon as they are free."""
    run = Run(name="r", clock=Clock(0, 0), config={"load": asdict(load)}, host={}, versions={})
    free_s = [0.0] * (load.concurrency or 0)
    for index in range(load.requests):
        sent_s = index / load.rate if load.rate else heapq.heappop(free_s)
        end_s = sent_s + lasted_s[index % len(lasted_s)]
        heapq.heappush(free_s, end_s)
        run.requests.append(RequestRecord(id=str(index), planned_s=0.0, sent_s=sent_s, token_s=[end_s], end_s=end_s))
    start_s, end_s, name = window([ClientResult(requests=run.requests, streams=load.concurrency or 0)], bool(load.rate))
    run.trials = [Trial(index=0, start_s=start_s, end_s=end_s, client={"window": name})]
    return run


@pytest.mark.parametrize(("lasted_s", "flagged"), [((0.1, 0.1, 0.1, 4.0), True), ((1.0, 1.0, 1.2), False)])
def test_closed_loop_of_very_unequal_requests_is_flagged(lasted_s: tuple[float, ...], flagged: bool) -> None:
    run = ran(LoadConfig(concurrency=4, requests=32), lasted_s)
    assert any("very unequally" in flag.detail for flag in analyze(run).flags) == flagged


@pytest.mark.parametrize(
    ("options", "flagged"),
    [
        ({"rate": 50.0}, "whole run"),
        ({"rate": 50.0, "requests": 20}, "shorter than a request"),
        ({"rate": 50.0, "requests": 60}, ""),
        ({"concurrency": 5}, "whole run"),
        ({"concurrency": 1}, ""),
        ({"concurrency": 2}, ""),
    ],
)
def test_window_of_filling_and_draining_is_flagged(options: dict, flagged: str) -> None:
    run = ran(LoadConfig(**({"requests": 6} | options)), [0.2])
    details = [flag.detail for flag in analyze(run).flags if flag.name == "ramps-in-window"]
    assert [flagged in detail for detail in details] == [True] * bool(flagged)


@pytest.mark.parametrize(("count", "flagged"), [(3, "only 3"), (6, "only 4"), (9, "only 7"), (10, ""), (16, "")])
def test_open_loop_of_very_few_requests_is_flagged(count: int, flagged: str) -> None:
    """Of three the window is the whole run, which holds three answers in little more than two intervals."""
    run = Run(name="r", clock=Clock(0, 0), config={"load": {"rate": 1.0}}, host={}, versions={})
    for index in range(count):
        token_s = [index + 0.02, index + 0.05]
        run.requests.append(
            RequestRecord(id=str(index), planned_s=index, sent_s=index, token_s=token_s, end_s=token_s[-1])
        )
    start_s, end_s, name = window([ClientResult(requests=run.requests)], True)
    run.trials = [Trial(index=0, start_s=start_s, end_s=end_s, client={"window": name})]
    details = [flag.detail for flag in analyze(run).flags if flag.name == "ramps-in-window"]
    assert [flagged in detail for detail in details] == [True] * bool(flagged)


@pytest.mark.parametrize(
    ("lasts_s", "count", "flagged"),
    [((10.0,), 300, False), ((1.0, 10.0, 30.0), 200, True), ((1.0, 10.0, 30.0), 2000, False)],
    ids=["alike", "mixed", "mixed, long"],
)
def test_open_loop_in_which_long_answers_had_no_time_to_end_is_flagged(
    lasts_s: tuple[float, ...], count: int, flagged: bool
) -> None:
    run = Run(name="r", clock=Clock(0, 0), config={"load": {"rate": 10.0}}, host={}, versions={})
    for index in range(count):
        sent_s, lasts = index / 10, lasts_s[index % len(lasts_s)]
        token_s = [sent_s + 0.1 * lasts, sent_s + lasts]
        run.requests.append(
            RequestRecord(id=str(index), planned_s=sent_s, sent_s=sent_s, token_s=token_s, end_s=token_s[-1])
        )
    kind = {"window": "first completion to last sending"}
    run.trials = [Trial(index=0, start_s=min(lasts_s), end_s=(count - 1) / 10, client=kind)]
    details = [flag.detail for flag in analyze(run).flags if flag.name == "ramps-in-window"]
    assert any("ever more were in flight" in detail for detail in details) == flagged
    run.trials[0].end_s = run.trials[0].start_s + 0.4 * max(lasts_s)
    for each in run.requests:
        each.canary = Canary(number=0, repeated=True)  # which have no E2E of their own
    assert "ramps-in-window" in names(run)
