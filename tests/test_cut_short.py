"""What Ctrl-C leaves of a point that is not whole yet is named in the last line."""

from pathlib import Path

import pytest
from rich.console import Console

from pdbench import slo_search, sweep
from pdbench.config import Options
from pdbench.errors import UserError


def test_what_was_measured_of_a_point_that_was_cut_short_is_named(tmp_path: Path) -> None:
    """After Ctrl-C its results are there, but its point.json is not: "nothing was measured yet" was untrue."""
    made = sweep.points(Options(), ["concurrency=1,2"])

    def measure(options: Options, folder: Path, part: str) -> list[Path]:
        results = folder / f"{part or 'single'}_results"
        results.mkdir()
        (results / f"{results.name}.json").write_text("{}")
        if options.load.concurrency == stops_at:
            raise KeyboardInterrupt
        return [results]

    stops_at = 1
    assert sweep.saved(tmp_path) == ""
    for parts, name in ((("",), "single_results"), (("replicas",), "replicas_results")):
        out = tmp_path / name
        for stops_at, count in ((1, ""), (2, "1 point is saved")):
            with pytest.raises(KeyboardInterrupt):
                list(sweep.run(made, out, measure, Console(quiet=True), parts=parts))
            words = sweep.saved(out)
            folder = out / made[stops_at - 1].name / name
            assert count in words and f"{folder} has what was measured of a point that was cut short" in words
            assert words.count("_results has") == 1
            if stops_at == 1:
                with pytest.raises(UserError, match=f"no point was measured whole: .*{name} has what was measured"):
                    sweep.load(out)
        stops_at = 0
        assert len(list(sweep.run(made, out, measure, Console(quiet=True), parts=parts))) == 2
        assert sweep.saved(out) == f"2 points are saved in {out}, the same command resumes the sweep"


def test_search_cut_short_in_its_first_load_names_what_it_left(tmp_path: Path) -> None:
    assert slo_search.saved(tmp_path) == ""
    results = tmp_path / "single" / "one-at-a-time" / "single_results"
    results.mkdir(parents=True)
    (results / "single_results.json").write_text("{}")
    assert f"{results} has what was measured" in slo_search.saved(tmp_path)
