"""Servers' own counters over real sockets: what prefix caches answered during a load, and servers that have no such counters."""

import threading
import time
from collections.abc import Callable

import pytest

from pdbench.config import LoadConfig
from pdbench.load.clients import run_load
from pdbench.load.plan import TrialLoad
from pdbench.records import Clock, PrefixCacheCounts
from pdbench.server_metrics import PrefixCacheReader, scrape, total
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from tests.support.servers import Peer, ScriptedServer, refusal, stream, tokens

PAGE = """# HELP vllm:prefix_cache_queries_total Prefix cache queries.
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="a} b"} 1.5e+02
vllm:prefix_cache_queries_total{engine="1",model_name="m"} 50.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
plain 3
"""


def page(text: str) -> Callable[[Peer], bool]:
    def answer(peer: Peer) -> bool:
        body = text.encode()
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return True

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
    assert total(PAGE, "vllm:prefix_cache_queries_total") == 200
    assert total(PAGE, "vllm:prefix_cache_queries_total", 'engine="1"') == 50
    assert total(PAGE, "vllm:prefix_cache_queries_total", 'engine="2"') is None
    assert total(PAGE, "plain") == 3
    assert total(PAGE, "vllm:prefix_cache") is None


@pytest.mark.parametrize("processes", [1, 2])
def test_load_is_counted_without_its_warm_up(processes: int) -> None:
    answer, counts = caching_server()
    with ScriptedServer(answer) as server:
        config = LoadConfig(requests=6, warmup=3, concurrency=2, client_processes=processes, nonce="a")

        def measure() -> dict[str, PrefixCacheCounts]:
            caches = PrefixCacheReader(info(server.url))
            run_load(TrialLoad(config, server.url, "m", Clock.start()), on_begin=caches.start)
            return caches.stop()

        assert measure() == {"server": PrefixCacheCounts("server", 60, 0)}
        assert measure() == {"server": PrefixCacheCounts("server", 60, 60)}
    assert counts == [180, 90]


def test_proxy_is_not_asked_and_instances_without_counters_are_left_out() -> None:
    answer, _ = caching_server()
    with ScriptedServer(answer) as server, ScriptedServer(refusal(b"404 Not Found", "none")) as other:
        servers = (("prefill", server.url), ("decode", other.url), ("replica", "http://127.0.0.1:9"))
        caches = PrefixCacheReader(info(other.url, *servers, ("proxy", other.url)))
        caches.start()
        assert caches.stop() == {"prefill-0": PrefixCacheCounts("prefill", 0, 0)}
        assert len(other.requests) == 2


def test_server_that_was_restarted_meanwhile_has_no_counts() -> None:
    answer, counts = caching_server()
    counts[:] = [100, 50]
    with ScriptedServer(answer) as server:
        caches = PrefixCacheReader(info(server.url))
        caches.start()
        counts[:] = [10, 0]
        assert caches.stop() == {}


def test_page_without_end_is_given_up() -> None:
    def drip(peer: Peer) -> bool:
        peer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1000):
            peer.write(b"x", pause_s=0.05)
        return False

    with ScriptedServer(drip) as server:
        began_s = time.monotonic()
        assert scrape(server.url, timeout_s=0.5) is None
        assert time.monotonic() - began_s < 3
