"""What compare, report and the end of a measurement write, print and return."""

import csv
import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pdbench.analysis import run_analysis
from pdbench.analysis.run_analysis import analyze
from pdbench.errors import UserError
from pdbench.records import load_run, save_run
from pdbench.report import commands, mpl, tables, text
from tests.support.processes import ROOT
from tests.support.reports import gate
from tests.support.runs import build_run


def test_report_leaves_page_markdown_csv_and_pictures(folders, tmp_path):
    commands.report(folders, tmp_path, None, Console(file=io.StringIO(), width=200))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"report.html", "report.md", "requests.csv", "performance_comparison.png"} <= names
    assert "disaggregated_performance_analysis.png" in names
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 1 + 96
    markdown = (tmp_path / "report.md").read_text()
    assert "client-limited" in markdown and "3 of 48 requests failed: timeout 3" in markdown


@pytest.mark.usefixtures("undrawn")
def test_report_leaves_nothing_of_an_earlier_call(folders, tmp_path):
    """But what was measured or put there by others, whatever a list in a folder from elsewhere says."""
    out, console = tmp_path / "out", Console(file=io.StringIO(), width=200)
    commands.report(folders, out, None, console, llm_d=True)
    for name in ("notes.md", "a_results.json"):
        (out / name).write_text("kept")
    (tmp_path / "outside.png").write_text("kept")
    with (out / ".report-files").open("a") as listing:
        listing.write("\na_results.json\n../outside.png")
    name = analyze(load_run(folders[0])).name
    commands.report(folders[:1], out, None, console)
    own = {"report.html", "report.md", "requests.csv", f"{name}_performance_analysis.png"}
    assert {path.name for path in out.iterdir()} == own | {"notes.md", "a_results.json", ".report-files"}
    assert (tmp_path / "outside.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_markdown_and_page_say_what_differs_between_the_runs(tmp_path):
    for name, load in (("single", {"concurrency": 1}), ("disaggregated", {"concurrency": 4})):
        save_run(build_run(name, load=load, trials=2), tmp_path / name)
    commands.report([tmp_path / "single", tmp_path / "disaggregated"], tmp_path, None, Console(file=io.StringIO()))
    differs = "load, concurrency: 1 against 4"
    assert f"**differs:** {differs}" in (tmp_path / "report.md").read_text()
    assert differs in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_brackets_in_a_path_are_no_markup(folders, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    commands.report(folders[:1], tmp_path / "r [bold]", None, console)
    assert f"{tmp_path}/r [bold]/report.html" in console.file.getvalue()


def test_runs_of_one_name_are_named_by_their_folders(tmp_path):
    folders = [tmp_path / "sweep" / point / "single_results" for point in ("concurrency=1", "concurrency=2")]
    runs = [analyze(build_run("single", trials=1, requests=2))] * 3
    names = commands.names_of(runs[:2], folders)
    rows = [tables.of_run(name, tables.requests_csv(run)) for name, run in zip((*names, 'a "b", c'), runs, strict=True)]
    found = [{cell[0] for cell in csv.reader(io.StringIO(each))} for each in rows]
    assert found == [{names[0]}, {names[1]}, {'a "b", c'}]
    assert names == ["concurrency=1_single_results", "concurrency=2_single_results"]
    assert commands.names_of(runs[:1], folders[:1]) == ["single"]
    assert len(set(commands.names_of(runs, [*folders, folders[0]]))) == 3


def test_runs_of_one_deployment_are_named_by_their_instances_where_these_differ(tmp_path):
    runs = [analyze(build_run("disaggregated", trials=1, requests=2)) for _ in range(3)]
    for run, (prefill, decode) in zip(runs, [(3, 1), (2, 2), (2, 2)], strict=True):
        run.config["serve"] = {"prefill_instances": prefill, "decode_instances": decode}
    folders = [tmp_path / name / "disaggregated_results" for name in "abc"]
    assert commands.names_of(runs[:2], folders[:2]) == ["3P1D", "2P2D"]
    assert commands.names_of(runs, folders) == ["3P1D", "b_disaggregated_results", "c_disaggregated_results"]


@pytest.mark.usefixtures("undrawn")
def test_every_run_of_a_report_has_a_picture_of_its_own(tmp_path):
    folders = [tmp_path / name for name in ("a?", "a*", "a_ 1", "l" * 250, "a!")]
    for folder in folders:
        save_run(build_run("single", trials=1, requests=2), folder)
    commands.report(folders[:4], tmp_path / "one", None, Console(file=io.StringIO()))
    assert len([*(tmp_path / "one").glob("*_performance_analysis.png")]) == 4
    commands.report([folders[0], folders[1], tmp_path / "a!"], tmp_path / "two", None, Console(file=io.StringIO()))
    assert len([*(tmp_path / "two").glob("*_performance_analysis.png")]) == 3
    assert ".0," not in (tmp_path / "two" / "requests.csv").read_text()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("gpu-0,gpu,H200,nan", "nan s is no time of a run"),
        ("gpu-0,gpu,H200,2\ngpu-0,gpu,H200,1", "not in the order of time"),
        ("gpu-0,gpu,H200,x", "is not monitor's CSV"),
        ("gpu-0,gpu,H200,1,-5", r'device gpu-0, row 1: power_w: "-5" cannot be, it is at least 0'),
        ("gpu-0", "is not monitor's CSV"),
    ],
)
def test_samples_of_a_csv_that_cannot_be_are_refused(tmp_path, rows, message):
    (tmp_path / "m.csv").write_text(f"device,kind,name,t_s,power_w\n{rows}\n")
    with pytest.raises(UserError, match=message):
        commands.plot(tmp_path / "m.csv", None, Console(file=io.StringIO()))


