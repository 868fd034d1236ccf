"""The figures of the recorded runs, frozen: a change of the code must not change a number that was published."""

import json
import tarfile
from pathlib import Path

import msgspec
import pytest

from pdbench.analysis.run_analysis import RunAnalysis, analyze, load_analysis
from pdbench.records import Run

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/data/golden_summary.json").read_text())
ROUNDED = 0.51e-4
"""Half of the last digit that the golden file keeps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def analyses(folder) -> dict[str, RunAnalysis]:
    by_name = {}
    for name in GOLDEN:
        result, _, deployment = name.partition("/")
        if not deployment:
            saved = (ROOT / "tests/data/recorded_single_cpu_results.json").read_bytes()
            by_name[name] = analyze(msgspec.json.decode(saved, type=Run))
            continue
        if not (folder / result).exists():
            with tarfile.open(ROOT / "docs/results" / result / "runs.tar.xz") as runs:
                runs.extractall(folder / result, filter="data")
        by_name[name] = load_analysis(folder / name)
    return by_name


def assert_equal(actual: object, golden: object, where: str) -> None:
    """The golden value, or part of it, inside the actual one."""
    if isinstance(golden, dict):
        assert isinstance(actual, dict), where
        for key, value in golden.items():
            assert_equal(actual.get(key), value, f"{where}.{key}")
    elif isinstance(golden, float):
        assert actual == pytest.approx(golden, rel=1e-9, abs=ROUNDED), where
    else:
        assert actual == golden, where


@pytest.mark.parametrize("name", GOLDEN)
def test_summary_of_recorded_run_keeps_its_numbers(analyses, name):
    summary = msgspec.to_builtins(analyses[name].summary)
    golden = GOLDEN[name]["summary"]
    same = [key for key in golden if key not in ("energy", "attribution", "efficiency", "devices")]
    assert_equal(summary, {key: golden[key] for key in same}, name)
    energy, split, bought = golden["energy"], golden["attribution"], golden["efficiency"]
    assert_equal(
        summary["energy"],
        {key: value for key, value in energy.items() if key != "by_role_j"}
        | {key: split[key] for key in ("j_per_computed_prompt_token", "decode_j_per_output_token")}
        | {key: value for key, value in bought.items() if key != "output_tokens_per_s_per_device"},
        f"{name} energy",
    )
    assert {role: item["total_j"] for role, item in summary["energy"]["roles"].items()} == pytest.approx(
        energy["by_role_j"], abs=ROUNDED
    )
    assert (summary["energy"]["not_split"] is None) == (split["why_no_split"] is None)


@pytest.mark.parametrize("name", GOLDEN)
def test_role_energy_of_recorded_run_keeps_its_numbers(analyses, name):
    roles = analyses[name].summary.energy.roles
    for role, golden in GOLDEN[name]["summary"]["attribution"]["roles"].items():
        phase = golden["phase"] or {"active_j": golden["active_j"], "idle_j": golden["idle_j"]}
        assert_equal(
            msgspec.to_builtins(roles[role]),
            {
                **{key: golden[key] for key in ("devices", "window_s", "total_j", "idle_power_w")},
                **{key: golden[key] for key in ("waiting_s", "waiting_j")},
                "active_j": phase["active_j"],
                "idle_j": phase["idle_j"],
                "phase_s": phase.get("busy_s"),
                "phase_j": phase.get("energy_j"),
            },
            f"{name} {role}",
        )
    handoff, transfers = GOLDEN[name]["summary"]["attribution"]["handoff"], analyses[name].summary.energy.kv_transfer
    if handoff is not None:
        golden_transfers = (handoff["bytes"], handoff["active_j"], handoff["why"])
        assert (transfers.bytes, transfers.active_j, transfers.not_measured) == golden_transfers
        assert transfers.alone_s == pytest.approx(handoff["apart_s"], abs=1e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_devices_of_recorded_run_keep_their_numbers(analyses, name):
    for identity, golden in GOLDEN[name]["summary"]["devices"].items():
        device = msgspec.to_builtins(analyses[name].summary.devices[identity])
        assert_equal(
            device, {key: golden[key] for key in ("name", "kind", "role", "samples", "not_measured")}, identity
        )
        energy = golden["energy"] | {"energy_j": golden["energy"]["total_j"]}
        del energy["total_j"]
        assert_equal(device["energy"], energy, identity)
        readings = {key: value for key, value in golden.items() if isinstance(value, dict) and "mean" in value}
        if "power_w" in readings:  # the samples' own mean was up to 0.7 % from it
            readings["power_w"] |= {"mean": energy["mean_power_w"]}
        assert_equal(device["readings"], readings, identity)


@pytest.mark.parametrize("name", GOLDEN)
def test_pooled_metrics_parts_and_flags_of_recorded_run_keep_their_numbers(analyses, name):
    analysis = analyses[name]
    assert {key: figure.value for key, figure in analysis.figures.items()} == pytest.approx(GOLDEN[name]["figures"])
    parts = GOLDEN[name]["ttft_parts_ms"]
    assert analysis.curves.ttft_parts_ms == (None if parts is None else pytest.approx(parts))
    assert sorted({flag.name for flag in analysis.flags}) == GOLDEN[name]["flags"]


def test_saved_analysis_of_recorded_run_is_read_back_equal(analyses, folder):
    again = load_analysis(folder / "h200x2-p2p-nccl" / "single_results")
    assert again.source and again.summary == analyses["h200x2-p2p-nccl/single_results"].summary
    assert again.figures == analyses["h200x2-p2p-nccl/single_results"].figures
