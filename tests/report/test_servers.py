"""What servers counted, as a chart and as a table; neither where no server told anything."""

import numpy as np

from pdbench.report import servers


def test_chart_has_ttft_queues_and_kv_caches_on_one_axis(analyses):
    chart = servers.curves(analyses[1], "disaggregated")
    ttft, queues, kv = chart.panels
    assert [series.name for series in ttft.series] == ["", "server-error", "preempted"]
    assert [series.name for series in queues.series[2:]] == ["decode-0 waiting", "decode-1 waiting"]
    assert len({series.shade for series in kv.series}) == 2 and np.nanmax(kv.series[0].y) <= 99
    (start_s, _), (line, preempted) = analyses[1].curves.axis.stretches[0], (series.x for series in ttft.series[1:])
    load_s = analyses[1].requests.sent_s[0]
    assert np.allclose(line, load_s - start_s + 0.1, atol=0.01) and len(preempted) == 2
    assert kv.y.label == "KV cache in use, %"
    assert chart.shared_x and len({id(panel.x) for panel in chart.panels}) == 1


def test_table_has_a_row_per_server_and_only_what_they_tell(analyses):
    (table,) = servers.table({"a": analyses[0], "b": analyses[1]})
    assert table.header == [
        "server", "running", "waiting", "most waiting", "queue, ms", "KV used, most %", "preempted"
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == ["b, decode-0", "b, decode-1"] and table.rows[0][-1] == 4


def test_run_without_counters_has_neither(analyses):
    assert servers.table({"a": analyses[0]}) == [] and servers.curves(analyses[0], "single").drawable == []
