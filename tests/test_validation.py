"""What cannot be is refused in one line that names file, place and remedy, or dropped and flagged; never a wrong figure."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pdbench.analysis.run_analysis import load_analysis
from pdbench.errors import UserError
from pdbench.records import load_devices, load_run, save_run
from tests.support.runs import build_run

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_run(build_run("single", trials=2, requests=3, tokens=4), tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, edit: Change) -> None:
    content = json.loads(path.read_bytes())
    edit(content)
    path.write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_analysis(folder)
    text = str(refused.value)
    assert text.isprintable() and len(text) < 400
    return text


def request(name: str, value: object, index: int = 1) -> Change:
    return lambda run: run["requests"][index].update({name: value})


def trial(name: str, value: object, index: int = 1) -> Change:
    return lambda run: run["trials"][index].update({name: value})


def servers(**change: object) -> Change:
    return lambda run: run.update(
        servers=[{"server": "a", "role": "single", "t_s": [1.0, 2.0], "values": {"waiting": [0.0, None]}} | change]
    )


RESULTS: list[tuple[Change, str]] = [
    (lambda run: run["requests"][1].pop("token_s"), "t0-1: token_s is missing"),
    (request("token_s", []), "t0-1: token_s is empty and output_tokens 4"),
    (request("id", "t0-0"), "t0-0: it is there twice"),
    (lambda run: run["requests"].extend(run["requests"]), "it is there twice"),
    (lambda run: run["requests"][1]["token_s"].reverse(), "t0-1: token_s runs backwards"),
    (lambda run: run["requests"][1]["token_s"].__setitem__(2, 0.5), "t0-1: token_s runs backwards"),
    (request("end_s", -1e9), "request t0-1: end_s: -1000000000.0 cannot be, it is at least -0.1: restore"),
    (request("end_s", 1e308), r"t0-1: end_s: 1e308 cannot be, it is at most 1e\+08"),
    (request("end_s", 2.0), "end_s 2 is before token_s"),
    (request("sent_s", 1e6), "token_s .* is before sent_s 1e\\+06"),
    (request("sent_s", -5), "t0-1: sent_s: -5 cannot be, it is at least -0.1"),
    (request("sent_s", None), "it has token_s and no sent_s"),
    (request("planned_s", 1e308), "t0-1: planned_s: 1e308 cannot be"),
    (request("due_s", -7.5), "t0-1: due_s: -7.5 cannot be"),
    (request("token_s", [1e300, 1e301]), r"t0-1: token_s\[0\]: 1e300 cannot be"),
    (request("token_s", "abc"), 't0-1: token_s: "abc" is no list'),
    (request("token_s", [1, "x"]), r't0-1: token_s\[1\]: "x" is no number'),
    (request("trial", 7), "t0-1: trials has no trial 7"),
    (request("answer_index", 9), "answer_index 9 is no place in token_s"),
    (request("first_tokens", -2), "first_tokens -2 is no count of tokens"),
    (request("token_choice", [0]), "token_choice is not as long as token_s"),
    (request("token_choice", [0, 0, 0, 10**30]), "token_choice holds no numbers of choices"),
    (trial("index", 10**30), r"trial 1000000000000000000000000000000: index: .* cannot be"),
    (
        trial("prefix_cache", {"a": {"role": "single", "prompt_tokens": -1, "cached_tokens": 5}}),
        "trial 1: prefix_cache: a value there cannot be, it is at least 0",
    ),
    (servers(t_s=[3.0, 2.0]), "server a: t_s: they are not in the order of time"),
    (servers(t_s=[1e308, 1e308]), "server a: t_s: 1e\\+308 s is no time"),
    (servers(values={"waiting": [1.0]}), "server a: waiting: it is not as long as t_s"),
    (servers(values={"waiting": [1.0, -1.0]}), "server a: values: a value there cannot be, it is at least 0"),
    (servers(role="\x1b[2J"), "server a: .*is no name"),
    (
        servers(lines=[{"t_s": 1.0, "flag": "x", "text": "a\nb", "meaning": ""}]),
        "server a: lines: .* is no line of a log",
    ),
    (lambda run: run["servers"].extend(2 * [{"server": "b", "role": "single"}]), "server b: it is there twice"),
    (lambda run: run.pop("trials"), "trials has no trial 0"),
    (lambda run: run["trials"].pop(), "trials has no trial 1"),
    (lambda run: run.pop("requests"), "requests: there are none, and 2 trials"),
    (trial("start_s", 0.0), "trials 0 and 1: they overlap|trials 1 and 0: they overlap"),
    (trial("end_s", 3.0), "trial 1: its end_s 3 is before its start_s"),
    (trial("end_s", 1e308), "trial 1: end_s: 1e308 cannot be"),
    (trial("index", 0), "trial 0: it is there twice"),
    (lambda run: run.update(name="../../../pwned"), "name is '../../../pwned'"),
    (lambda run: run.update(name="<b>x</b>"), "name is '<b>x</b>'"),
    (lambda run: run.update(name=""), "name is ''"),
    (lambda run: run.update(roles={"../x": []}), "a role is '../x'"),
    (lambda run: run.update(run_id="../../x"), r'run_id: "../../x" cannot be \(.* matching regex'),
    (lambda run: run.update(revision=-3), "revision: -3 cannot be, it is at least 0"),
    (
        lambda run: run.update(revision=10**30),
        r"revision: 1000000000000000000000000000000 cannot be, it is at most 1e\+09",
    ),
    (lambda run: run["clock"].update(unix_s=1e308), "clock.unix_s: 1e308 cannot be"),
    (lambda run: run["config"].update(load=[1]), "config.load: a value there is no object"),
    (lambda run: run["config"]["load"].update(slo_ttft_ms="fast"), 'config.load: slo_ttft_ms: "fast" is no number'),
    (lambda run: run["config"]["load"].update(rate={}), "config.load: rate: a value there is no number"),
    (lambda run: run["config"]["load"].update(endpoint=[]), "config.load: endpoint: a value there is no text"),
    (lambda run: run["config"].update(inputs=3), "config.inputs: 3 is no list"),
    (lambda run: run["config"].update(contents=3), "config.contents: 3 is no "),
    (lambda run: run["host"].update(gpus=["H200"]), r'host.gpus: \[0\]: "H200" is no object'),
    (lambda run: run.update(schema="pdbench/9"), "has schema pdbench/9"),
    (lambda run: run.update(schema=None), "has schema"),
    (lambda run: run.update(flags=[1]), r"flags\[0\]: 1 is no object"),
]


@pytest.mark.parametrize(("edit", "message"), RESULTS, ids=[message[:40] for _, message in RESULTS])
def test_results_that_cannot_be_are_refused_in_one_line(folder: Path, edit: Change, message: str) -> None:
    change(folder / "single_results.json", edit)
    with pytest.raises(UserError, match=message) as refused:
        load_run(folder)
    assert "single_results.json" in str(refused.value)
    assert any(word in refusal(folder) for word in ("measure again", "write 1 to 80"))


def sample(name: str, value: object) -> Change:
    return lambda file: file["devices"][0]["samples"][2].update({name: value})


DEVICES: list[tuple[Change, str]] = [
    (sample("t_s", 0.1), "device gpu0: samples: they are not in the order of time"),
    (sample("t_s", 1e308), "device gpu0: samples: 1e\\+308 s is no time"),
    (sample("power_w", -5.0), r"device gpu0: samples\[2\].power_w: -5.0 cannot be, it is at least 0: restore"),
    (sample("power_average_w", 1e9), r"power_average_w: 1000000000.0 cannot be, it is at most 1e\+06"),
    (sample("sm_clock_mhz", 1e308), "sm_clock_mhz"),
    (sample("temperature_c", -1e20), "temperature_c"),
    (sample("energy_j", -1.0), "energy_j: -1.0 cannot be"),
    (lambda file: file["devices"][0].update(energy_ticks=[[3, 1], [2, 5]]), "energy_ticks: they are not in the order"),
    (
        lambda file: file["devices"][0].update(fine_power=[[1, 5], [2, -5]]),
        r"device gpu0: fine_power\[1\]\[1\]: -5 cannot be",
    ),
    (lambda file: file["devices"][0].update(fine_power=[[2, 5], [1, 5]]), "fine_power: they are not in the order"),
    (
        lambda file: file["devices"][0].update(idle_power_w={"bare": -1}),
        "idle_power_w: a value there cannot be, it is at least 0",
    ),
    (lambda file: file["devices"][0].update(id="a\nb"), r"id: 'a\\nb' is no name"),
    (lambda file: file["devices"][0].update(host=""), "host: '' is no name"),
    (lambda file: file["devices"].extend(file["devices"]), "device gpu0: it is there twice"),
    (lambda file: file.update(schema="pdbench/9"), "has schema pdbench/9"),
    (lambda file: file.pop("devices"), "holds no device samples"),
    (lambda file: file.update(run_id="0123abcd"), r"is of run 0123abcd \(saving 1\) and single_results.json of run"),
    (lambda file: file.update(revision=0), r"\(saving 0\) and single_results.json of run .* \(saving 1\): restore"),
    (lambda file: file.pop("run_id"), "is of a run without an id and single_results.json of run"),
]


@pytest.mark.parametrize(("edit", "message"), DEVICES, ids=[message[:40] for _, message in DEVICES])
def test_device_files_that_cannot_be_are_refused_in_one_line(folder: Path, edit: Change, message: str) -> None:
    change(folder / "single_gpu_data.json", edit)
    with pytest.raises(UserError, match=message):
        load_run(folder)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("name", ["single_results.json", "single_gpu_data.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "does not hold a whole run|holds no device samples"),
        (lambda path: path.write_bytes(b""), "does not hold a whole run|holds no device samples"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "is packed with gzip: unpack it"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"single", b"\xff\xfe")), "utf-8"),
        (lambda path: path.write_bytes(b"[" * 200_000), "measure again|holds no device samples"),
        (lambda path: path.write_bytes(b'{"schema":"pdbench/2","config":' + b'{"a":' * 200_000), "does not|holds no"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot read .*: Is a directory"),
    ],
    ids=["half", "empty", "gzip", "no UTF-8", "deep", "deep options", "folder"],
)
def test_file_that_is_none_of_ours_is_refused_in_one_line(
    folder: Path, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder / name)
    with pytest.raises(UserError, match=message):
        load_run(folder)
    assert name in refusal(folder)


def test_nan_is_no_json_and_refused(folder: Path) -> None:
    change(folder / "single_results.json", request("end_s", float("nan")))
    assert "does not hold a whole run" in refusal(folder)


def test_server_counts_that_cannot_be_are_dropped_and_flagged(folder: Path) -> None:
    path = folder / "single_results.json"
    change(path, lambda run: run["requests"][0].update(prompt_tokens=-5, output_tokens=10**30))
    change(path, lambda run: run["requests"][1].update(phases={"prefill": [5.0, 4.0], "queue": [-1e300, 4.0]}))
    run = load_run(folder)
    assert run.requests[0].prompt_tokens is None and run.requests[0].output_tokens is None
    assert run.requests[1].phases == {"prefill": None, "queue": None}
    (flag,) = (flag for flag in load_analysis(folder).flags if flag.name == "impossible-values")
    assert "prompt_tokens of 1 requests, output_tokens of 1 requests" in flag.detail


@pytest.mark.parametrize("ticks", [False, True])
def test_counter_that_falls_and_recovers_is_flagged_and_not_counted(tmp_path: Path, ticks: bool) -> None:
    save_run(build_run("single", trials=1), tmp_path)
    before = load_analysis(tmp_path).summary.energy.total_j

    def fall(file: dict[str, Any]) -> None:
        (device,) = file["devices"]
        if ticks:
            device["energy_ticks"] = [[sample["t_s"], sample["energy_j"]] for sample in device["samples"]]
            device["energy_ticks"][30][1] = 0.0
        else:
            device["samples"][30]["energy_j"] = 0.0

    change(tmp_path / "single_gpu_data.json", fall)
    after = load_analysis(tmp_path)
    assert after.summary.energy.total_j == pytest.approx(before, rel=0.05)
    (flag,) = (flag for flag in after.flags if flag.name == "energy-counter-impossible")
    assert flag.detail.startswith("gpu0: the energy counter falls by")


def test_counter_that_was_reset_still_counts(tmp_path: Path) -> None:
    run = build_run("single", trials=1)
    samples = run.devices[0].samples
    start_j = samples[30].energy_j or 0.0
    for sample in samples[30:]:
        sample.energy_j = (sample.energy_j or 0.0) - start_j
    save_run(run, tmp_path)
    assert "energy-counter-reset" in {flag.name for flag in load_analysis(tmp_path).flags}


def test_device_files_of_another_run_are_refused_naming_both(folder: Path, tmp_path: Path) -> None:
    other = build_run("single", trials=2, requests=3, tokens=4, seed=1)
    save_run(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "single_gpu_data.json", folder)
    run_id = json.loads((folder / "single_results.json").read_bytes())["run_id"]
    text = refusal(folder)
    assert other.run_id in text and run_id in text and "restore the file that belongs to it" in text


def test_device_file_beside_those_of_a_run_is_refused(folder: Path) -> None:
    shutil.copy(folder / "single_gpu_data.json", folder / "more_gpu_data.json")
    change(folder / "more_gpu_data.json", lambda file: file.update(run_id="0123abcd"))
    assert "more_gpu_data.json is of run 0123abcd" in refusal(folder)


def test_results_of_two_runs_in_a_folder_are_refused_naming_both(folder: Path, tmp_path: Path) -> None:
    save_run(build_run(trials=1, requests=2), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "disaggregated_results.json", folder)
    text = refusal(folder)
    assert "disaggregated_results.json of run" in text and "single_results.json of run" in text


def test_missing_device_file_is_refused_and_all_missing_are_flagged(tmp_path: Path) -> None:
    save_run(build_run(trials=1, requests=2), tmp_path)
    (tmp_path / "decode_gpu_data.json").unlink()
    assert "lacks decode_gpu_data.json of run" in refusal(tmp_path)
    (tmp_path / "prefill_gpu_data.json").unlink()
    analysis = load_analysis(tmp_path)
    assert "device-files-missing" in {flag.name for flag in analysis.flags}
    assert analysis.summary.energy.total_j is None


def test_analysis_of_another_run_is_made_again(folder: Path, tmp_path: Path) -> None:
    save_run(build_run("single", trials=2, requests=3, tokens=4, ttft_ms=500.0), tmp_path / "other")
    load_analysis(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "analysis.json", folder)
    ttft = load_analysis(folder).summary.ttft_ms
    assert ttft is not None and ttft.mean < 100
    assert json.loads((folder / "analysis.json").read_bytes())["run_id"] == load_run(folder).run_id


@pytest.mark.parametrize("schema", ["pdbench/1", "pdbench/2"])
def test_runs_without_an_id_are_read_as_before(folder: Path, schema: str) -> None:
    run = load_run(folder)

    def older(content: dict[str, Any]) -> None:
        for name in ("run_id", "revision", "device_files"):
            content.pop(name, None)
        content["schema"] = schema

    for path in folder.glob("*.json"):
        change(path, older)
    found = load_run(folder)
    assert found.run_id is None and found.requests == run.requests and found.devices == run.devices
    assert load_devices(folder / "single_gpu_data.json") == run.devices


def test_folder_that_holds_no_results_names_what_it_holds(folder: Path, tmp_path: Path) -> None:
    assert "name the results folder that it lies in" in refusal(folder / "single_results.json")
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "single_results.json.gz").write_bytes(b"\x1f\x8b")
    assert "unpack single_results.json.gz" in refusal(packed)
    assert "pdbench run" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("single_results.json", lambda run: run["requests"].pop()),
        ("single_results.json", request("output_tokens", 40)),
        ("single_results.json", lambda run: run["config"]["load"].update(slo_ttft_ms=1.0)),
        ("host_gpu_data.json", lambda file: file["devices"][0]["samples"].pop()),
    ],
)
def test_file_that_somebody_changed_is_flagged(folder: Path, name: str, edit: Change) -> None:
    path = folder / name if name.startswith("single") else next(folder.glob("*_gpu_data.json"))
    change(path, edit)
    (flag,) = (flag for flag in load_analysis(folder).flags if flag.name == "edited")
    assert flag.detail.startswith(f"{path.name} changed after pdbench wrote it")


def test_other_line_ends_and_files_of_before_are_no_change(folder: Path) -> None:
    results = folder / "single_results.json"
    written = results.read_bytes()
    for saved in (written.replace(b"\n", b"\r\n"), written[: written.rindex(b',\n "checksum"')] + b"\n}\n"):
        results.write_bytes(saved)
        assert "edited" not in {flag.name for flag in load_analysis(folder).flags}


def test_edited_copy_beside_the_results_is_refused(folder: Path) -> None:
    shutil.copy(folder / "single_results.json", folder / "before_results.json")
    load_run(folder)
    change(folder / "single_results.json", request("output_tokens", 40))
    assert "give each run a folder of its own" in refusal(folder)
