"""Sweeps: every combination, typed values, resuming, failing points; the knee; a whole sweep against a scripted server."""

import csv
import dataclasses
import io
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from pdbench import cli, sweep
from pdbench.analysis.run_analysis import analyze
from pdbench.config import LoadConfig, Options
from pdbench.errors import StartError, UserError
from pdbench.records import Flag, save_run
from pdbench.report import mpl, text
from pdbench.report import sweep as sweeps
from pdbench.serving import machine
from tests.support.processes import call_pdbench, free_port
from tests.support.runs import build_run
from tests.support.servers import Peer, ScriptedServer, stream, tokens

OPTIONS = Options()
CONSOLE = Console(quiet=True)


def test_every_combination_with_the_options_own_types():
    made = sweep.points(OPTIONS, ["concurrency=1,2", "--rate=none,2.5", "prefill_gpus=0,0+1", "enforce-eager=false"])
    assert len(made) == 8
    last = made[-1]
    assert last.varied == {"concurrency": 2, "rate": 2.5, "prefill_gpus": (0, 1), "enforce_eager": False}
    assert last.options.load.concurrency == 2 and last.options.serve.prefill_gpus == (0, 1)
    assert last.name == "concurrency=2,rate=2.5,prefill_gpus=0+1,enforce_eager=False"
    assert made[0].options.load.rate is None
    (model,) = sweep.points(OPTIONS, ["model=org/name"])
    assert "/" not in model.name and model.options.serve.model == "org/name"


@pytest.mark.parametrize(
    "vary", [[], ["concurrency"], ["concurrency="], ["nonsense=1"], ["concurrency=many"], ["seed=1", "seed=2"]]
)
def test_a_wrong_vary_is_the_users_error(vary):
    with pytest.raises(UserError, match="--vary") as raised:
        sweep.points(OPTIONS, vary)
    assert raised.value.exit_code == 2


def test_points_that_would_share_a_folder_are_refused_and_long_names_cut():
    for vary in ("rate=1,1.0", "model=org/a,org_a"):
        with pytest.raises(UserError, match="two points are"):
            sweep.points(OPTIONS, [vary])
    names = [point.name for point in sweep.points(OPTIONS, [f"vllm-args=--a={400 * 'x'}1,--a={400 * 'x'}2"])]
    assert len(set(names)) == 2 and all(len(name) < 120 for name in names)


def test_slo():
    assert sweep.with_slo(OPTIONS, "ttft=200, tbt=50").load == dataclasses.replace(
        OPTIONS.load, slo_ttft_ms=200.0, slo_tbt_ms=50.0
    )
    assert sweep.with_slo(OPTIONS, "") == OPTIONS
    for wrong in ("latency=3", "tbt=3,tpot=4", "ttft", "ttft=", "ttft=-1", "ttft=3ms", ","):
        with pytest.raises(UserError, match="--slo"):
            sweep.with_slo(OPTIONS, wrong)
    limited = sweep.with_slo(OPTIONS, "ttft=200")
    assert sweep.with_slo(limited, "ttft=200,tbt=50").load.slo_tbt_ms == 50.0
    with pytest.raises(UserError, match=r"--slo ttft=300: --slo-ttft-ms 200 says otherwise: give one of them"):
        sweep.with_slo(limited, "ttft=300")


def test_a_sweep_resumes_where_it_stopped_and_goes_on_after_a_failure(tmp_path):
    calls: list[int | None] = []

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        calls.append(options.load.concurrency)
        (folder / "single_results").mkdir()
        (folder / "single_results" / "single_results.json").write_text("{}")
        if options.load.concurrency == 2:
            raise UserError("the server died")
        if options.load.concurrency == 3 and calls.count(3) == 1:
            raise KeyboardInterrupt
        return [folder / "single_results"]

    made = sweep.points(OPTIONS, ["concurrency=1,2,3,4"])
    with pytest.raises(KeyboardInterrupt):
        list(sweep.run(made, tmp_path, measure, CONSOLE))
    assert calls == [1, 2, 3]
    found: list[tuple[Mapping[str, Any], list[Path]]] = []
    with pytest.raises(UserError, match="1 of 4 points of the sweep failed"):
        found.extend(sweep.run(made, tmp_path, measure, CONSOLE))
    assert calls == [1, 2, 3, 2, 3, 4]
    assert [varied["concurrency"] for varied, _ in found] == [1, 3, 4]
    with pytest.raises(UserError, match="every point"):
        list(sweep.run(sweep.points(OPTIONS, ["concurrency=2"]), tmp_path, measure, CONSOLE))


