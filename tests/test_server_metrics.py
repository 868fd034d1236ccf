"""Servers' own counters over real sockets: read beside a load, what prefix caches answered, servers that hang or have none."""

import threading
import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

import pytest

from pdbench.config import LoadConfig
from pdbench.events import EngineFacts, PrefixCacheCounts, ServerSeries
from pdbench.load.clients import run_load
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock
from pdbench.server_metrics import ServerMetrics, figures, join_series, parse_facts, samples, scrape
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from tests.support.processes import wait_until
from tests.support.servers import Peer, ScriptedServer, refusal, stream, tokens

PAGE = """# HELP vllm:prefix_cache_queries_total Prefix cache queries.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a} b"} 1.5e+02
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 50.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
plain 3
"""


SGLANG = """sglang:num_running_reqs{tp_rank="0"} 3.0
sglang:num_queue_reqs{tp_rank="0"} 2.0
sglang:token_usage{tp_rank="0"} 0.25
sglang:spec_accept_rate{tp_rank="0"} 0.5
sglang:prompt_tokens_total{model="m"} 100.0
sglang:cached_tokens_total{cache_source="device"} 30.0
sglang:cached_tokens_total{cache_source="host"} 10.0
sglang_num_retracted_requests_total{tp_rank="0"} 4.0
sglang:queue_time_seconds_sum{tp_rank="0"} 1.5
sglang:queue_time_seconds_count{tp_rank="0"} 10.0
"""


def page(text: str) -> Callable[[Peer], bool]:
    def answer(peer: Peer) -> bool:
        body = text.encode()
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return True

    return answer


CLOCK = Clock.start()


def vllm_server(values: dict[str, float], *, names_asked: bool = True) -> Callable[[Peer], bool]:
    """A page of `values` as they are; `names_asked`: of a path with name[], those series alone, as prometheus_client answers."""

    def answer(peer: Peer) -> bool:
        names = parse_qs(urlsplit(peer.path).query).get("name[]")
        if peer.path != "/metrics" and not names_asked:
            return refusal(b"404 Not Found", "none")(peer)
        lines = [f'{name}{{engine="0"}} {value}' for name, value in values.items() if names is None or name in names]
        return page("\n".join([*lines, ""]))(peer)

    return answer


def caching_server() -> tuple[Callable[[Peer], bool], list[int]]:
    """Counts 10 prompt tokens per request, and all of them as cached where the prompt came before."""
    counts, seen, lock = [0, 0], set[str](), threading.Lock()

    def answer(peer: Peer) -> bool:
        if peer.method == "GET":
            names = ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total")
            lines = (f'{name}{{engine="0"}} {float(count)}\n' for name, count in zip(names, counts, strict=True))
            return page("".join(lines))(peer)
        prompt = peer.json["prompt"]
        with lock:
            counts[0] += 10
            counts[1] += 10 * (prompt in seen)
            seen.add(prompt)
        return stream(tokens(2))(peer)

    return answer, counts


def info(url: str, *servers: tuple[str, str]) -> DeploymentInfo:
    return DeploymentInfo(
        name="bench",
        url=url,
        model_name="m",
        servers=[ServerInfo(name=f"{role}-0", role=role, url=at) for role, at in servers],
    )


def test_counters_are_summed_over_engines_and_picked_by_label() -> None:
    assert figures(PAGE) == {"cache_queries": 200}
    engines = {labels.split(",")[0]: value for _, labels, value in samples(PAGE, "vllm:prefix_cache_queries_total")}
    assert engines == {'engine="0"': 150, 'engine="1"': 50}
    assert [*samples(PAGE, "plain")] == [("plain", "", 3)]


