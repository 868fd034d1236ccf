"""Requests that failed: in words, and when there are too many of them."""

from itertools import count
from pathlib import Path

import pytest

from pdbench import failures
from pdbench.load import self_check
from pdbench.load.generator import ClientResult
from pdbench.records import Flag, RequestError, RequestRecord, load_run
from tests.support.processes import call_pdbench
from tests.support.servers import Peer, ScriptedServer, completions


def request(error: RequestError | None = None, **more: object) -> RequestRecord:
    return RequestRecord(id="r", planned_s=0.0, error=error, token_s=[] if error else [0.5], **more)  # type: ignore[arg-type]


def test_classes_come_with_the_commonest_message() -> None:
    refused, busy = RequestError("refused", "[Errno 111] nobody"), RequestError("http_503", "busy")
    records = [request(), *[request(refused)] * 3, request(busy), request(RequestError("interrupted", "stopped"))]
    assert failures.describe(records) == (
        "4 of 6 requests failed: refused 3, http_503 1; most often refused: [Errno 111] nobody"
    )
    assert failures.describe([request(), request(RequestError("interrupted", "stopped"))]) is None
    assert failures.describe([RequestRecord(id="r", planned_s=0.0)]) == "1 of 1 requests failed: no_tokens 1"


@pytest.mark.parametrize(
    ("errors", "too_many"),
    [({}, False), ({"timeout": 1}, False), ({"timeout": 1, "reset": 1}, True), ({"interrupted": 8, "reset": 1}, False)],
)
def test_one_percent_may_fail(errors: dict[str, int], too_many: bool) -> None:
    assert failures.too_many(errors, 100) == too_many


@pytest.mark.parametrize(
    ("flag", "counts", "counts_in_overload"),
    [
        ("gate-failed", False, False),
        ("server-died", False, False),
        ("client-lost", False, False),
        ("requests-failed", False, True),
        ("client-limited", True, True),
    ],
)
def test_what_makes_figures_void(flag: str, counts: bool, counts_in_overload: bool) -> None:
    flags = [Flag(flag, "because")]
    why = failures.void(flags, {"timeout": 2}, 100)
    assert (why is None) == counts and (counts or (why and why.startswith(f"{flag}: because")))
    assert (failures.void(flags, None, 100) is None) == counts_in_overload
    assert failures.void([Flag("requests-failed", "one")], {"timeout": 1}, 100) is None


@pytest.mark.parametrize(("kind", "limited"), [("refused", False), ("timeout", True)])
def test_client_that_spins_on_refusals_is_not_the_limit(kind: str, limited: bool) -> None:
    failed = request(RequestError(kind, "x"), sent_s=0.2, due_s=0.0)
    result = ClientResult(cpu_s=0.99, wall_s=1.0)
    records = [*[request(sent_s=0.0, due_s=0.0)] * 90, *[failed] * 10]
    client = self_check.describe([result], records, streams=4, open_loop=False)
    assert client["send_delay_ms"]["max"] == 0.0
    assert [flag.name for flag in self_check.flags(client)] == ["client-limited"] * limited


@pytest.mark.parametrize(("fail_every", "code"), [(10, 1), (150, 0)], ids=["every tenth", "one of 150"])
@pytest.mark.usefixtures("undrawn")
def test_bench_ends_with_1_when_more_than_1_percent_fail(tmp_path: Path, fail_every: int, code: int) -> None:
    numbers, answered = count(1), completions()

    def answer(peer: Peer) -> bool:
        if peer.method == "POST":
            number = next(numbers)
            if number > 20 and number % fail_every == 0:
                peer.respond({"error": {"message": "[no] room"}}, b"503 Busy")
                return True
        return answered(peer)

    with ScriptedServer(answer) as server:
        load = ("--requests", "150", "--output-tokens", "2", "--warmup", "2", "--no-power")
        done = call_pdbench("bench", "--url", server.url, *load, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert "requests failed: http_503" in done.stdout and "most often http_503: [no] room" in done.stdout
    assert "bench, requests-failed: " in done.stdout
    assert ("requests-failed" in done.stderr and "over 1 %" in done.stderr) == bool(code)
    assert "requests-failed" in [flag.name for flag in load_run(tmp_path / "bench_results").flags]
