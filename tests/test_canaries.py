"""Canaries: answers under load against a reference's, with scripted servers that corrupt some of them."""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pdbench import canaries, correctness, experiment
from pdbench.analysis.run_analysis import analyze
from pdbench.answers import Answer, compare
from pdbench.config import LoadConfig, Options, PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.load.plan import TrialLoad
from pdbench.records import Canary, Clock, RequestRecord, Run, load_run
from pdbench.report import commands, text
from pdbench.serving import deployment as deployments
from pdbench.serving.deployment import DeploymentInfo, ServerInfo
from pdbench.site import Site
from tests.support.proxy_processes import proxy
from tests.support.servers import Peer, ScriptedServer, completions, stream, token, tokens, usage

IDS = [11, 12, 13]
LIKELIEST = [
    {"token_id:11": -0.1, "token_id:21": -3.0},
    {"token_id:12": -0.7, "token_id:22": -0.9},
    {"token_id:13": 0.0},
]
KNOWN = Answer("a b c", [f"token_id:{number}" for number in IDS], LIKELIEST, IDS)
BY_TEXT = Answer(
    "a b c", ["a", " b", " c"], [{"a": -0.1, "x": -3.0}, {" b": -0.7, " d": -0.9, " f": -4.0}, {" c": 0.0}]
)


@pytest.mark.parametrize(
    ("token_ids", "verdict"),
    [
        ([11, 12, 13, 99], ("equal", 3, None)),
        ([21, 22, 23], ("wrong", 0, 2.9)),
        ([11, 22, 77], ("undecided", 1, 0.2)),
        ([77, 12, 13], ("wrong", 0, None)),
        ([11, 12, 77], ("undecided", 2, None)),  # of the tokens there, one alone is known: how likely others are is not
    ],
    ids=["equal", "unlikely", "near tie", "none of the likeliest", "unknown"],
)
def test_first_difference_is_judged_by_the_references_probabilities(
    token_ids: list[int], verdict: tuple[str, int, float | None]
) -> None:
    found = compare(KNOWN, token_ids, "")
    assert found[:2] == verdict[:2] and found[2] == pytest.approx(verdict[2])


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [("a b c d", "equal"), ("a b", "equal"), ("x y", "wrong"), ("a d e", "undecided"), ("a q", "wrong")],
)
def test_answers_without_ids_are_compared_by_text(answer: str, verdict: str) -> None:
    assert compare(BY_TEXT, [], answer)[0] == verdict


def test_difference_without_logprobs_is_undecided() -> None:
    assert compare(Answer("a b c"), [], "a x")[0] == "undecided"
    assert compare(Answer("a b \ufffd"), [], "a b 字")[0] == "equal"


@pytest.mark.parametrize(
    ("options", "count"),
    [({"requests": 16}, 4), ({"requests": 3}, 3), ({"requests": 1000}, 10), ({"requests": 8, "canaries": 1.0}, 8),
     ({"requests": 50, "canaries": 0.0}, 0), ({"rate": 10.0, "duration_s": 100.0}, 10)],
)  # fmt: skip
def test_share_of_the_requests_and_four_at_least_are_canaries(options: dict, count: int) -> None:
    places = canaries._places(LoadConfig(**options), 0, canaries.LEAST)
    assert len(set(places)) == count
    assert not places or (places[0] >= 0 and places[-1] < (options.get("requests") or 1000))


def test_canaries_of_an_endless_load_are_ever_further_apart() -> None:
    places = canaries._places(LoadConfig(duration_s=10.0), 0, canaries.LEAST)
    assert len([place for place in places if place < 16]) >= 4 and places[-1] > 10_000


