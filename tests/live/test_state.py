"""What the viewer derives of messages: moving figures, breaks, energy; a server's own metrics."""

import json
import math
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pdbench.analysis.meter import Meter
from pdbench.live import pages
from pdbench.live.prometheus import Metrics
from pdbench.live.publisher import Devices, End, ServerReading, Stage, TimeLeft, Turn
from pdbench.live.servers import histograms
from pdbench.live.state import MOST_POINTS, Instance, Line, State, quantile
from pdbench.load.generator import Progress
from pdbench.records import DeviceRecord, DeviceSample, RequestError, RequestRecord
from pdbench.report import text
from pdbench.report.page import plotly_figure
from tests.support.processes import ROOT


def request(sent_s: float, *token_s: float, error: RequestError | None = None) -> RequestRecord:
    return RequestRecord(
        id=f"{sent_s}", planned_s=sent_s, sent_s=sent_s, token_s=list(token_s), end_s=sent_s + 1, error=error,
        counted_by="token_ids", output_tokens=len(token_s),
    )  # fmt: skip


def gpu(t_s: float, power_w: float, role: str = "single") -> DeviceRecord:
    return DeviceRecord(id="gpu0", kind="gpu", name="H", role=role, samples=[DeviceSample(t_s=t_s, power_w=power_w)])


def test_figures_are_of_the_last_ten_seconds():
    state = State(100.0)
    state.take(Turn("single", 0, {}), 100.0)
    state.take(Progress(1, 9, 2, 0, [request(0.0, 0.5, 0.6)]), 100.0)
    state.take(Devices([gpu(0.0, 100.0)]), 100.0)
    state.take(Devices([gpu(1.0, 300.0)]), 101.0)
    state.take(Progress(2, 9, 3, 50, [request(1.0, 1.1, 1.3)]), 101.0)
    state.tick(101.0)
    latest = {figure: value for (figure, _), value in state.latest.items()}
    assert latest["output_tokens_per_s"] == 50 and latest["in_flight"] == 3
    assert latest["j_per_output_token"] == pytest.approx(200 / 50)
    assert state.latest["ttft_ms", "single p50"] == pytest.approx(300)
    assert state.energy_j["single gpu0"] == pytest.approx(200)
    state.take(Progress(3, 9, 3, 60, [request(9.0, 9.2, 9.3)]), 112.0)
    state.tick(112.0)
    assert state.latest["ttft_ms", "single p50"] == pytest.approx(200)
    assert ("power_w", "single gpu0") not in state.latest  # not heard of for eleven seconds


def test_joules_are_of_the_devices_own_means_where_it_gives_them():
    """Instants that all meet one phase of a load's steps say little."""
    state = State(0.0)
    state.take(Turn("single", 0, {}), 0.0)
    for second in range(3):
        device = gpu(float(second), 339.0)
        device.samples[0].power_average_w = 396.0
        state.take(Devices([device]), float(second))
        state.take(Progress(second, 9, 3, 10 * second, []), float(second))
    state.tick(2.0)
    assert state.energy_j["single gpu0"] == pytest.approx(792)
    assert state.latest["j_per_output_token", "single"] == pytest.approx(39.6)
    assert state.latest["power_w", "single gpu0"] == 339


def test_failed_requests_have_no_latency_and_are_counted():
    state = State(0.0)
    state.take(Turn("single", 0, {}), 0.0)
    state.take(Progress(1, 9, 0, 5, [request(0.0, error=RequestError("http_500", "x"))]), 1.0)
    state.tick(1.0)
    state.take(Turn("single", 0, {}), 1.0)  # the next point of a sweep
    state.take(Progress(1, 9, 0, 7, [request(0.0)]), 1.0)
    assert state.failed == {"single": {"http_500": 1, "no_tokens": 1}} and state.failed_now == 1
    assert state.tokens == {"single": 12} and not any(key[0] == "ttft_ms" for key in state.latest)