def test_points_of_other_options_are_refused_and_kept_before_anything_is_measured(tmp_path, monkeypatch):
    calls: list[int | None] = []

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        calls.append(options.load.concurrency)
        results = folder / "bench_results"
        results.mkdir()
        (results / "bench_results.json").write_text(f"{len(calls)}")
        return [results]

    context = {"url": "http://a", "trials": 1}
    list(sweep.run(sweep.points(OPTIONS, ["concurrency=1"]), tmp_path, measure, CONSOLE, context))
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    more = sweep.points(OPTIONS, ["concurrency=2,1"])
    other = sweep.points(dataclasses.replace(OPTIONS, load=LoadConfig(seed=7)), ["concurrency=2,1"])
    for points, where, differs in (
        (other, context, "seed 0 instead of 7"),
        (more, context | {"trials": 3}, "trials 1 instead of 3"),
        (more, context | {"url": "http://b"}, "url http://a instead of http://b"),
        (more, {"trials": 1}, "url http://a instead of none"),
    ):
        with pytest.raises(
            UserError,
            match=rf"concurrency=1 was measured with other options or on another machine \({differs}\): .*--out",
        ):
            list(sweep.run(points, tmp_path, measure, CONSOLE, where))
    own = machine.own_identity()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(machine, "own_identity", lambda: own | {"gpus": {"GPU 0": "GPU-b"}})
        with pytest.raises(
            UserError, match=r"on another machine \(GPU 0 none instead of GPU-b\): repeat its command there"
        ):
            list(sweep.run(more, tmp_path, measure, CONSOLE, context))
    assert calls == [1] and {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == kept
    (done,) = tmp_path.glob("*/point.json")
    known = json.loads(done.read_text())
    done.write_text(json.dumps({key: value for key, value in known.items() if key != "machine"}))  # of an older pdbench
    list(sweep.run(more, tmp_path, measure, CONSOLE, context))
    assert calls == [1, 2]


def test_point_whose_run_was_exchanged_is_refused(tmp_path):
    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        save_run(build_run("single", seed=options.load.concurrency or 0), folder / "single_results")
        return [folder / "single_results"]

    points = sweep.points(OPTIONS, ["concurrency=1,2"])
    list(sweep.run(points, tmp_path, measure, CONSOLE))
    first, second = (tmp_path / f"concurrency={count}" / "single_results" for count in (1, 2))
    shutil.rmtree(second)
    shutil.copytree(first, second)
    with pytest.raises(UserError, match="concurrency=2 holds another run than was measured there"):
        list(sweep.run(points, tmp_path, measure, CONSOLE))


def test_a_failure_that_looks_like_markup_ends_no_sweep(tmp_path):
    told = Console(file=io.StringIO(), width=200)

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        if options.load.concurrency == 1:
            raise UserError("the log ends [/INST] with [rank0]")
        return [folder]

    with pytest.raises(UserError, match="1 of 2 points"):
        list(sweep.run(sweep.points(OPTIONS, ["concurrency=1,2"]), tmp_path, measure, told))
    assert not (tmp_path / "concurrency=1").exists()
    assert "[/INST] with [rank0]" in told.file.getvalue()


def nonces(out: Path, url: str | None = None, load: LoadConfig | None = None, failing: int = 0) -> list[str]:
    """The nonces with which a sweep over concurrency=1,2,3 measures the points that it has left; one point may fail."""
    used = []

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        used.append(options.load.nonce)
        (folder / "bench_results").mkdir()
        (folder / "bench_results" / "bench_results.json").write_text("{}")
        if options.load.concurrency == failing:
            raise UserError("the server died")
        return [folder / "bench_results"]

    made = sweep.points(dataclasses.replace(OPTIONS, load=load or LoadConfig()), ["concurrency=1,2,3"])
    with suppress(UserError) if failing else nullcontext():
        list(sweep.run(made, out, measure, CONSOLE, {"url": url}))
    return used


def test_points_with_servers_of_their_own_have_one_nonce_also_when_resumed(tmp_path):
    (nonce,) = set(nonces(tmp_path / "a", failing=2))
    assert nonces(tmp_path / "a") == [nonce]
    assert nonce not in nonces(tmp_path / "b")
    assert nonces(tmp_path / "c", load=LoadConfig(nonce="x")) == ["x"] * 3
    assert nonces(tmp_path / "c") == []
    with pytest.raises(UserError, match="nonce x instead of y"):
        nonces(tmp_path / "c", load=LoadConfig(nonce="y"))
    assert nonces(tmp_path / "c") == []


def test_points_that_share_a_server_have_a_nonce_each_and_a_new_one_when_measured_again(tmp_path):
    first = nonces(tmp_path, "http://a", failing=2)
    (nonce,) = {used.partition("/")[0] for used in first}
    assert first == [f"{nonce}/concurrency={count}" for count in (1, 2, 3)]
    (again,) = nonces(tmp_path, "http://a")
    assert again.startswith(first[1] + "/")


def test_parts_go_through_the_points_of_one_serving_before_the_next(tmp_path):
    order = []

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        order.append((part, options.serve.prefill_instances, options.load.concurrency))
        nonces.add(options.load.nonce)
        (folder / f"{part}_results").mkdir()
        (folder / f"{part}_results" / f"{part}_results.json").write_text("{}")
        if len(order) == 6:
            raise KeyboardInterrupt
        return [folder / f"{part}_results"]

    nonces: set[str | None] = set()
    made = sweep.points(OPTIONS, ["concurrency=1,2", "prefill_instances=1,2"])
    parts = ("single", "replicas")
    with pytest.raises(KeyboardInterrupt):
        list(sweep.run(made, tmp_path, measure, CONSOLE, parts=parts))
    assert order == [(part, count, at) for count in (1, 2) for part in parts for at in (1, 2)][:6]
    assert "6 points" not in sweep.saved(tmp_path) and "5 points" in sweep.saved(tmp_path)
    found = list(sweep.run(made, tmp_path, measure, CONSOLE, parts=parts))
    assert len(order) == 9 and order[6] == order[5] and len(found) == 8
    assert len(nonces) == 4  # deployments get the same prompts, points others


def test_servers_that_did_not_start_are_not_started_for_the_points_other_loads(tmp_path):
    tried = []

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        tried.append((part, options.serve.max_model_len, options.load.rate))
        if part == "replicas" and options.serve.max_model_len == 512:
            raise StartError("replica-0 died")
        (folder / f"{part}_results").mkdir()
        (folder / f"{part}_results" / f"{part}_results.json").write_text("{}")
        return [folder / f"{part}_results"]

    console = Console(file=io.StringIO(), width=200)
    made = sweep.points(OPTIONS, ["max_model_len=512,1024", "rate=1,2,3"])
    with pytest.raises(UserError, match="3 of 12 points of the sweep failed"):
        list(sweep.run(made, tmp_path, measure, console, parts=("single", "replicas")))
    assert [rate for part, length, rate in tried if (part, length) == ("replicas", 512)] == [1]
    assert len(tried) == 10
    assert console.file.getvalue().count("left out: its servers did not start for an earlier point") == 2  # type: ignore[attr-defined]


def test_the_knee():
    assert sweeps.knee([10, 20, 30, 32, 33], [5, 5, 6, 20, 60]) == 2
    assert sweeps.knee([10, 20, 30], [5, 5.2, 4.9]) is None
    assert sweeps.knee([1, 2], [1, 2]) is None
    assert sweeps.knee([1, 2, 3], [1, 2, 3]) is None
    assert sweeps.knee([1, 1, 1], [1, 2, 3]) is None
    assert sweeps.knee([1, 2, 3], [3, 5.5, 6]) is None


def test_a_whole_sweep_against_a_server(tmp_path):
    with ScriptedServer(stream(tokens(5), pause_s=0.002)) as server:
        command = [
            "sweep",
            "--url",
            server.url,
            "--model",
            "m",
            "--no-power",
            "--requests",
            "6",
            "--warmup",
            "0",
            "--canaries",
            "0",
        ]
        command += ["--vary", "concurrency=1,2,3", "--slo", "ttft=1000,tbt=1000", "--out", str(tmp_path)]
        for _ in range(2):
            cli.main(command)
        # The second time there was nothing left to measure.
        assert sum(peer.method == "POST" for peer in server.requests) == 18
    rows = list(csv.DictReader((tmp_path / "sweep_summary.csv").open()))
    assert [row["concurrency"] for row in rows] == ["1", "2", "3"]
    assert all(
        row["deployment"] == "bench" and float(row["slo_met_pct"]) == 100 and row["succeeded"] == "6" for row in rows
    )
    assert all(float(row["output_tokens_per_s"]) > 0 and row["j_per_output_token"] == "" for row in rows)
    assert (tmp_path / "sweep_curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "concurrency=2" / "bench_results" / "bench_results.json").exists()


def test_ctrl_c_while_a_point_is_drawn_costs_no_measurement(tmp_path, monkeypatch):
    drawn, draw, failed = [], mpl.picture, []

    def picture(*arguments: object) -> bytes:
        drawn.append(arguments)
        if len(drawn) == 1:
            raise KeyboardInterrupt
        return draw(*arguments)  # type: ignore[arg-type]

    def answer(peer: Peer) -> object:
        if peer.method == "POST" and peer.json["stream"] and not failed:
            failed.append(peer)
            peer.respond({"error": {"message": "boom"}}, b"500 Oops")
            return True
        return stream(tokens(5), pause_s=0.002)(peer)

    monkeypatch.setattr(mpl, "picture", picture)
    with ScriptedServer(answer) as server:
        options = ["--model", "m", "--no-power", "--requests", "4", "--warmup", "0", "--canaries", "0"]
        command = ["sweep", "--url", server.url, *options, "--vary", "concurrency=1,2", "--out", "s"]
        first = call_pdbench(*command, cwd=tmp_path)
        assert first.returncode == 130 and "1 point is saved in s" in first.stderr, first
        second = call_pdbench(*command, cwd=tmp_path)
        assert sum(peer.method == "POST" for peer in server.requests) == 8
    # The flag of a point that was measured before is in the exit code, too.
    assert second.returncode == 1 and "concurrency=1: bench: requests-failed" in second.stderr
    assert len([*tmp_path.glob("s/*/bench_results/*.png")]) == 2


@pytest.mark.parametrize("model", [[], ["--model", "m"]], ids=["unnamed", "named"])
@pytest.mark.parametrize("command", [["sweep", "--vary", "concurrency=1,2"], ["search", "--slo", "ttft=300"]])
def test_no_server_at_the_url_ends_it_and_leaves_nothing(tmp_path: Path, command: list[str], model: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = call_pdbench(*command, *model, "--url", url, "--out", "a/b", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no OpenAI-compatible server" in done.stderr
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["sweep", "search"])
def test_options_that_change_nothing_of_a_server_that_runs_are_no_points(tmp_path: Path, command: str) -> None:
    server = ["--url", "http://127.0.0.1:9", "--vary", "concurrency=1" if command == "sweep" else "seed=1"]
    done = call_pdbench(command, "--slo", "ttft=9", *server, "prefill_instances=1,2", "model=m", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "--vary prefill_instances: it changes nothing of the server" in done.stderr
    done = call_pdbench(command, "--slo", "ttft=9", *server, "--against", "replicas", cwd=tmp_path)
    assert done.returncode == 1 and "--against replicas: these would be started" in done.stderr
    (tmp_path / "mine.toml").write_text('against = "replicas"')
    done = call_pdbench(command, "mine.toml", "--slo", "ttft=9", *server, cwd=tmp_path)
    assert "no OpenAI-compatible server answers" in done.stderr


def test_curves_have_integer_ticks_and_name_the_slo():
    rows = [
        ({"load.concurrency": number}, analyze(build_run(name, trials=1, requests=4, load=load)))
        for name in ("single", "disaggregated")
        for number in (1, 2, 3)
        for load in [{"concurrency": number, "slo_ttft_ms": 200.0, "slo_tbt_ms": 50.0}]
    ]
    chart = sweeps.curves(rows)
    assert [panel.title for panel in chart.panels][2:] == [
        "Goodput: requests/s with TTFT ≤ 200 ms and mean TBT ≤ 50 ms", "Energy per output token", "Where TTFT goes",
    ]  # fmt: skip
    assert chart.panels[-1].y.names[:2] == ["single, concurrency 1", "single, concurrency 2"]
    with matplotlib.rc_context(mpl.STYLE):
        figure = mpl.chart(chart, 16, 15)
        FigureCanvasAgg(figure).draw()
    places = [tick for tick in figure.axes[2].get_xticks() if 1 <= tick <= 3]
    assert places == [1, 2, 3]
    heading = figure.texts[0].get_window_extent()
    assert not any(axis.title.get_window_extent().overlaps(heading) for axis in figure.axes)


def test_table_and_curves_are_in_the_language_asked_for():
    rows = [({"load.rate": rate}, analyze(build_run(trials=1, requests=4))) for rate in (1.0, 2.0, 4.0)]
    with text.language("zh"):
        chart, table = sweeps.curves(rows), sweeps.table(rows)
    assert chart.title == table.title == "扫描 rate" and chart.caption == "点旁的数字：rate, requests/s"
    assert [panel.title for panel in chart.panels][:2] == ["TTFT p99 与吞吐", "TBT p99（每个间隔）与吞吐"]
    assert "部署" in table.header and table.note.startswith("有效吞吐：需要 --slo-ttft-ms")


def test_flags_and_failures_are_marked_and_listed_once():
    run = build_run(trials=2, requests=4, failed=1, flags=[Flag("throttled", "a"), Flag("throttled", "b")])
    rows = [({"rate": 2.0}, analyze(run))]
    table = sweeps.table(rows)
    assert table.styles == ["worse"] and "throttled" in table.note and "needs --slo-ttft-ms" in table.note
    (row,) = csv.DictReader(io.StringIO(sweeps.csv_of(rows)))
    assert row["flags"].split().count("throttled") == 1 and row["failed"] == "2"
    tbt = rows[0][1].summary
    assert float(row["tbt_p99_ms"]) == tbt.tbt_ms.p99 and float(row["mean_tbt_p99_ms"]) == tbt.mean_tbt_ms.p99


def test_points_that_do_not_count_are_on_no_curve_and_curves_go_by_the_options_value() -> None:
    rows = []
    for rate in (8.0, 16.0, 1.0, 2.0, 4.0):
        run = build_run(trials=1, requests=4, flags=[Flag("gate-failed", "3 of 4")] * (rate == 16.0))
        rows.append(({"load.rate": rate}, analyze(run)))
    panel = sweeps.curves(rows).panels[3]
    assert [list(series.x) for series in panel.series] == [[1.0, 2.0, 4.0, 8.0], [16.0]]
    assert panel.series[1].name == "does not count"


def test_difference_that_stands_in_several_places_is_named_once() -> None:
    before, now = ({"load": {"slo_tbt_ms": limit}, "slo": {"slo_tbt_ms": limit}} for limit in (15.0, 20.0))
    assert sweep.differences(before, now) == "slo_tbt_ms 15.0 instead of 20.0"