@dataclass
class Model:
    """A scripted vLLM whose answers follow from the prompt. `corrupt(request's number, in flight)` says which streamed answers are
    another prompt's, `tie` which take the second of two nearly equal tokens, `derails` which then go wrong; `lies` is for whole answers."""

    corrupt: Callable[[int, int], bool] = lambda number, in_flight: False
    tie: Callable[[int], bool] = lambda number: False
    derails: Callable[[int], bool] = lambda number: False
    lies: Callable[[dict], bool] = lambda body: False
    pause_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    streamed: int = 0
    in_flight: int = 0
    prompt_tokens: int = 0

    def __call__(self, peer: Peer) -> bool:
        if peer.path == "/metrics":
            counter = 'vllm:prompt_tokens_by_source_total{source="%s"} %d\n'
            page = (counter % ("external_kv_transfer", self.prompt_tokens) + counter % ("local_compute", 0)).encode()
            peer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(page), page))
            return True
        if peer.method == "GET":
            peer.respond({"data": [{"id": "m"}]})
            return True
        body = peer.json
        if not body.get("stream"):
            self.whole(peer, body)
            return True
        with self.lock:
            self.streamed += 1
            self.in_flight += 1
            self.prompt_tokens += 5
            number, wrong = self.streamed, self.corrupt(self.streamed, self.in_flight)
        try:
            derails = self.derails(number)
            ids = tokens_of(body, other=wrong, tie=self.tie(number) or derails, derails=derails)
            last = len(ids) - 1
            pieces = [token(f"t{n} ", [n], "length" if place == last else None) for place, n in enumerate(ids)]
            others = [
                {"choices": [{"index": choice, "text": "", "finish_reason": "length"}]}
                for choice in range(1, body.get("n", 1))
            ]
            return stream([*pieces, *others, usage(5, len(ids))], pause_s=self.pause_s)(peer)
        finally:
            with self.lock:
                self.in_flight -= 1

    def whole(self, peer: Peer, body: dict) -> None:
        ids = tokens_of(body, other=self.lies(body))
        likeliest = [
            {f"token_id:{n}": -0.6, f"token_id:{n + VOCABULARY}": -0.9, f"token_id:{n + 2 * VOCABULARY}": -4.0}
            for n in ids
        ]
        choice = {
            "index": 0,
            "text": "".join(f"t{n} " for n in ids),
            "token_ids": ids,
            "prompt_token_ids": ids_of(body["prompt"]),
            "finish_reason": "length",
            "logprobs": {"tokens": [f"token_id:{n}" for n in ids], "top_logprobs": likeliest},
        }
        peer.respond({"id": "c", "created": 0, "model": "m", "choices": [choice], "usage": {"prompt_tokens": 5}})


# With fresh prompts in every run: so many that two tokens never are the same by chance.
VOCABULARY = 10**8


def ids_of(prompt: str | list[int]) -> list[int]:
    return (
        prompt if isinstance(prompt, list) else [5000 + byte for byte in hashlib.sha256(prompt.encode()).digest()[:8]]
    )


def tokens_of(body: dict, *, other: bool = False, tie: bool = False, derails: bool = False) -> list[int]:
    """What the model says, each token following from all before; nothing of one prompt is in another's (`other`). `tie`: the third
    token is the one that is nearly as likely; `derails`: what follows it is nonsense."""
    prompt, said = ids_of(f"other {body['prompt']}" if other else body["prompt"]), list[int]()
    for place in range(body["max_tokens"]):
        before = [9] if derails and place > 2 else []
        digest = hashlib.sha256(repr([*before, *prompt, *said]).encode()).digest()
        said.append(int.from_bytes(digest[:4], "big") % VOCABULARY + (VOCABULARY if tie and place == 2 else 0))
    return said


def bench(url: str, out: Path, log_dir: Path | None = None, **load: object) -> Run:
    options = Options(
        ServeConfig(log_dir=str(log_dir or out / "none")),
        LoadConfig(**{"requests": 40, "warmup": 1, "output_tokens": 20, **load}),  # type: ignore[arg-type]
        PowerConfig(power=False),
    )
    runs: dict[Path, Run] = {}
    experiment.bench(url, 1, options, out, Console(quiet=True), Site(), runs)
    (folder,) = runs
    return load_run(folder)


def verdicts(run: Run) -> list[str | None]:
    return [request.canary.verdict for request in run.requests if request.canary]


def flags(run: Run, name: str = "canary-failed") -> list[str]:
    return [flag.detail for flag in run.flags if flag.name == name]


def test_sound_server_passes_whatever_it_chooses_at_near_ties(tmp_path: Path) -> None:
    with ScriptedServer(Model(tie=lambda number: number % 15 == 0)) as server:
        run = bench(server.url, tmp_path, canaries=0.5)
        pairs = [peer.fields["x-pdbench-pair"] for peer in server.requests if "x-pdbench-pair" in peer.fields]
    assert set(verdicts(run)) == {"equal", "near-tie"} and verdicts(run).count("equal") >= 16
    assert run.gate is not None and run.gate.passed and flags(run) == []
    assert len(run.requests) == 41 and sorted(map(int, pairs)) == list(range(20))
    assert "of 20 answers under load equal" in text.gates({"bench": analyze(run)})[0][1]
    commands.exit_on_flags([analyze(run)])


