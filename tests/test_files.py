"""Files of a run are swapped in as one, whatever happens on the way; a folder has one writer; names stay in their folder."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pdbench import files
from pdbench.errors import UserError, WriteError
from pdbench.files import check_name, check_writable, hold, tidy, write_whole
from pdbench.records import Run, load_run, save_run
from tests.support.processes import ROOT
from tests.support.runs import build_run

STEPS = """
import os, signal, sys
from pathlib import Path
from pdbench.records import save_run
from tests.support.runs import build_run

folder, name, fatal, passed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), 0

def step(original):
    def call(*arguments, **options):
        global passed
        if folder in arguments[0].parents:
            if passed == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            passed += 1
        return original(*arguments, **options)
    return call

for method in ("open", "replace", "unlink"):
    setattr(Path, method, step(getattr(Path, method)))
run = build_run(name, trials=1, requests=3, seed=1)
save_run(run, folder)
print(passed)
"""


def saved(folder: Path, name: str = "disaggregated", seed: int = 0) -> Run:
    run = build_run(name, trials=1, requests=2, seed=seed)
    save_run(run, folder)
    return load_run(folder)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


def save_killed_at(step: int, folder: Path, name: str) -> int:
    """Save another run in a process that is killed before its `step`-th change of a file; returns its exit code."""
    command = [sys.executable, "-c", STEPS, str(folder), name, str(step)]
    return subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode


def test_a_run_killed_at_any_step_of_its_saving_leaves_one_whole_run(tmp_path: Path) -> None:
    kept = set()
    for step in range(40):
        old = saved(tmp_path)
        code = save_killed_at(step, tmp_path, "disaggregated")
        assert code in (-signal.SIGKILL, 0)
        found = load_run(tmp_path)
        assert found == old or (found.run_id != old.run_id and len(found.requests) == 3)
        assert [device.role for device in found.devices] == ["decode", "prefill"]
        kept.add(found == old)
        after = saved(tmp_path, seed=2)
        assert load_run(tmp_path) == after and leftovers(tmp_path) == []
        if code == 0:
            break
    assert kept == {True, False} and step > 5


def test_device_files_of_the_earlier_run_do_not_count_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "single_results"
    old = build_run("single", trials=1, requests=2)
    old.devices[0].role = "other"
    save_run(old, folder)
    seen = set()
    for step in range(20):
        code = save_killed_at(step, folder, "single")
        found = load_run(folder)
        assert [device.role for device in found.devices] == ["other" if found.run_id == old.run_id else "single"]
        seen.add(found.run_id == old.run_id)
        if code == 0:
            break
        save_run(old, folder)
    assert seen == {True, False}


@pytest.mark.parametrize("limit", [0, 100, 3_000, 20_000, 60_000])
def test_a_full_disk_leaves_the_earlier_run_whole(tmp_path: Path, limit: int) -> None:
    old = saved(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*File too large; make room"):
            save_run(build_run(trials=2, requests=50, seed=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert load_run(tmp_path) == old
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_reader_sees_whole_runs_while_others_are_swapped_in(tmp_path: Path) -> None:
    runs = [saved(tmp_path, seed=seed) for seed in range(2)]
    ended = threading.Event()

    def save() -> None:
        while not ended.is_set():
            for run in runs:
                save_run(run, tmp_path)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        until_s = time.monotonic() + 1.5
        while time.monotonic() < until_s:
            found = load_run(tmp_path)
            tokens = {run.run_id: run.devices[0].samples for run in runs}
            assert found.devices[0].samples == tokens[found.run_id]
    finally:
        ended.set()
        writer.join()


def test_temporary_file_of_a_dead_writer_is_removed_and_of_a_live_one_stays(tmp_path: Path) -> None:
    writing = (
        "import os, sys, time\nfrom pathlib import Path\nfrom pdbench import files\n"
        "file, path = files._temporary(Path(sys.argv[1]))\nprint(path, flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", writing, str(tmp_path / "a.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        temporary = Path(writer.stdout.readline().strip())
        write_whole(tmp_path / "b.json", b"b")
        assert temporary.exists()
        writer.kill()
    write_whole(tmp_path / "b.json", b"b")
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_folder_that_another_process_holds_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holding = "import sys\nfrom pathlib import Path\nfrom pdbench.files import hold\nwith hold(Path(sys.argv[1])):\n print(flush=True)\n input()"
    command = [sys.executable, "-c", holding, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match=r"another pdbench measures into .*/out: wait for its end, or give another"):
            with hold(folder):
                pass
        holder.kill()  # a killed one holds nothing
    with hold(folder), hold(tmp_path / "." / "out"):
        saved(folder / "disaggregated_results")
        assert load_run(folder / "disaggregated_results").requests
    assert leftovers(tmp_path) == []


def test_folder_that_got_no_file_is_not_left_behind(tmp_path: Path) -> None:
    with hold(tmp_path / "a" / "b"):
        check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "c")
    assert [*tmp_path.iterdir()] == []
    with hold(tmp_path):
        pass
    assert tmp_path.exists()


def test_folder_that_cannot_be_held_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "in", Path("/proc/nothing/here"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="give --out a folder that you may write"):
            with hold(folder):
                pass
        with pytest.raises(UserError, match="give --out a folder that you may write"):
            check_writable(folder)


def test_a_killed_runs_files_are_tidied_when_the_folder_is_held_again(tmp_path: Path) -> None:
    old = saved(tmp_path / "disaggregated_results")
    assert save_killed_at(2, tmp_path / "disaggregated_results", "disaggregated") != 0
    assert leftovers(tmp_path)
    with hold(tmp_path):
        pass
    assert leftovers(tmp_path) == []
    assert load_run(tmp_path / "disaggregated_results") == old


@pytest.mark.parametrize(
    "name",
    [
        "../../../pwned",
        "<b>x</b>",
        "/etc/passwd",
        "",
        "a" * 300,
        "a\0b",
        "a\nb",
        "a\n",
        ".hidden",
        "..",
        "a/b",
        "é" * 50,
        "a\x1b[31m",
    ],
)
def test_names_that_could_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"the name is .*: write 1 to 80 letters") as refused:
        check_name(name, "the name")
    assert str(refused.value).isprintable() and len(str(refused.value)) < 250
    run = build_run("single", trials=1, requests=2)
    run.name = name
    with pytest.raises(UserError):
        save_run(run, tmp_path / "in")
    run.name = "single"
    run.devices[0].role = name or "/"
    with pytest.raises(UserError):
        save_run(run, tmp_path / "in")
    assert [*tmp_path.rglob("*")] == []


@pytest.mark.parametrize("name", ["single", "tensor-parallel", "run 2", "concurrency=4,output_tokens=128"])
def test_names_of_pdbench_are_names(name: str) -> None:
    assert check_name(name, "the name") == name


def test_foreign_leftovers_never_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "x_gpu_data.json").write_text("mine")
    (folder / "..0-1.swap").write_text("../x_gpu_data.json\n../../y")
    (folder / ".decode_gpu_data.json.0-1.swap").write_text("{}")
    tidy(folder)
    assert (tmp_path / "x_gpu_data.json").read_text() == "mine" and leftovers(folder) == []


def test_writing_where_a_folder_has_the_files_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "single_results.json").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_run(build_run("single", trials=1, requests=2), tmp_path)
    assert leftovers(tmp_path) == [] and [path.name for path in tmp_path.iterdir()] == ["single_results.json"]
    assert files.device_files(tmp_path) == []


def test_earlier_results_that_cannot_be_removed_are_one_line(tmp_path: Path) -> None:
    old = tmp_path / "point" / "old"
    old.mkdir(parents=True)
    (old / "file").write_text("")
    files.begin_again(old.parent, old)
    assert list(tmp_path.rglob("*")) == [old.parent]
    files.begin_again(tmp_path / "new", tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    old.write_text("no folder, which root cannot remove as one, too")
    with pytest.raises(WriteError, match=r"cannot write .*old: Not a directory; make room, or name a folder"):
        files.begin_again(old.parent, old)


def test_results_that_may_not_be_read_are_no_missing_results(tmp_path: Path) -> None:
    """Of another user: here, of root without the capability to read all files."""
    for name in ("folder", "file"):
        save_run(build_run("single", trials=1, requests=3, tokens=4), tmp_path / name)
    (tmp_path / "folder").chmod(0)
    (tmp_path / "file" / "single_results.json").chmod(0)
    command = "import sys; from pdbench.cli import main; main(['report', sys.argv[1]])"
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    for name, path in (("folder", "folder"), ("file", "file/single_results.json")):
        done = subprocess.run(
            [*without, sys.executable, "-c", command, name],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert (
            done.stderr
            == f"pdbench: cannot read {path}: Permission denied; ask its owner for permission, or read it as they do\n"
        )
    (tmp_path / "folder").chmod(0o755)
