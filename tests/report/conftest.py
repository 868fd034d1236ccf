"""Two saved runs that share their host and load, and their analyses."""

import pytest

from pdbench.analysis.run_analysis import load_analysis
from pdbench.records import Flag, save_run
from tests.support.runs import build_run


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    runs = [
        build_run("single", ttft_ms=20, tbt_ms=3.3),
        build_run(tbt_ms=1.5, seed=2, failed=1, flags=[Flag("client-limited", "a < b & c")]),
    ]
    for run in runs:
        save_run(run, place / f"{run.name}_results")
    return [place / f"{run.name}_results" for run in runs]


@pytest.fixture(scope="session")
def analyses(folders):
    return [load_analysis(folder) for folder in folders]