@pytest.mark.parametrize(
    ("corrupt", "load"),
    [
        (lambda number, in_flight: number > 25, {}),
        (lambda number, in_flight: in_flight > 2, {"concurrency": 6}),
        (lambda number, in_flight: number % 10 == 0, {"canaries": 1.0}),
    ],
    ids=["after 25 requests", "above two in flight", "one answer in ten"],
)
def test_answers_that_go_wrong_under_load_fail_the_run(
    corrupt: Callable[[int, int], bool], load: dict, tmp_path: Path
) -> None:
    with ScriptedServer(Model(corrupt=corrupt, pause_s=0.002)) as server:
        run = bench(server.url, tmp_path, **load)
    wrong = next(request for request in run.requests if request.canary and request.canary.verdict == "wrong")
    (detail,) = flags(run)
    assert f"request {wrong.id}, sent at {wrong.sent_s:.2f} s" in detail and server.url in detail
    assert run.gate is not None and not run.gate.passed
    assert text.gates({"bench": analyze(run)})[0][0] == "worse"
    with pytest.raises(UserError, match="canary-failed"):
        commands.exit_on_flags([analyze(run)])


def test_what_follows_a_near_tie_is_judged_too(tmp_path: Path) -> None:
    with ScriptedServer(Model(derails=lambda number: number > 30)) as server:
        run = bench(server.url, tmp_path)
    assert verdicts(run) == ["equal"] * 3 + ["wrong"]
    assert "token 4 is not that of" in flags(run)[0]


def test_too_many_near_ties_are_no_chance(tmp_path: Path) -> None:
    with ScriptedServer(Model(tie=lambda number: True)) as server:
        run = bench(server.url, tmp_path)
    assert verdicts(run) == ["near-tie"] * 4
    assert "4 of 4 answers under load part" in flags(run)[0]


@pytest.mark.parametrize(
    ("deployment", "passed", "detail"),
    [
        (Model(tie=lambda number: number == 2), True, "3 of 4 greedy outputs equal, 1 but for near ties"),
        (Model(derails=lambda number: number == 2), False, "reference's; prompt 2 has another answer from token 4 on"),
        (Model(corrupt=lambda number, _: number == 2), False, "reference's; prompt 2 has another answer from token 1 on"),
        (Model(tie=lambda number: number != 2), False, "only 1 of 4 greedy outputs equal the reference's; each alone may be"),
    ],
    ids=["one near tie", "nonsense after one", "another answer", "too many near ties"],
)  # fmt: skip
def test_gate_tells_near_ties_from_wrong_answers(deployment: Model, passed: bool, detail: str) -> None:
    with ScriptedServer(Model()) as prefill, ScriptedServer(deployment) as server:
        servers = [ServerInfo(name="prefill-0", role="prefill", url=prefill.url)]
        info = DeploymentInfo(name="prefill and another", url=server.url, model_name="m", servers=servers)
        gate, _ = correctness.run(info, 7, None)
    assert gate.passed == passed and detail in gate.detail


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A bench of pdbench's proxy with scripted instances: prefill, and two of decode."""

    def measure(prefill: Model, *decode: Model, **load: object) -> Run:
        log_dir = tmp_path / "logs"
        log_dir.mkdir()
        with ScriptedServer(prefill) as p, ScriptedServer(decode[0]) as d0, ScriptedServer(decode[1]) as d1:
            with proxy(tmp_path, "--first-token", "decode", prefill=[p], decode=[d0, d1]) as server:
                instances = [("prefill-0", "prefill", p), ("decode-0", "decode", d0), ("decode-1", "decode", d1)]
                servers = [ServerInfo(name=name, role=role, url=each.url) for name, role, each in instances]
                servers.append(ServerInfo(name="proxy", role="proxy", url=server.url, event_log=str(server.log)))
                info = DeploymentInfo(
                    name="disaggregated", url=server.url, model_name="m", owner_pid=os.getpid(), servers=servers
                )
                deployments.save(info, log_dir)
                return bench(server.url, tmp_path, log_dir, **load)

    yield measure


def test_pair_that_corrupts_is_named(split: Callable[..., Run]) -> None:
    run = split(Model(), Model(), Model(corrupt=lambda number, in_flight: number > 8))
    (detail,) = flags(run)
    assert "prefill-0 -> decode-1: " in detail and "equal" in verdicts(run)
    assert "not that of prefill-0" in detail
    assert flags(run, "pair-unchecked") == []


def test_reference_that_is_wrong_is_told_apart(split: Callable[..., Run]) -> None:
    run = split(Model(lies=lambda body: "before" in body.get("cache_salt", "")), Model(), Model())
    assert flags(run) == [] and verdicts(run) == ["equal"] * 4
    assert "prefill-0 answered the prompt" in flags(run, "reference-wrong")[0]
    with pytest.raises(UserError, match="reference-wrong"):
        commands.exit_on_flags([analyze(run)])