def test_timestamps_exemplars_and_odd_labels_are_no_values() -> None:
    page = """vllm:num_requests_running{engine="0",model_name="a} 7 {b\\" x"} 3.0 1764158000123
vllm:num_requests_running{engine="1"}\t4 1764158000123
vllm:num_preemptions_total{engine="0"} 2.0 # {trace_id="x"} 1.0 1764158000.1
vllm:num_requests_waiting 5 1764158000123
vllm:kv_cache_usage_perc{engine="0"} -1
vllm:generation_tokens_total{engine="0"} +Inf
"""
    assert figures(page) == {"running": 7, "preemptions": 2, "waiting": 5}
    assert [value for _, _, value in samples(page, "vllm:num_requests_running")] == [3, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_load_is_counted_without_its_warm_up(processes: int) -> None:
    answer, counts = caching_server()
    with ScriptedServer(answer) as server:
        config = LoadConfig(requests=6, warmup=3, concurrency=2, client_processes=processes, nonce="a")

        def measure() -> dict[str, PrefixCacheCounts]:
            metrics = ServerMetrics(info(server.url), CLOCK, 0)
            run_load(TrialLoad(config, server.url, "m", Clock.start()), on_begin=metrics.begin)
            return metrics.end()

        assert measure() == {"server": PrefixCacheCounts("server", 60, 0)}
        assert measure() == {"server": PrefixCacheCounts("server", 60, 60)}
    assert counts == [180, 90]


def test_proxy_is_not_asked_and_instances_without_counters_are_left_out() -> None:
    answer, _ = caching_server()
    with ScriptedServer(answer) as server, ScriptedServer(refusal(b"404 Not Found", "none")) as other:
        servers = (("prefill", server.url), ("decode", other.url), ("replica", "http://127.0.0.1:9"))
        metrics = ServerMetrics(info(other.url, *servers, ("proxy", other.url)), CLOCK, 0)
        metrics.begin()
        assert metrics.end() == {"prefill-0": PrefixCacheCounts("prefill", 0, 0)}
        assert [series.server for series in metrics.series()] == ["prefill-0"]
        assert len(other.requests) == 2


def test_server_that_was_restarted_meanwhile_has_no_counts() -> None:
    answer, counts = caching_server()
    counts[:] = [100, 50]
    with ScriptedServer(answer) as server:
        metrics = ServerMetrics(info(server.url), CLOCK, 0)
        metrics.begin()
        counts[:] = [10, 0]
        assert metrics.end() == {}


def test_page_without_end_is_given_up() -> None:
    def drip(peer: Peer) -> bool:
        peer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            peer.write(b"x", pause_s=0.05)
        return False

    with ScriptedServer(drip) as server:
        began_s = time.monotonic()
        assert scrape(server.url, timeout_s=0.5) is None
        assert time.monotonic() - began_s < 20


def test_pages_of_vllm_and_sglang_say_the_same_things() -> None:
    vllm = """vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:gpu_cache_usage_perc{engine="0"} 0.9
vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 70.0
vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 30.0
vllm:request_queue_time_seconds_bucket{le="+Inf"} 5.0
vllm:request_queue_time_seconds_sum{engine="0"} NaN
vllm:request_queue_time_seconds_count{engine="0"} 5.0
"""
    assert figures(vllm) == {"running": 7, "kv_used": 0.75, "external_tokens": 30, "queued": 5}
    assert figures(SGLANG) == {
        "running": 3, "waiting": 2, "kv_used": 0.25, "accept_rate": 0.5, "preemptions": 4, "cache_queries": 100, "cache_hits": 40,
        "prompt_tokens": 100, "queued": 10, "queued_s": 1.5,
    }  # fmt: skip
    assert figures("plain 3\nvllm:num_requests_running{}\n<html>") == {}


@pytest.mark.parametrize("names_asked", [True, False])
def test_counters_are_read_all_the_time_and_by_name_where_the_server_can(names_asked: bool) -> None:
    values = {"vllm:num_requests_waiting": 0.0, "vllm:num_preemptions_total": 5.0, "vllm:other": 1.0}
    readings: list[tuple[str, dict[str, float]]] = []
    with ScriptedServer(vllm_server(values, names_asked=names_asked)) as server:
        clock = Clock.start()
        metrics = ServerMetrics(
            info(server.url, ("decode", server.url)), clock, 0.02, on_reading=lambda *reading: readings.append(reading)
        )
        with metrics:
            wait_until(lambda: len(readings) > 2)
            metrics.begin()
            values["vllm:num_preemptions_total"] = 8.0
            wait_until(lambda: readings[-1][1]["preemptions"] == 8)
            metrics.end()
        series = metrics.series()[0]
        paths = {peer.path for peer in list(server.requests)[4:]}
    assert all(("name%5B%5D=vllm%3Anum_preemptions_total" in path) == names_asked for path in paths)
    assert (series.server, series.role, series.missed) == ("decode-0", "decode", 0)
    assert series.t_s == sorted(series.t_s) and 0 <= series.t_s[0] <= series.t_s[-1] <= clock.now()
    assert set(series.values) == {"waiting", "preemptions"} and set(series.values["preemptions"]) == {5.0, 8.0}
    # The last ones may not have been passed on yet.
    assert len(readings) >= len(series.t_s) - 2 and {name for name, _ in readings} == {"decode-0"}


def test_server_that_hangs_loses_its_own_readings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdbench.server_metrics.TIMEOUT_S", 0.3)
    hangs, ended = threading.Event(), threading.Event()

    def hanging(peer: Peer) -> bool:
        if hangs.is_set():
            ended.wait(60)
            return False
        return vllm_server({"vllm:num_requests_waiting": 1.0})(peer)

    with ScriptedServer(hanging) as one, ScriptedServer(vllm_server({"vllm:num_requests_waiting": 2.0})) as other:
        metrics = ServerMetrics(info(other.url, ("prefill", one.url), ("decode", other.url)), Clock.start(), 0.02)
        with metrics:
            wait_until(lambda: len(metrics.series()) == 2)
            hangs.set()
            before = len(metrics.series()[1].t_s)
            wait_until(lambda: metrics.series()[0].missed and len(metrics.series()[1].t_s) > before + 3)
            metrics.begin()
            assert metrics.end() == {}
        ended.set()
        prefill, decode = metrics.series()
    assert prefill.missed > 0 and len(decode.t_s) > len(prefill.t_s)


def test_series_of_several_trials_become_one() -> None:
    first = ServerSeries(server="a", role="single", t_s=[1.0], values={"waiting": [2.0]}, missed=1)
    second = ServerSeries(server="a", role="single", t_s=[3.0, 4.0], values={"running": [1.0, None]}, missed=2)
    joined = join_series([first, second, ServerSeries(server="b", role="single")])
    assert [each.server for each in joined] == ["a", "b"]
    assert (joined[0].t_s, joined[0].missed) == ([1.0, 3.0, 4.0], 3)
    assert joined[0].values == {"waiting": [2.0, None, None], "running": [None, 1.0, None]}


def test_page_that_breaks_off_is_no_page() -> None:
    def broken(peer: Peer) -> bool:
        peer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno number\r\n")
        return False

    with ScriptedServer(broken) as server:
        assert scrape(server.url) is None


START_LOG = """\
(APIServer pid=1) INFO non-default args: {'model': '/m', 'max_num_seqs': 8, 'max_num_batched_tokens': 512}
(APIServer pid=1) INFO Chunked prefill is enabled with max_num_batched_tokens=512.
(EngineCore pid=2) INFO Initializing a V1 LLM engine (v0.32.0) with config: model='/m', enable_prefix_caching=True, enable_chunked_prefill=True, \
compilation_config={'mode': 3, 'cudagraph_capture_sizes': [1, 2, 4, 8], 'cudagraph_num_of_warmups': 1}
(EngineCore pid=2) INFO GPU KV cache size: 1,234,560 tokens, Maximum concurrency for 512 tokens per request: 9.00x
"""
CACHE_PAGE = 'vllm:cache_config_info{block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",num_gpu_blocks="100"} 1.0\n'


def test_log_tells_the_limits() -> None:
    assert parse_facts("single", START_LOG, CACHE_PAGE) == EngineFacts(
        role="single",
        max_num_batched_tokens=512,
        max_num_seqs=8,
        prefix_caching=True,
        chunked_prefill=True,
        graph_sizes=[1, 2, 4, 8],
        kv_cache_tokens=1_234_560,
        block_size=16,
    )


def test_metrics_alone_tell_cache_and_block_size() -> None:
    facts = parse_facts("replica", "", CACHE_PAGE)
    assert (facts.kv_cache_tokens, facts.block_size, facts.prefix_caching) == (1600, 16, True)
    assert facts.max_num_batched_tokens is None


def test_server_that_says_nothing_has_unknown_limits() -> None:
    assert parse_facts("server", "hello", "") == EngineFacts(role="server")
