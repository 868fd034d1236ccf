"""What a resumed measurement compares beside options: the model that a server offers, the contents of input files."""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pdbench import experiment
from pdbench.config import LoadConfig, PairConfig
from pdbench.errors import UserError
from pdbench.load.contents import contents_of
from pdbench.records import Run, load_run, save_run
from tests.support import sites
from tests.support.processes import call_pdbench
from tests.support.servers import Peer, ScriptedServer, completions, refusal
from tests.support.sites import gates_fixture

__all__ = ["gates_fixture"]

LOAD = ["--no-power", "--output-tokens", "4", "--warmup", "1", "--canaries", "0", "--out", "out"]
SWEEP = ["sweep", *LOAD, "--requests", "4", "--vary"]
SEARCH = ["search", *LOAD, "--requests", "20", "--slo", "e2e=300", "--rate", "40", "--precision", "50%"]

pytestmark = pytest.mark.usefixtures("undrawn")


class Server(ScriptedServer):
    """Offers the models in `offered`; without one it knows no /v1/models. Commands are run in `folder`."""

    def __init__(self, folder: Path, *offered: str) -> None:
        self.folder = folder
        self.offered: Sequence[str] = offered
        complete = completions(pause_s=0.002)

        def answer(peer: Peer) -> bool:
            if peer.method != "GET":
                return complete(peer)
            if not self.offered:
                return refusal(b"404 Not Found", "no such path")(peer)
            peer.respond({"object": "list", "data": [{"id": name} for name in self.offered]})
            return True

        super().__init__(answer)

    @property
    def sent(self) -> int:
        return sum(peer.method == "POST" for peer in self.requests)

    def measure(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return call_pdbench(*command, "--url", self.url, cwd=self.folder)

    def refuses(self, *command: str) -> str:
        """The line with which a command ends that sends nothing."""
        sent, done = self.sent, self.measure(*command)
        assert done.returncode == 1 and done.stderr.count("\n") == 1 and self.sent == sent, done
        return done.stderr


def forget(out: Path, name: str) -> None:
    """Points as they were saved before they said this."""
    for path in out.glob("*/point.json"):
        known = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in known.items() if key != name}))


def test_sweep_of_another_model_is_not_resumed(tmp_path: Path) -> None:
    with Server(tmp_path, "model-a") as server:
        assert server.measure(*SWEEP, "concurrency=1,2").returncode == 0
        server.offered = ["model-b"]
        told = server.refuses(*SWEEP, "concurrency=1,2,4")
        words = (
            "concurrency=1 was measured of model-a, the server offers model-b: serve model-a again, give another --out"
        )
        assert words in told and not (tmp_path / "out" / "concurrency=4").exists()
        server.offered = ["model-a"]
        assert server.measure(*SWEEP, "concurrency=1,2,4").returncode == 0
        assert (tmp_path / "out" / "concurrency=4").exists()


def test_points_of_two_models_are_no_sweep(tmp_path: Path) -> None:
    with Server(tmp_path, "model-a") as server:
        assert server.measure(*SWEEP, "concurrency=1,2").returncode == 0
        forget(tmp_path / "out", "measured")
        assert server.measure(*SWEEP, "concurrency=1,2").returncode == 0
        server.offered = ["model-b"]
        told = server.measure(*SWEEP, "concurrency=1,4").stderr
        assert (
            "concurrency=4/bench_results of one sweep were not measured alike (model: model-a against model-b)" in told
        )
    told = call_pdbench("report", "out", "--out", "drawn", cwd=tmp_path).stderr
    assert "(model: model-a against model-b)" in told and not (tmp_path / "drawn").exists()


def test_models_that_a_sweep_varies_or_no_server_tells_are_resumed(tmp_path: Path) -> None:
    with Server(tmp_path) as server:
        for values in ("model=a", "model=a,b"):
            assert server.measure(*SWEEP, values).returncode == 0
        assert [load_run(path).config["model"] for path in sorted(tmp_path.glob("out/*/bench_results"))] == ["a", "b"]
        server.offered, sent = ["b", "a"], server.sent
        assert server.measure(*SWEEP, "model=a,b").returncode == 0 and server.sent == sent
    assert call_pdbench("report", "out", "--out", "drawn", cwd=tmp_path).returncode == 0