def test_references_of_two_deployments_must_agree() -> None:
    references: canaries.References = {}
    with ScriptedServer(Model()) as one, ScriptedServer(Model(lies=lambda body: True)) as other:
        for name, server in (("single", one), ("replicas", other)):
            info = DeploymentInfo(name=name, url=server.url, model_name="m")
            checked = canaries.Canaries(info, references)
            load = TrialLoad(LoadConfig(requests=8, nonce="n"), server.url, "m", Clock.start())
            assert checked.choose(load).canaries == (1, 3, 5, 7)
    run = Run(name="replicas", clock=Clock.start(), config={}, host={}, versions={})
    checked.report(run, [], [])
    assert "single and replicas answer 4 of 4 prompts differently" in flags(run, "reference-wrong")[0]


def test_server_that_refuses_fields_is_asked_without(tmp_path: Path) -> None:
    model = Model()

    def picky(peer: Peer) -> bool:
        if peer.method == "POST" and "cache_salt" in peer.json:
            peer.respond({"error": {"message": "cache_salt: unknown field"}}, b"400 Bad Request")
            return True
        return model(peer)

    with ScriptedServer(picky) as server:
        run = bench(server.url, tmp_path)
    assert verdicts(run) == ["equal"] * 4
    assert all(request.canary.repeated for request in run.requests if request.canary)
    figures = analyze(run).summary  # a cache may know their prompts: they say nothing of prefill
    assert figures.ttft_ms is not None and figures.ttft_ms.count == 36 and figures.requests.succeeded == 40


@pytest.mark.parametrize(("endpoint", "repeated"), [("completions", True), ("chat", False)])
def test_prompt_whose_first_block_was_cached_is_known_unless_it_is_a_chat_template(
    endpoint: Any, repeated: bool
) -> None:
    checked = canaries.Canaries(DeploymentInfo(name="bench", url="http://one", model_name="m"), {})
    planned: Any = None  # an equal answer is compared with nothing else
    checked._asked[0] = [(planned, KNOWN)]
    load = TrialLoad(LoadConfig(endpoint=endpoint), "http://one", "m", Clock.start())
    canary = Canary(number=0, token_ids=IDS)
    checked.judge(load, [RequestRecord(id="r", planned_s=0.0, text="a b c", cached_prompt_tokens=16, canary=canary)])
    assert canary.verdict == "equal" and canary.repeated is repeated


def test_reference_gets_its_salt_whatever_the_nonce(tmp_path: Path) -> None:
    model = Model()

    def strict(peer: Peer) -> bool:
        salt = peer.json.get("cache_salt", "") if peer.method == "POST" else ""
        if len(salt) > 128 or set(salt) & set("@/\\\0"):  # as vLLM 0.33
            peer.respond({"error": {"message": "cache_salt must not contain '/'"}}, b"400 Bad Request")
            return True
        return model(peer)

    with ScriptedServer(strict) as server:
        run = bench(server.url, tmp_path, nonce="9f/rate=4.0@" + "x" * 200)
    assert verdicts(run) == ["equal"] * 4
    assert not any(request.canary.repeated for request in run.requests if request.canary)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra_body": '{"n": 2}'}, "n in --extra-body"),
        ({"drop_fields": ("temperature",)}, "without the field temperature"),
        ({"drop_fields": ("ignore_eos,temperature",)}, "without the field temperature"),
    ],
)
def test_load_without_one_right_answer_has_no_canaries(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with ScriptedServer(Model()) as server:
        run = bench(server.url, tmp_path, **options)
    assert verdicts(run) == [] and run.gate is None
    assert words in flags(run, "canaries-off")[0]


def test_server_that_always_streams_is_named_with_what_it_sent(tmp_path: Path) -> None:
    models, always = completions(), stream(tokens(20))
    with ScriptedServer(lambda peer: (models if peer.method == "GET" else always)(peer)) as server:
        run = bench(server.url, tmp_path)
    (why,) = flags(run, "canaries-off")
    assert f'{server.url} answers "stream": false with \'data: {{' in why and "no completion in JSON" in why


def test_sampled_load_asks_its_canaries_greedily(tmp_path: Path) -> None:
    with ScriptedServer(Model()) as server:
        bench(server.url, tmp_path, temperature=0.8)
        asked = [(peer.json["temperature"], "x-pdbench-pair" in peer.fields) for peer in server.requests if peer.body]
    assert asked.count((0.0, True)) == 4 and asked.count((0.8, False)) == 37
