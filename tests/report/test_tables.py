"""Tables, headings and CSV by their content."""

import csv
import io
import re

import msgspec
import pytest
from rich.console import Console

from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from pdbench.errors import UserError
from pdbench.events import ProxyEvent
from pdbench.records import Flag
from pdbench.report import tables, text
from tests.support.reports import page_of
from tests.support.runs import build_run


def test_csv_holds_every_measured_request():
    run = build_run(failed=1)
    rows = list(csv.DictReader(io.StringIO(requests_csv(run))))
    assert len(rows) == len(run.requests)
    assert rows[0]["error"] == "timeout" and rows[0]["ttft_ms"] == "" and rows[0]["queue_ms"] == ""
    assert float(rows[1]["ttft_ms"]) == pytest.approx((run.requests[1].token_s[0] - run.requests[1].sent_s) * 1e3)
    assert rows[1]["output_tokens"] == "64"


def requests_csv(run):
    return ",".join(tables.REQUEST_COLUMNS) + "\n" + tables.requests_csv(analyze(run))


def test_csv_quotes_what_needs_it_and_may_be_empty():
    run = build_run(trials=1, requests=2)
    run.requests[0].id = 'a "b", c'
    run.requests[1].finish_reason = "two\nlines"
    rows = list(csv.DictReader(io.StringIO(requests_csv(run), newline="")))
    assert rows[0]["id"] == 'a "b", c' and rows[1]["finish_reason"] == "two\nlines"
    assert tables.requests_csv(analyze(build_run(trials=0))) == ""


def test_tables_fit_eighty_columns():
    single, run = analyze(build_run("single")), analyze(build_run(flags=[Flag("throttled", "GPU 0 was too hot")]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*map(tables.Terminal, tables.run_summary(run)), *tables.warnings("disaggregated", run), sep="\n")
    console.print(tables.Terminal(tables.comparison(compare(single, run))))
    shown = console.export_text()
    assert "throttled: GPU 0 was too hot" in shown and "TTFT p50" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_none_is_a_dash_and_zero_is_zero():
    table = tables.Table(title="t", header=["", "a", "b"], rows=[["x", None, 0.0], ["y", 12345.6, 7]])
    assert table.cells == [["x", "–", "0"], ["y", "12,346", "7"]]
    assert tables.csv_text([table.header, *table.rows]) == ",a,b\nx,,0.0\ny,12345.6,7\n"
    assert tables.markdown(table).splitlines()[2:] == [
        "|  | a | b |",
        "| --- | ---: | ---: |",
        "| x | – | 0 |",
        "| y | 12,346 | 7 |",
    ]


def test_models_side_by_side_are_sorted_by_the_metric():
    runs = {name: analyze(build_run(tbt_ms=tbt, model=f"m{tbt}")) for name, tbt in (("a", 4), ("b", 2), ("c", 3))}
    for metric in ("tbt_p50_ms", "output_tokens_per_s"):
        assert [row[0] for row in tables.side_by_side(runs, metric).rows] == ["b", "c", "a"]
    with pytest.raises(UserError, match="choose from"):
        tables.side_by_side(runs, "speed")


def test_zero_is_sorted_as_the_best_and_what_is_unknown_last():
    zero, unknown = build_run(trials=1, requests=4), build_run(trials=1, requests=4, failed=4)
    for request in zero.requests:
        request.token_s[1:] = request.token_s[:1] * (len(request.token_s) - 1)
        request.token_s[-1] += 0.001
    runs = {"unknown": analyze(unknown), "some": analyze(build_run(trials=1, requests=4)), "zero": analyze(zero)}
    assert text.value(runs["zero"], "tbt_p50_ms") == 0 and text.value(runs["unknown"], "tbt_p50_ms") is None
    assert [row[0] for row in tables.side_by_side(runs, "tbt_p50_ms").rows] == ["zero", "some", "unknown"]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        ({"concurrency": 4}, "4 at a time"),
        ({}, "1 at a time"),
        ({"rate": 2.5}, "2.5 requests/s"),
        ({"rate": 2.0, "ramp_to": 8.0, "concurrency": 16}, "2 → 8 requests/s, at most 16 at a time"),
        ({"stages": "1:60,4:30"}, "stages 1:60,4:30 (requests/s:s)"),
        ({"trace": "traces/AzureLLMInferenceTrace_conv.csv"}, "trace AzureLLMInferenceTrace_conv.csv"),
    ],
)
def test_heading_says_how_requests_came(load, words):
    assert text.loads({"a": analyze(build_run(load=load))}).split(" · ")[1] == words


