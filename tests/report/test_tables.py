"""Tables, headings and CSV by their content."""

import csv
import io

import pytest
from rich.console import Console

from pdbench.analysis.compare import compare
from pdbench.analysis.run_analysis import analyze
from pdbench.errors import UserError
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
    console.print(*map(tables.terminal, tables.run_summary(run)), *tables.warnings("disaggregated", run), sep="\n")
    console.print(tables.terminal(tables.comparison(compare(single, run))))
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


def test_merged_tokens_are_shown_where_they_are_many():
    run = build_run(trials=1, requests=4)
    assert "Gaps of 0 ms" not in str(tables.run_summary(analyze(run))[0].rows)
    for request in run.requests:
        request.token_s[1::2] = request.token_s[::2]
    assert "Gaps of 0 ms" in str(tables.run_summary(analyze(run))[0].rows)


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


def test_heading_says_once_what_runs_share():
    runs = {"a": analyze(build_run("single", model="m")), "b": analyze(build_run(model="m", load={"rate": 2.0}))}
    assert text.loads(runs).startswith("model m · a: 1 at a time; b: 2 requests/s · ")
    assert " · a: 1 x Synthetic H200; b: 2 x Synthetic H200 · " in text.machines(runs)


def test_energy_is_given_by_role_or_one_line_says_why_not(analyses):
    html = page_of(analyses)
    assert "no meter splits them" in html and "Prefill, J per prompt token" in html
    (table,) = tables.energy({"single": analyze(build_run("single", gpu=False))})
    assert not table.rows and table.note == "not measured: no RAPL on this machine"
    assert tables.markdown(table) == "## Energy\n\nnot measured: no RAPL on this machine"
    console = Console(width=80, file=io.StringIO())
    console.print(tables.terminal(table))
    assert console.file.getvalue() == "Energy: not measured: no RAPL on this machine\n"


def test_parts_of_a_role_add_up_to_its_total():
    roles = analyze(build_run(seed=2)).summary.energy.roles
    assert list(roles) == ["prefill", "decode"]
    for role in roles.values():
        parts = tables.energy_parts(role)
        assert list(parts) == ["active_j", "idle_j", "waiting_j"]
        assert sum(parts.values()) == pytest.approx(role.total_j, rel=1e-6)