def test_line_breaks_where_nothing_was_measured_and_is_thinned():
    line = Line()
    assert not line.add(1.0, 5.0) and not line.add(2.0, 5.0) and line.add(60.0, 7.0)
    assert line.x == [1.0, 2.0, 60.0, 60.0] and math.isnan(line.y[2])
    assert sum(line.add(60.0 + second, 7.0) for second in range(1, MOST_POINTS)) == 1
    assert len(line.x) < MOST_POINTS and any(math.isnan(value) for value in line.y) and line.x[-1] > 1200


def test_page_says_why_energy_is_not_measured():
    state, process = State(0.0), DeviceRecord(id="p", kind="process", name="P", role="single")
    process.samples, process.not_measured = [DeviceSample(t_s=0.0)], {"power_w": "RAPL zones are devices of their own"}
    state.take(Turn("single", 0, {}), 0.0)
    captions = []
    for second, devices in enumerate(([], [process], [gpu(1.0, 300.0)])):
        state.take(Devices(devices), float(second))
        state.take(Progress(0, 9, 3, 50 * second), float(second))
        state.tick(float(second))
        captions += [chart.caption for chart, _ in pages.charts(state) if chart.key == "speed"]
    assert captions == [
        "Tokens over the last 10 s; energy not measured: no device was sampled.",
        "Tokens over the last 10 s; energy not measured: RAPL zones are devices of their own.",
        "Tokens and energy per token over the last 10 s.",
    ]


@pytest.mark.parametrize(("lang", "words"), [("en", "No curves yet"), ("zh", "尚无曲线")])
def test_page_says_what_it_waits_for_until_there_is_a_curve(lang, words):
    state = State(0.0)
    with text.language(lang):
        first = text.translate("Waiting for the measurement to report.")
        assert f'<p class="headline">{first}</p>' in pages.live_page(lang)
        assert first in pages.status(state)["html"] and words in pages.status(state)["html"]
        state.take(Devices([gpu(1.0, 300.0)]), 1.0)
        state.tick(1.0)
        assert words not in pages.status(state)["html"]


def test_a_gpu_has_a_line_for_each_role():
    state = State(0.0)
    for second, role in enumerate(("single", "prefill")):
        state.take(Devices([gpu(second, 100.0, role)]), float(second))
        state.tick(float(second))
    ((chart, keys),) = pages.charts(state)
    assert [line["name"] for line in plotly_figure(chart)["data"]] == ["single", "prefill"]
    assert keys == [("power_w", "single gpu0"), ("power_w", "prefill gpu0")]


def test_every_word_has_a_translation():
    state = State(0.0)
    state.take(Stage("{0}: trial {1}", ["single", "1"]), 0.0)
    state.take(Turn("single", 0, {}), 0.0)
    state.take(Progress(1, 9, 2, 10, [request(0.0, 0.5, 0.6)]), 1.0)
    state.take(Devices([gpu(1.0, 300.0)]), 1.0)
    state.take(ServerReading("single", {"running": 1.0, "waiting": 0.0, "kv_used": 0.1}), 1.0)
    state.take(TimeLeft(60.0), 1.0)
    state.take(End([], "x"), 1.0)
    state.tick(1.0)
    with text.language("zh"):
        words = [words for chart, _ in pages.charts(state) for words in (chart.title, chart.caption)]
        words += [name for name, _value, _rest in pages.tiles(state)]
        words += json.loads(pages.live_page("zh").rpartition("var words = ")[2].partition(";\n")[0]).values()
        plain = {
            word for each in words for word in each.split() if word.isascii() and word.isalpha() and word.islower()
        }
        assert plain == {"single", "token", "ms"}
        assert "已结束" in pages.status(state)["end"]["words"]
        assert "第 1 次试验" in pages.status(state)["html"]