@pytest.mark.parametrize(
    ("served", "folder", "words"),
    [
        ("model", "/data/tiny/model", "model tiny/model"),
        ("model", "model", "model"),
        ("model", None, "model"),
        ("lite", "/data/model", "model lite"),
        ("hub/lite", "hub/lite", "model lite"),
    ],
)
def test_heading_names_a_model_whose_folder_says_nothing_by_the_one_above(served, folder, words):
    run = build_run(model=served)
    run.config["serve"] = {"model": folder}
    assert text.loads({"a": analyze(run)}).split(" · ")[0] == words


def test_heading_says_once_what_runs_share():
    runs = {"a": analyze(build_run("single", model="m")), "b": analyze(build_run(model="m", load={"rate": 2.0}))}
    assert text.loads(runs).startswith("model m · a: 1 at a time; b: 2 requests/s · ")
    assert " · a: 1 x Synthetic H200; b: 2 x Synthetic H200 · " in text.machines(runs)


@pytest.mark.parametrize("gpu", [True, False])
def test_versions_and_machine_of_a_server_given_by_its_url_are_not_this_hosts(gpu):
    run = build_run("bench", gpu=gpu)
    run.config["serve"] = None
    runs = {"a": analyze(run)}
    heading = text.machines(runs)
    assert "vllm" not in heading and "torch" not in heading and "pdbench" in heading
    assert ("1 x Synthetic H200" if gpu else "the server's machine is unknown") in heading
    _, same = tables.configuration(runs)
    keys = {str(row[0]) for row in same.rows}
    assert "client.version.vllm" in keys and not [key for key in keys if key.startswith(("version.", "host."))]


def test_energy_is_given_by_role_or_one_line_says_why_not(analyses):
    html = page_of(analyses)
    assert "no meter splits them" in html and "Prefill, J per prompt token" in html
    (table,) = tables.energy({"single": analyze(build_run("single", gpu=False))})
    assert not table.rows and table.note == "not measured: RAPL zones are devices of their own"
    assert tables.markdown(table) == "## Energy\n\nnot measured: RAPL zones are devices of their own"
    console = Console(width=80, file=io.StringIO())
    console.print(tables.Terminal(table))
    assert console.file.getvalue() == "Energy: not measured: RAPL zones are devices of their own\n"


def test_parts_of_a_role_add_up_to_its_total():
    short = analyze(build_run(seed=2)).summary.energy.roles["prefill"]
    assert short.total_j and tables.energy_parts(short) == {
        "other_j": short.total_j
    }  # phases of 21 ms, sampled every 100 ms
    roles = analyze(build_run(seed=2, ttft_ms=2000)).summary.energy.roles
    assert list(roles) == ["prefill", "decode"]
    for role in roles.values():
        parts = tables.energy_parts(role)
        assert list(parts) == ["active_j", "idle_j", "waiting_j"]
        assert sum(parts.values()) == pytest.approx(role.total_j, rel=1e-6)
        unknown = msgspec.structs.replace(role, waiting_j=None)  # waits too short for the readings
        assert sum(tables.energy_parts(unknown).values()) == pytest.approx(role.total_j)


def test_energy_by_role_tells_what_is_not_known_from_what_a_role_does_not_have() -> None:
    runs = {name: analyze(build_run(name, seed=2)) for name in ("single", "disaggregated")}
    rows = {row[0]: row[2:5] for row in tables.energy(runs)[0].cells}
    assert rows["disaggregated, prefill"] == ["–", "–", "–"]  # its phases are too short
    assert rows["single"][2] == ""


def mixed_run():
    run = build_run(trials=1, requests=6)
    run.events = [
        ProxyEvent(request_id=request.id, prefill_sent_s=0.0, first_token_s=1.0 if number < 2 else None)
        for number, request in enumerate(run.requests)
    ]
    return run


def test_who_sent_the_first_token_is_shown_where_both_did():
    analysis = analyze(mixed_run())
    (table,) = tables.first_tokens({"disaggregated": analysis})
    assert [row[:2] for row in table.rows] == [["prefill", 2], ["decode", 4]]
    assert table.rows[0][2] == analysis.summary.first_token["prefill"].ttft_ms.p50
    assert table in tables.run_summary(analysis)
    assert "Who sent the first token" in page_of([analysis])
    assert tables.first_tokens({"disaggregated": analyze(build_run())}) == []


def test_one_run_shows_its_goodput_where_it_has_an_slo():
    label = "Goodput, requests/s"
    kept = analyze(build_run(load={"concurrency": 1, "requests": 16, "slo_ttft_ms": 35.0}))
    shown = {row[0]: row[1] for row in tables.run_summary(kept)[0].rows}
    assert shown[label] == kept.summary.goodput.requests_per_s > 0
    assert shown["Requests within the SLO, %"] == kept.summary.goodput.met_pct < 100
    assert [label, shown[label], "", "", ""] in tables.windows(kept).rows
    free = analyze(build_run())
    assert label not in [row[0] for table in (tables.run_summary(free)[0], tables.windows(free)) for row in table.rows]