def test_a_name_from_a_file_does_not_choose_the_folder(tmp_path):
    run = build_run("single", trials=1, requests=2)
    save_run(run, tmp_path / "run")
    saved = tmp_path / "run" / "single_results.json"
    saved.write_text(saved.read_text().replace('"name": "single"', '"name": "../../outside"'))
    with pytest.raises(UserError, match=r"single_results.json: name is '../../outside'"):
        commands.report([tmp_path / "run"], tmp_path / "a" / "report", None, Console(file=io.StringIO()))
    assert not [*tmp_path.rglob("*outside*")]


def test_one_measurement_is_analyzed_and_drawn_once_and_read_from_no_disk(tmp_path, monkeypatch):
    runs = {tmp_path / f"{run.name}_results": run for run in (build_run("single"), build_run())}
    for folder, run in runs.items():
        save_run(run, folder)
    calls = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: (calls.append(name), function(*arguments))[1])

    for module, name in (
        (commands, "analyze"),
        (mpl, "performance_analysis"),
        (mpl, "comparison"),
        (run_analysis, "timings_of"),
    ):
        counted(module, name)
    monkeypatch.setattr("pdbench.records.load_run", None)
    monkeypatch.setattr(run_analysis, "load_run", None)
    console = Console(file=io.StringIO(), width=200)
    analyses = commands.finish(runs, tmp_path, console)
    assert [analysis.name for analysis in analyses] == ["single", "disaggregated"]
    assert {name: calls.count(name) for name in calls} == {
        "analyze": 2, "timings_of": 2, "performance_analysis": 2, "comparison": 1,
    }  # fmt: skip
    monkeypatch.undo()
    for analysis, folder in zip(analyses, runs, strict=True):
        assert load_run(folder).summary["ttft_ms"]["p50"] == analysis.summary.ttft_ms.p50
        assert (folder / "analysis.json").exists() and (folder / f"{analysis.name}_performance_analysis.png").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"performance_comparison.png", "report"}
    assert (tmp_path / "report" / "report.html").exists()
    assert "TTFT p50" in console.file.getvalue() and "results: " in console.file.getvalue()


def test_flags_with_which_figures_do_not_count_are_errors():
    commands.exit_on_flags([analyze(build_run(trials=1, requests=2))])
    with pytest.raises(UserError, match="gate-failed: none equal"):
        commands.exit_on_flags([analyze(build_run(trials=1, requests=2, gate=gate(False, "none equal")))])


