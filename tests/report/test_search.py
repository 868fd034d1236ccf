"""`pdbench report` of searches: several answers as one."""

import json
from pathlib import Path

import msgspec
import pytest

from pdbench.search.document import FILE, Closest, Document, Held, Point
from tests.support.processes import ROOT, call_pdbench


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