def test_csv_says_who_sent_the_first_token():
    rows = list(csv.DictReader(io.StringIO(requests_csv(mixed_run()))))
    assert [row["first_token"] for row in rows] == ["prefill"] * 2 + ["decode"] * 4
    assert float(rows[0]["first_gap_ms"]) > 0


def test_side_by_side_says_that_its_latencies_are_over_all_trials():
    assert "all trials together" in tables.side_by_side({"a": analyze(build_run(trials=2))}).note


def test_merged_share_stands_below_tbt_and_below_runs_side_by_side():
    run = build_run(trials=1, requests=4)
    analysis = analyze(run)
    assert tables.side_by_side({"a": analysis}).note == "" and "Gaps of 0 ms" not in str(tables.times(analysis).rows)
    for request in run.requests:
        request.token_s[1::2] = request.token_s[::2]
    analysis = analyze(run)
    names = [row[0] for row in tables.times(analysis).rows]
    assert names[names.index("TBT, every gap") + 1] == "Gaps of 0 ms, in one chunk, %"
    assert "a: 50.8 %" in tables.side_by_side({"a": analysis}).note


def test_power_caps_stand_with_the_energy():
    run = build_run()
    for device in run.devices[:1]:
        device.default_power_limit_w = 700.0
        for sample in device.samples:
            sample.power_limit_w, sample.throttle = 500.0, ["sw_power_cap"]
    analysis = analyze(run)
    (roles, *_), words = tables.energy({"a": analysis}), "gpu0: power limit 500 W, default 700 W"
    assert roles.note == f"{words}, held down by power in 100 % of the samples"
    assert words in page_of([analysis])


def test_module_of_a_superchip_is_a_row_of_its_own():
    run = build_run("single")
    for sample in run.devices[0].samples:
        sample.module_power_w = 2 * sample.power_w
    name, role, power_w, *_, energy_j = tables.devices(analyze(run)).rows[1]
    summary = analyze(run).summary.devices["gpu0"]
    assert (name, role) == ("gpu0, module", "")
    assert power_w == pytest.approx(2 * summary.energy.integral_j / summary.energy.duration_s)
    assert energy_j == pytest.approx(2 * summary.energy.integral_j)


def lines_of_a_wide_table(width: int, cells: list[str], *rows: list) -> list[str]:
    """What a terminal shows of these rows, `cells` at the end of each."""
    header = ["", "GPUs", "", "Requests within the SLO, %", "TTFT p99, ms", "TBT p99, ms", "Energy per output token, J"]
    console = Console(width=width, file=io.StringIO())
    console.print(tables.Terminal(tables.Table(title="Search", header=header, rows=[[*row, *cells] for row in rows])))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 72, 80, 100, 200])
def test_numbers_of_a_wide_table_are_never_broken_over_lines(width):
    cells = ["99.5 (99.1-99.9)", "1,234 (1,034-12,345)", "12.3 (11.3-13.3)", "0.505 (0.5049-0.5061)"]
    lines = lines_of_a_wide_table(width, cells, ["disaggregated:12", 12, "cheapest"], ["6p6d", 12, "not met"])
    whole = {number for cell in cells for number in re.findall(r"\d(?:[\d.,]*\d)?", cell)} | {"12", "6", "99"}
    assert max(map(len, lines)) <= width
    assert {number for line in lines for number in re.findall(r"\d(?:[\d.,]*\d)?", line)} <= whole
    assert all("\n".join(lines).count(number) >= 2 for number in whole - {"6", "99"})


def test_wide_terminal_shows_a_wide_table_in_single_lines():
    table = tables.Table(title="t", header=["", "a long title of a column"], rows=[["x", "0.505 (0.504-0.506)"]])
    console = Console(width=60, file=io.StringIO())
    console.print(tables.Terminal(table))
    assert "a long title of a column" in console.file.getvalue() and "0.505 (0.504-0.506)" in console.file.getvalue()


@pytest.mark.parametrize("width", [60, 72, 80, 100])
def test_name_of_a_deployment_is_never_broken_over_lines(width):
    cells = ["100 (100.0-100)", "106 (77.8-166)", "36.3 (28.7-51.9)", "0.401 (0.365-0.442)"]
    lines = lines_of_a_wide_table(width, cells, ["replicas:7", 7, "cheapest"], ["3p3d", 6, "not decided"])
    written = "\n".join(lines)
    assert "replicas:7" in written and max(map(len, lines)) <= width
    assert all(number in written for cell in cells for number in re.findall(r"\d[\d.]*", cell))
