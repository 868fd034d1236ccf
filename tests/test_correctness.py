"""The correctness gate's verdicts."""

import pytest

from pdbench import correctness
from pdbench.errors import UserError
from pdbench.records import Gate
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from tests.support.servers import Peer, ScriptedServer, completions, refusal

EQUAL = ["equal"] * 4
TOKENS = 80


def verdict(verdicts: list[str] | None = EQUAL, external: int | None = TOKENS) -> Gate:
    return correctness.check(4, verdicts, TOKENS, external, needs_kv=True)


def test_equal_outputs_and_all_kv_external_pass() -> None:
    assert verdict().passed
    assert "80 of 80" in verdict().detail


def test_decode_may_recompute_one_token_per_prompt_and_no_more() -> None:
    assert verdict(external=76).passed
    assert not verdict(external=75).passed
    assert "computed the rest itself" in verdict(external=75).detail


def test_one_different_output_fails() -> None:
    failed = verdict([*EQUAL[1:], "prompt 4 has another answer"])
    assert not failed.passed
    assert failed.equal_outputs == 3
    assert failed.detail == "only 3 of 4 greedy outputs equal the reference's; prompt 4 has another answer"


@pytest.mark.parametrize(("near_ties", "passed"), [(1, True), (2, True), (3, False)])
def test_a_few_near_ties_pass_and_are_named(near_ties: int, passed: bool) -> None:
    gate = verdict(["near-tie"] * near_ties + EQUAL[near_ties:])
    assert (gate.passed, gate.equal_outputs) == (passed, 4 - near_ties)
    assert not passed or f"{4 - near_ties} of 4 greedy outputs equal, {near_ties} but for near ties" in gate.detail


def test_what_could_not_be_checked_is_reported_and_not_counted() -> None:
    unknown = verdict(None, None)
    assert unknown.equal_outputs is None
    assert unknown.external_kv_tokens is None
    assert "no reference" in unknown.detail
    assert "no counter" in unknown.detail


def split(server: ScriptedServer) -> DeploymentInfo:
    """A disaggregated deployment that is one scripted server."""
    servers = [ServerInfo(name=f"{role}-0", role=role, url=server.url) for role in ("prefill", "decode")]
    return DeploymentInfo(name="disaggregated", url=server.url, model_name="m", servers=servers)


def test_the_check_sends_what_the_load_sends_and_reads_decodes_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")

    def answer(peer: Peer) -> bool:
        if peer.path == "/metrics":
            counter = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer",engine="0"}'
            posts = sum(each.method == "POST" for each in server.requests)
            body = f"{counter} {5.0 * posts}\n".encode()  # 5 prompt tokens each, as the scripted usage has them
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            return True
        return completions()(peer)

    with ScriptedServer(answer) as server:
        gate, outputs = correctness.run(split(server), 7, None)
        posts = [peer for peer in server.requests if peer.method == "POST"]
    assert gate.passed and gate.equal_outputs == 4 and gate.external_kv_tokens == gate.prompt_tokens == 20
    assert len(outputs) == 4 and len(posts) == 8  # through the deployment, then prefill alone
    assert all("7" in peer.json["prompt"] and peer.json["stream"] for peer in posts)
    assert all(peer.fields["authorization"] == "Bearer key" for peer in posts)


def test_request_that_fails_is_an_error_with_the_reason() -> None:
    with ScriptedServer(refusal(b"503 Busy", "no instance")) as server:
        single = DeploymentInfo(name="single", url=server.url, model_name="m")
        with pytest.raises(UserError, match=r"correctness check \(http_503: no instance\): read the logs"):
            correctness.run(single, 1, None)


def test_key_that_is_refused_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    with ScriptedServer(refusal(b"401 Unauthorized", "no key")) as server:
        single = DeploymentInfo(name="single", url=server.url, model_name="m")
        with pytest.raises(UserError, match=r"\(http_401: no key\): set OPENAI_API_KEY to a key that it takes"):
            correctness.run(single, 1, None)
    monkeypatch.setenv("PDBENCH_PROXY_API_KEY", "key")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="set OPENAI_API_KEY to the same"):
        correctness.check_key()
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    correctness.check_key()


def test_decode_without_counters_proves_nothing() -> None:
    with ScriptedServer(refusal(b"404 Not Found", "no metrics")) as server:
        with pytest.raises(UserError, match=f"{server.url}/metrics does not answer"):
            correctness.run(split(server), 1, None)
