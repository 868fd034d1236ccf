"""Two saved runs that share their host and load, and their analyses."""

import numpy as np
import pytest

from pdbench.analysis.run_analysis import load_analysis
from pdbench.events import LogLine, ServerSeries
from pdbench.records import Flag, save_run
from tests.support.runs import build_run


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    runs = [
        build_run("single", ttft_ms=20, tbt_ms=3.3),
        build_run(tbt_ms=1.5, seed=2, failed=1, flags=[Flag("client-limited", "a < b & c")]),
    ]
    trials = runs[1].trials
    t_s = [at for each in trials for at in np.linspace(each.start_s - 0.5, each.end_s + 0.5, 20).tolist()]
    counted = {"running": [2.0] * 60, "waiting": list(range(60)), "kv_used": [0.5] * 50 + [0.99] * 10}
    counted |= {"preemptions": [0] * 50 + [4] * 10, "queued": list(range(60)), "queued_s": [n / 10 for n in range(60)]}
    line = LogLine(
        t_s=trials[0].start_s + 0.1,
        flag="server-error",
        text="ValueError: a < b",
        meaning="its log says more around this line",
    )
    runs[1].servers = [
        ServerSeries(server=f"decode-{n}", role="decode", t_s=t_s, values=counted, lines=[line]) for n in (0, 1)
    ]
    for run in runs:
        save_run(run, place / f"{run.name}_results")
    return [place / f"{run.name}_results" for run in runs]


@pytest.fixture(scope="session")
def analyses(folders):
    return [load_analysis(folder) for folder in folders]