def test_search_of_another_model_is_not_resumed(tmp_path: Path) -> None:
    with Server(tmp_path, "model-a") as server:
        command = [*SEARCH, "--max-minutes", "0.1"]
        server.measure(*command)
        kept = (tmp_path / "out" / "search.json").read_bytes()
        assert json.loads(kept)["points"]
        server.offered = ["model-b"]
        assert "out was measured of model-a, the server offers model-b: serve model-a again" in server.refuses(*command)
        assert (tmp_path / "out" / "search.json").read_bytes() == kept


def test_sweep_with_another_prompt_file_of_the_same_name_is_not_resumed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Which river is the longest?\n\nWhich is the shortest?")
    command = [*SWEEP[:-1], "--prompt-file", file.name, "--vary", "concurrency=1,2"]
    with Server(tmp_path, "m") as server:
        assert server.measure(*command).returncode == 0
        kept = file.read_text()
        file.write_text(kept.replace("river", "ocean"))
        told = server.refuses(*command)
        assert "concurrency=1 was measured with other contents of --prompt-file (" in told
        assert "): put that file back, give another --out, or delete " in told
        file.write_text(kept)
        sent = server.sent
        assert server.measure(*command).returncode == 0 and server.sent == sent
        file.write_text(kept.replace("river", "ocean"))
        forget(tmp_path / "out", "measured")
        assert server.measure(*command).returncode == 0 and server.sent == sent


def test_files_that_a_sweep_varies_are_compared_each_with_its_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(f"Which river is {name}?\n\nWhich is the shortest?")
    with Server(tmp_path, "m") as server:
        assert server.measure(*SWEEP, "prompt_file=a,b").returncode == 0
        sent = server.sent
        assert server.measure(*SWEEP, "prompt_file=a,b").returncode == 0 and server.sent == sent
        (tmp_path / "b").write_text("Another one?")
        assert "prompt_file=b was measured with other contents" in server.refuses(*SWEEP, "prompt_file=a,b")


def test_search_with_another_prompt_file_of_the_same_name_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Which river is the longest?\n\nWhich is the shortest?")
    with Server(tmp_path, "m") as server:
        command = [*SEARCH, "--max-minutes", "0.1", "--prompt-file", "prompts.txt"]
        server.measure(*command)
        (tmp_path / "prompts.txt").write_text("Another one?")
        assert "out was measured with other contents of --prompt-file (" in server.refuses(*command)


@pytest.mark.usefixtures("gates")
def test_run_with_another_prompt_file_of_the_same_name_is_not_resumed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Which river is the longest?\n\nWhich is the shortest?")
    options = replace(sites.OPTIONS, load=replace(sites.OPTIONS.load, prompt_file=str(file)))
    site, runs, results = sites.FakeSite(lambda number: sites.measured(number - 1)), dict[Path, Run](), "single_results"

    def measure(pairs: int) -> None:
        design = PairConfig(pairs=pairs, resident=False, resume=True)
        experiment.run(["single"], design, options, tmp_path, Console(quiet=True), site, runs)

    measure(1)
    run = load_run(tmp_path / results)
    assert run.config["contents"] == contents_of(options.load) != {}
    file.write_text("Another one?")
    with pytest.raises(UserError, match=rf"--resume: .*{results} was measured with other contents of --prompt-file \("):
        measure(2)
    del run.config["contents"]  # as an older pdbench saved it
    save_run(run, tmp_path / results)
    measure(2)
    assert len(load_run(tmp_path / results).trials) == 2


def test_contents_are_of_regular_files_that_are_here(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "trace").write_text("rows")
    os.mkfifo(tmp_path / "pipe")
    found = contents_of(LoadConfig(trace=str(tmp_path / "trace"), tokenizer=str(tmp_path)))
    assert found["trace"] == hashlib.blake2b(b"rows", digest_size=8).hexdigest() and [*found] == ["trace", "tokenizer"]
    assert contents_of(LoadConfig(prompt_file=str(tmp_path / "pipe"), tokenizer="org/model")) == {}
    assert contents_of(LoadConfig(trace=str(tmp_path / "none"))) == {}