def test_dashboard_and_docs_name_the_metrics_that_there_are():
    state, metrics = State(0.0), Metrics()
    state.take(Turn("single", 0, {"slo_ttft_ms": 9000.0}), 0.0)
    failed = request(0.5, error=RequestError("timeout", "x"))
    state.take(Progress(2, 9, 2, 10, [request(0.0, 0.464, 0.6), failed]), 1.0)
    for second in (1.0, 2.0):
        state.take(Devices([gpu(second, 300.0)]), second)
    state.tick(2.0)
    metrics.update(state)
    values = {
        (sample.name, sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(metrics.page()[0].decode())
        for sample in family.samples
    }
    assert values["pdbench_requests_total", None] == 2 and values["pdbench_requests_within_slo_total", None] == 1
    assert values["pdbench_time_to_first_token_seconds_bucket", "0.464"] == 1  # a bucket holds its upper bound
    assert values["pdbench_device_energy_joules_total", None] == 300
    there = {re.sub("_(bucket|sum|count)$", "", name) for name, _ in values}
    docs, dashboard = (
        {name.removesuffix("_bucket") for name in re.findall(r"pdbench_[a-z_]+", (ROOT / "docs" / file).read_text())}
        for file in ("live.md", "grafana.json")
    )
    assert docs == there and dashboard < there


PAGE = """# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.1",model_name="m"} %d
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.2",model_name="m"} %d
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} %d
"""


def test_latencies_of_a_foreign_server_are_those_of_the_last_seconds():
    instance = Instance("decode")
    for now_s, tokens, counts in ((0.0, 100.0, (10, 10, 10)), (5.0, 600.0, (10, 20, 20))):
        figures = {"running": 2.0, "kv_used": 0.5, "output_tokens": tokens}
        instance.take(ServerReading("decode", figures, histograms(PAGE % counts)), now_s)
    values = instance.values(5.0)
    assert values["kv_used", "decode"] == 50 and values["output_tokens_per_s", "decode"] == 100
    assert values["ttft_ms", "decode p50"] == pytest.approx(150)
    assert instance.values(9.0) == {}


def test_a_server_that_was_started_again_has_no_latency_of_the_time_before():
    instance = Instance("decode")
    for now_s, counts in ((0.0, (10, 10, 10)), (1.0, (1, 2, 2))):
        instance.take(ServerReading("decode", {"output_tokens": 10.0 - now_s}, histograms(PAGE % counts)), now_s)
    assert instance.values(1.0) == {}


def test_buckets_with_timestamps_are_counts():
    page = "".join(
        f'vllm:e2e_request_latency_seconds_bucket{{engine="{engine}",le="{upper}",x="y"}} {count} 1764158000123\n'
        for engine in (0, 1)
        for upper, count in (("0.1", 2), ("+Inf", 3))
    )
    assert histograms(page) == {"e2e_ms": {0.1: 4.0, math.inf: 6.0}}


def test_quantile_without_values_is_unknown():
    assert quantile({0.1: 0.0, math.inf: 0.0}, 0.5) is None
    assert quantile({0.1: 0.0, math.inf: 4.0}, 0.5) == 0.1  # beyond the last bound: at least that


@pytest.mark.parametrize("every_s", [0.25, 5.0, 10.0])
def test_joules_are_of_every_interval_and_not_of_the_time_between_turns(every_s: float):
    """Of samples over 3 s apart, /metrics had no joules."""
    state = State(0.0)
    for begin_s in (0.0, 100.0):
        state.take(Turn("single", 0, {}), begin_s)
        for step in range(161):
            now_s = begin_s + step / 4
            state.take(Devices([gpu(now_s // every_s * every_s, 300.0)]), now_s)
            state.take(Progress(0, 9, 3, int(10 * step / 4)), now_s)
            state.tick(now_s)
            if step > 4 * every_s:
                assert state.latest["power_w", "single gpu0"] == 300.0
    assert state.energy_j["single gpu0"] == pytest.approx(2 * 40.0 * 300.0, rel=0.01)
    assert state.latest["j_per_output_token", "single"] == pytest.approx(30.0, rel=0.05)


def test_device_that_repeats_its_last_sample_is_no_longer_heard_of():
    """A GPU that was lost, or whose driver hangs, drew its last power for ever."""
    state = State(0.0)
    state.take(Turn("single", 0, {}), 0.0)
    for step in range(40):
        now_s = step / 4
        state.take(Devices([gpu(min(now_s, 2.0), 300.0)]), now_s)
        state.take(Progress(0, 9, 3, 10 * step), now_s)
        state.tick(now_s)
        assert (("power_w", "single gpu0") in state.latest) == (now_s <= 5.0)
    assert state.energy_j["single gpu0"] == pytest.approx(600.0)


@pytest.mark.parametrize("every_s", [0.25, 2.0])
@pytest.mark.parametrize("lost_from_s", [4.0, 20.0])
def test_joules_are_not_those_of_a_time_that_nobody_read(every_s: float, lost_from_s: float):
    """A GPU that came back after 30 s had what it drew before for all of them: 15,000 J of 6,000."""
    state, samples = State(0.0), dict[float, DeviceSample]()
    state.take(Turn("single", 0, {}), 0.0)
    for now_s in (step / 4 for step in range(201)):
        read_s = now_s // every_s * every_s
        if not lost_from_s < read_s < lost_from_s + 30.0:
            device = gpu(read_s, 300.0)
            samples[read_s] = device.samples[0]
            state.take(Devices([device]), now_s)
    assert state.energy_j["single gpu0"] == pytest.approx(20.0 * 300.0, rel=0.01)
    device.samples = [*samples.values()]
    assert Meter(device).energy_in([(0.0, 50.0)]).energy_j is None
    read = [(0.0, lost_from_s), (lost_from_s + 30.0, 50.0)]
    assert Meter(device).energy_in(read).energy_j == pytest.approx(20.0 * 300.0)


def test_power_of_another_turn_is_not_in_the_energy_per_token():
    state = State(0.0)
    state.take(Turn("replicas", 0, {}), 0.0)
    state.take(Devices([gpu(0.0, 700.0, "replica")]), 0.0)
    state.take(Turn("single", 0, {}), 1.0)
    for second in range(1, 4):
        # Before its first token the load was warming up.
        state.take(Devices([gpu(float(second), 100.0 if second == 1 else 300.0)]), float(second))
        if second > 1:
            state.take(Progress(0, 9, 3, 10 * second), float(second) + 0.1)
            state.take(Devices([gpu(second + 0.2, 300.0)]), second + 0.2)
        state.tick(second + 0.3)
    assert state.latest["j_per_output_token", "single"] == pytest.approx(30.0)


def test_average_power_stands_in_and_a_counter_of_rapl_is_taken_as_it_is():
    state = State(0.0)
    state.take(Turn("single", 0, {}), 0.0)
    for second in range(3):
        old, cpu = gpu(float(second), 0.0), gpu(float(second), 20.0 * second)
        old.samples[0].power_w, old.samples[0].power_average_w = None, 250.0
        cpu.id, cpu.kind, cpu.samples[0].energy_j = "cpu-package-0", "cpu", 55.0 * second
        state.take(Devices([old, cpu]), float(second))
    metrics = Metrics()
    state.tick(2.0)
    metrics.update(state)
    page = metrics.page()[0].decode()
    values = {
        (sample.name, sample.labels["device"]): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if "device" in sample.labels
    }
    assert values["pdbench_device_power_watts", "gpu0"] == 250.0
    assert values["pdbench_device_energy_joules_total", "gpu0"] == pytest.approx(500.0)
    assert values["pdbench_device_energy_joules_total", "cpu-package-0"] == pytest.approx(110.0)
