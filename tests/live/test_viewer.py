"""The viewer process: who may look, what a late viewer sees, what is said when the measurement is killed, metrics."""

import itertools
import json
import os
import signal
import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.live.conftest import Measured, end, events, status_of
from tests.support.processes import wait_until
from tests.support.servers import Peer, ScriptedServer


def first(stream, name: str):
    return json.loads(next(data for event, data in stream if event == name))


def points(figures: list[dict], chart: str) -> int:
    """How many points the first line of a chart has."""
    return next((len(figure["plot"]["data"][0]["x"]) for figure in figures if figure["key"] == chart), 0)


def test_token_is_needed_late_viewers_see_the_past_and_all_are_told_of_a_kill(measured):
    bench = measured(3000)
    address, root = bench.page, bench.page.partition("?")[0]
    wait_until(lambda: status_of(address) == 200)
    # It never takes a core from a server or a client that wants it.
    assert os.sched_getscheduler(bench.viewer.pid) in (os.SCHED_BATCH, os.SCHED_OTHER) and bench.viewer.nice() >= 10
    for path in ("", "events", "report", "nothing"):
        assert status_of(f"{root}{path}") == status_of(f"{root}{path}?token=wrong") == 403
    assert status_of(address.replace("/?", "/report?")) == 404

    def seen() -> int:
        with events(address) as stream:
            return points(first(stream, "figures"), "speed")

    wait_until(lambda: seen() >= 3, 60)
    with events(address) as early, events(address) as late:
        both = [first(stream, "figures") for stream in (early, late)]
        assert points(both[1], "speed") >= points(both[0], "speed") >= 3
        assert first(early, "points")["speed"][0][0] > both[0][0]["plot"]["data"][0]["x"][-1]
        bench.process.kill()
        for stream in (early, late):
            assert any(json.loads(data)["lost"] for name, data in stream if name == "status")
    assert status_of(address) == 200  # somebody who opens it now is told as well
    for number in (1, 2):  # what read the command's output has its end
        wait_until(lambda: Path(f"/proc/{bench.viewer.pid}/fd/{number}").readlink() == Path(os.devnull))  # noqa: B023


def test_metrics_count_every_request_and_are_gone_after_the_end(measured):
    bench = measured(60)
    families: dict[str, dict] = {}

    def scrape() -> bool:
        try:
            with urllib.request.urlopen(bench.metrics, timeout=30) as answer:
                text = answer.read().decode()
        except OSError:
            return True
        for family in text_string_to_metric_families(text):
            families[family.name] = {sample.name: sample.value for sample in family.samples}
        return families.get("pdbench_requests", {}).get("pdbench_requests_total") == 60

    wait_until(scrape, 60)
    assert families["pdbench_requests"]["pdbench_requests_total"] == 60
    assert families["pdbench_output_tokens"]["pdbench_output_tokens_total"] == 60 * 20
    assert families["pdbench_time_to_first_token_seconds"]["pdbench_time_to_first_token_seconds_count"] == 60
    assert families["pdbench_time_between_tokens_seconds"]["pdbench_time_between_tokens_seconds_count"] == 60 * 19
    assert bench.process.wait(60) == 0, bench.log.read_text()
    wait_until(lambda: not bench.viewer.is_running(), 60)


def test_servers_that_others_load_are_watched(tmp_path):
    tokens = itertools.count(0, 100)  # only the thread of the one connection that asks

    def answer(peer: Peer) -> None:
        assert peer.method == "GET" and peer.path == "/metrics"
        page = (
            f"vllm:num_requests_running 3\nvllm:kv_cache_usage_perc 0.25\nvllm:generation_tokens_total {next(tokens)}\n"
        )
        peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page.encode()))

    with ScriptedServer(answer) as server:
        watch = Measured(f"watch {server.url} http://127.0.0.1:1", tmp_path)
        try:

            def seen() -> set[str]:
                with events(watch.page) as stream:
                    return {figure["key"] for figure in first(stream, "figures")}

            wait_until(lambda: {"speed", "instances", "devices"} <= seen(), 60)
            with events(watch.page) as stream:
                html = first(stream, "status")["html"]
                assert "127.0.0.1:1 does not answer" in html and "running, – waiting, KV 25.0 %" in html
                watch.process.send_signal(signal.SIGINT)
                ends = (json.loads(data)["end"] for name, data in stream if name == "status")
                assert next(filter(None, ends)) == {"words": "It has ended.", "problem": False, "report": False}
            assert watch.process.wait(60) == 0
            assert "127.0.0.1:1 does not answer\n" in watch.log.read_text()
        finally:
            end(watch)
