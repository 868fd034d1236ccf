"""What a resumed sweep or search compares beside options: the model that a server offers."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pdbench.records import load_run
from tests.support.processes import call_pdbench
from tests.support.servers import Peer, ScriptedServer, completions, refusal

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