@pytest.mark.usefixtures("undrawn")
def test_condition_on_a_run_whose_figures_do_not_count_is_refused(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, passed in zip(paths, (True, False), strict=True):
        save_run(build_run("single", requests=4, gate=gate(passed, "as it was")), path)
    console, picture = Console(file=io.StringIO(), width=200), tmp_path / "picture.png"
    with pytest.raises(UserError, match=r"--fail-if: .*b: gate-failed: as it was"):
        commands.compare_folders(paths, ["ttft_p50_ms > +500%"], False, picture, console)
    assert commands.compare_folders(paths, ["ttft_p50_ms > +500%"], True, picture, console) == 0
    assert commands.compare_folders(paths, [], False, picture, console) == 0


def test_condition_on_a_run_of_which_many_requests_failed_is_refused(tmp_path):
    """What failed at once makes the others fast: no success for CI."""
    for name, failed in (("a", 0), ("b", 4)):
        save_run(build_run("single", requests=8, failed=failed), tmp_path / name)
    given = ["e2e_p50_ms > +500%"], False, tmp_path / "picture.png", Console(file=io.StringIO())
    with pytest.raises(UserError, match=r"--fail-if: .*b: requests-failed: 12 of 24 requests failed"):
        commands.compare_folders([tmp_path / "a", tmp_path / "b"], *given)


def test_comparison_of_a_run_with_itself_is_refused(tmp_path):
    save_run(build_run("single", requests=4), tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for other in ("a", "copy"):
        with pytest.raises(UserError, match=r"hold the same run, .*name it once"):
            given = ["e2e_p50_ms > +5%"], False, tmp_path / "picture.png", Console(file=io.StringIO())
            commands.compare_folders([tmp_path / "a", tmp_path / other], *given)
        with pytest.raises(UserError, match=r"hold the same run, .*name it once"):
            commands.report([tmp_path / "a", tmp_path / other], tmp_path / "report", None, Console(file=io.StringIO()))
    assert not (tmp_path / "report").exists()
    old = tmp_path / "old"
    old.mkdir()
    # Saved before runs had ids.
    shutil.copy(ROOT / "tests/data/recorded_single_cpu_results.json", old / "single_results.json")
    with pytest.raises(UserError, match=r"hold the same run, .*name it once"):
        commands.compare_folders([old, tmp_path / "a" / ".." / "old"], *given)


def test_unknown_metric_of_a_condition_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match=r"no metric tbt_p98_ms; there are ttft_p50_ms, .*mean_power_w"):
        commands.compare_folders([tmp_path, tmp_path], ["tbt_p98_ms > +5%"], False, tmp_path / "picture.png", Console())


def test_folder_without_results_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.compare_folders([], [], False, tmp_path / "picture.png", console)
    with pytest.raises(UserError, match="run_disaggregated_test"):
        commands.report([], tmp_path / "report", None, console)
    with pytest.raises(UserError, match="two results folders"):
        commands.compare_folders([tmp_path], [], False, tmp_path / "picture.png", console)


@pytest.mark.usefixtures("undrawn")
def test_without_folders_all_deployments_that_were_measured_here_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("replicas", "disaggregated"):
        save_run(build_run(kind), tmp_path / f"{kind}_results")
    console = Console(file=io.StringIO(), width=200)
    commands.report([], tmp_path / "report", None, console)
    assert "## disaggregated against replicas" in (tmp_path / "report" / "report.md").read_text()
    assert commands.compare_folders([], [], True, tmp_path / "picture.png", console) == 0
    assert "disaggregated against replicas" in console.file.getvalue()


@pytest.mark.usefixtures("undrawn")
def test_compare_returns_the_exit_code_of_the_conditions(folders, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    assert commands.compare_folders(folders, ["ttft_p50_ms > +5%"], True, tmp_path / "picture.png", console) == 1
    assert re.search(r"fails ttft_p50_ms > \+5%: \+\d+\.\d %, 95 % interval \+", console.file.getvalue())
    with text.language("zh"):
        assert commands.compare_folders(folders, ["tbt_p50_ms > +500%"], True, tmp_path / "picture.png", console) == 0
    assert "合格 tbt_p50_ms" in console.file.getvalue()


@pytest.mark.usefixtures("undrawn")
def test_picture_that_cannot_be_written_takes_no_verdict_away(folders, tmp_path):
    console, nowhere = Console(file=io.StringIO(), width=200), Path("/proc/picture.png")
    assert commands.compare_folders(folders, ["ttft_p50_ms > +5%"], True, nowhere, console) == 1
    assert (
        "fails ttft_p50_ms" in console.file.getvalue()
        and "no picture: cannot write /proc/picture.png" in console.file.getvalue()
    )
    with pytest.raises(UserError, match=r"/proc/picture\.png"):
        commands.compare_folders(folders, [], True, nowhere, console)
    with pytest.raises(UserError, match=r"--picture p\.pdf: pictures are PNG files"):
        commands.compare_folders(folders, [], True, Path("p.pdf"), console)
