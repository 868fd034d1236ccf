"""What is saved can be read again, and nothing else is taken for it."""

from pathlib import Path

import pytest

from pdbench.errors import UserError
from pdbench.records import (
    SCHEMA,
    Clock,
    DeviceRecord,
    DeviceSample,
    RequestError,
    RequestRecord,
    Run,
    Trial,
    load_run,
    save_run,
)


def a_run() -> Run:
    return Run(
        name="disaggregated",
        clock=Clock(monotonic_s=5.0, unix_s=1000.0),
        config={"load": {"seed": 0}},
        host={"name": "host"},
        versions={"vllm": "0.32.0"},
        trials=[Trial(index=0, start_s=0.0, end_s=1.0)],
        requests=[
            RequestRecord(id="a", planned_s=0.0, sent_s=0.1, token_s=[0.2, 0.3], end_s=0.3, text="é 中"),
            RequestRecord(id="b", planned_s=0.0, error=RequestError("refused", "nobody listens")),
        ],
        devices=[
            DeviceRecord(
                id="gpu-0", kind="gpu", name="H200", role="prefill", samples=[DeviceSample(t_s=0.5, power_w=100.0)]
            )
        ],
    )


def test_a_saved_run_is_read_back_whole(tmp_path: Path) -> None:
    run = a_run()
    assert save_run(run, tmp_path).name == "disaggregated_results.json"
    assert (tmp_path / "prefill_gpu_data.json").exists()
    assert load_run(tmp_path) == run


def test_devices_of_an_earlier_run_are_not_this_ones(tmp_path: Path) -> None:
    save_run(a_run(), tmp_path)
    assert load_run(tmp_path).devices
    without = a_run()
    without.devices = []
    save_run(without, tmp_path)
    assert load_run(tmp_path).devices == []


def test_each_request_stands_on_its_own_line(tmp_path: Path) -> None:
    lines = save_run(a_run(), tmp_path).read_text().splitlines()
    assert sum(line.startswith('  {"id":') for line in lines) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": "pdbench/0"}', "measure again"),
        ("[1]", "schema"),
        ('{"schema": "pdbench/1", "name": 3}', "name: 3 is no text"),
        ('{"schema": "pdbench/2", "name": 3}', "name: 3 is no text"),
        ("{", "does not hold a whole run"),
        ("", "does not hold a whole run"),
    ],
)
def test_what_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x_results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_an_empty_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pdbench run"):
        load_run(tmp_path)


def test_the_clock_puts_other_processes_instants_on_the_runs_zero() -> None:
    assert Clock(monotonic_s=5.0, unix_s=1000.0).of_monotonic(7.5) == 2.5


def test_summary_of_an_older_schema_is_not_read(tmp_path: Path) -> None:
    older = a_run()
    older.schema, older.summary = "pdbench/1", {"tbt_ms": {"p99": 1.0}}
    save_run(older, tmp_path)
    older.schema, older.summary = SCHEMA, {}
    assert load_run(tmp_path) == older
