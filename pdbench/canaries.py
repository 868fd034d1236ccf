"""Canaries: measured requests whose right answers are known, so that what goes wrong only under load is found.

Before a trial the prompts of a few of its requests are sent to an instance that answers alone. It names the likeliest tokens at every
place, and gets another cache salt than the load, so that no prefix cache knows these prompts when the load sends them.
"""

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from pdbench.answers import LIKELIEST, TOKENS, Answer, compare, follow, read, too_many
from pdbench.config import TEMPLATE_TOKENS, LoadConfig, dropped_fields
from pdbench.errors import UserError
from pdbench.events import Event, ProxyEvent
from pdbench.http import request
from pdbench.load import plan, request_fields
from pdbench.load.plan import PlannedRequest, TrialLoad
from pdbench.records import Canary, Flag, Gate, RequestRecord, Run
from pdbench.serving.deployment import DeploymentInfo

LEAST = 4
"""Canaries of a trial, however few a share of its requests would be."""
_GROWTH, _ENDLESS = 1.5, 24
"""Nobody knows how many requests an endless load will have: its canaries lie ever further apart, the last at request 11,223."""
# Fields that a server may not know: it is asked without the first ones, then without both.
_OWN_FIELDS = ("cache_salt", "return_tokens_as_token_ids", "return_token_ids")
_LOGPROBS = ("logprobs", "top_logprobs")

Asked = tuple[PlannedRequest, Answer]
References = dict[tuple[int, int], tuple[str, Answer]]
"""By trial and place of the request: who answered first, and what."""


class Canaries:
    """The canaries of one deployment's trials.

    `firsts` are the answers of the first deployment that had a trial's prompts, by trial; others' references must agree with them.
    """

    def __init__(self, info: DeploymentInfo, firsts: References) -> None:
        self.info, self._firsts = info, firsts
        self._pairs = max(1, len(info.urls("prefill"))) * max(1, len(info.urls("decode") or info.urls("replica")))
        # One instance of the deployment, asked directly; vLLM's own P2P connector wants both addresses in every request id.
        direct = [server for role in ("prefill", "replica") for server in info.servers if server.role == role]
        if info.config.get("connector_used") == "builtin-p2p-nccl":
            direct = []
        idle = f"the idle {'server' if info.name == 'bench' else info.name}"
        self.source, self._url = (direct[0].name, direct[0].url) if direct else (idle, info.url)
        self._asked: dict[int, list[Asked]] = {}
        self._flags: list[Flag] = []
        self._left_out: tuple[str, ...] = ()

    def choose(self, load: TrialLoad) -> TrialLoad:
        """The load with its canaries, whose reference has answered; without, and flagged, where that cannot be."""
        try:
            places = _places(load.config, load.trial, max(LEAST, self._pairs))
            if not places:
                return load
            _check_greedy(load.config)
            tokenizer, _ = plan.load_tokenizer_for(load)
            planned = plan.requests_at(load.config, tokenizer, load.trial, places)
            asked = [(each, self._ask(load, each, "before")) for each in planned]
        except (UserError, OSError) as error:
            self._flags.append(Flag("canaries-off", f"no answer was checked under load: {error}"))
            return load
        self._asked[load.trial] = asked
        self._compare_references(load.trial, asked)
        return replace(load, canaries=tuple(places))

    def judge(self, load: TrialLoad, requests: Sequence[RequestRecord], *, servers_live: bool = True) -> str | None:
        """Fill in the trial's canaries; what to say of them, None where none was judged. The servers must be idle again."""
        asked = self._asked.get(load.trial, [])
        answered = [each for each in requests if not each.error]
        template_tokens = TEMPLATE_TOKENS[load.config.endpoint]
        canaries = [(each, each.canary) for each in answered if each.canary and (each.text or each.canary.token_ids)]
        for record, canary in canaries:
            planned, known = asked[canary.number]
            canary.verdict, canary.equal_tokens, canary.gap_nats = compare(known, canary.token_ids, record.text)
            cached = (record.cached_prompt_tokens or 0) - record.shared_prompt_tokens
            canary.repeated = not known.salted or (self._url == self.info.url and cached > template_tokens)
            if canary.verdict == "undecided" and servers_live:
                self._follow(load, planned, known, canary)
            if canary.verdict == "wrong" and servers_live:
                self._ask_again(load, planned, known, record, canary)
            canary.token_ids = canary.token_ids[:TOKENS]
        if not (verdicts := [canary.verdict for _, canary in canaries]):
            return None
        count = Counter(verdicts)
        words = f"canaries: {count['equal']} of {len(verdicts)} answers under load equal those of {self.source}"
        others = (("near-tie", "but for near ties"), ("undecided", "undecided"), ("wrong", "WRONG"))
        return words + "".join(f", {count[verdict]} {what}" for verdict, what in others if count[verdict])

    def report(self, run: Run, requests: Iterable[RequestRecord], events: Iterable[Event]) -> None:
        names = {server.url: server.name for server in self.info.servers}
        pairs = {
            event.request_id: " -> ".join(names.get(url, url) for url in (event.prefill, event.decode) if url)
            for event in events
            if isinstance(event, ProxyEvent)
        }
        judged = [(each, each.canary) for each in requests if each.canary and each.canary.verdict]
        flags = [*self._flags, *self._failed(judged, pairs), *self._unvisited(judged, pairs)]
        run.flags += [flag for flag in flags if flag not in run.flags]
        if judged:
            failed = [flag for flag in run.flags if flag.name in ("canary-failed", "reference-wrong")]
            no_gate = Gate(
                passed=True, prompts=0, equal_outputs=None, prompt_tokens=None, external_kv_tokens=None, detail=""
            )
            gate = run.gate or no_gate
            verdicts = Counter(canary.verdict for _, canary in judged if canary.verdict)
            run.gate = msgspec.structs.replace(
                gate,
                passed=gate.passed and not failed,
                detail=failed[0].detail if failed and gate.passed else gate.detail,
                canaries=dict(Counter(gate.canaries) + verdicts),
            )

    def _ask(self, load: TrialLoad, planned: PlannedRequest, salt: str, tokens: int = TOKENS) -> Answer:
        """Raises OSError when the reference does not answer."""
        config, tokens = load.config, min(tokens, planned.output_tokens)
        body: dict[str, Any] = json.loads(
            request_fields.request_body(config, load.model, planned.prompt, tokens, greedy=True)
        )
        chat = config.endpoint == "chat"
        # Hashed: vLLM 0.33 refuses salts with a slash, or of more than 128 characters.
        digest = hashlib.sha256(f"{salt} {config.nonce}".encode()).hexdigest()[:32]
        salt = f"pdbench {salt.split()[0]} {digest}"
        body |= {"stream": False, "cache_salt": salt, "return_tokens_as_token_ids": True}
        body |= {"logprobs": True, "top_logprobs": LIKELIEST} if chat else {"logprobs": LIKELIEST}
        body.pop("stream_options", None)
        path = "/v1/chat/completions" if chat else "/v1/completions"
        for left_out in ((), _OWN_FIELDS, _OWN_FIELDS + _LOGPROBS):
            if len(left_out) < len(self._left_out):
                continue
            sent = json.dumps({name: value for name, value in body.items() if name not in left_out}).encode()
            status, answer = request(
                self._url, path, timeout_s=config.request_timeout_s, verify_tls=config.tls_verify, body=sent
            )
            if status not in (400, 422):
                break
        self._left_out = left_out
        if status != 200:
            raise OSError(f"{self._url} answers {status}: {answer[:200].decode('utf-8', 'replace')}")
        try:
            return read(answer, salted=not left_out)
        except OSError as error:
            raise OSError(f'{self._url} answers "stream": false with {error}') from None

    def _follow(self, load: TrialLoad, planned: PlannedRequest, known: Answer, canary: Canary) -> None:
        """Judge what came after a near tie."""
        load = replace(load, config=replace(load.config, endpoint="completions"))

        def ask(prompt: Sequence[int], tokens: int) -> Answer:
            return self._ask(load, replace(planned, prompt=tuple(prompt)), "before", tokens)

        verdict, equal, gap = follow(known, canary.token_ids, canary.equal_tokens, ask)
        canary.verdict = verdict
        if verdict == "wrong":
            canary.equal_tokens, canary.gap_nats = equal, gap

    def _ask_again(
        self, load: TrialLoad, planned: PlannedRequest, known: Answer, record: RequestRecord, canary: Canary
    ) -> None:
        """Is it the reference that was wrong? Only an instance that is not the way of the load can tell."""
        try:
            second = self._ask(load, planned, f"again {record.id}")
        except OSError:
            return
        changed = compare(known, second.token_ids, second.text)[0] == "wrong"
        again = compare(second, canary.token_ids, record.text)
        if changed and again[0] != "wrong" and self._url != self.info.url:
            canary.verdict, canary.equal_tokens, canary.gap_nats = again
            self._flags.append(
                Flag("reference-wrong", f"trial {load.trial + 1}: {self.source} answered the prompt of request {record.id} in two ways "
                     "before and after the load; under load the answer was its second")
            )  # fmt: skip

    def _compare_references(self, trial: int, asked: Sequence[Asked]) -> None:
        """With the first deployment that was asked the same prompts; one with more instances has other canaries."""
        own = self.info.name if self._url == self.info.url else f"{self.source} of {self.info.name}"
        verdicts, others = Counter[str](), set[str]()
        for planned, answer in asked:
            source, first = self._firsts.setdefault((trial, planned.index), (own, answer))
            verdicts[compare(first, answer.token_ids, answer.text)[0]] += 1
            others.add(source)
        if wrong := verdicts["wrong"]:
            what = f"trial {trial + 1}: {' and '.join(sorted(others))} and {own} answer {wrong} of {len(asked)} prompts differently"
            self._flags.append(Flag("reference-wrong", f"{what} without any load: one of them computes something else"))

    def _failed(self, judged: Sequence[tuple[RequestRecord, Canary]], pairs: dict[str, str]) -> Iterator[Flag]:
        """Wrong answers, by the pair that they came from; then trials with too many undecided ones."""
        by_place: dict[tuple[int, str], list[tuple[RequestRecord, Canary]]] = {}
        for record, canary in judged:
            by_place.setdefault((record.trial, pairs.get(record.id, "")), []).append((record, canary))
        for (trial, pair), here in by_place.items():
            wrong = [(record, canary) for record, canary in here if canary.verdict == "wrong"]
            if not wrong:
                continue
            record, canary = min(wrong, key=lambda each: each[0].sent_s or 0.0)
            gap_nats = canary.gap_nats
            gap = "its token is none of the likeliest" if gap_nats is None else f"{gap_nats:.1f} nats apart"
            yield Flag(
                "canary-failed",
                f"trial {trial + 1}, {pair or self.info.url}: {len(wrong)} of {len(here)} answers under load are wrong, first that of "
                f"request {record.id}, sent at {record.sent_s or 0.0:.2f} s: token {(canary.equal_tokens or 0) + 1} is not that of "
                f"{self.source} ({gap})",
            )
        for trial in sorted({record.trial for record, _ in judged}):
            verdicts = [canary.verdict for record, canary in judged if record.trial == trial]
            undecided = verdicts.count("undecided") + verdicts.count("near-tie")
            if too_many(undecided, len(verdicts)):
                yield Flag(
                    "canary-failed",
                    f"trial {trial + 1}: {undecided} of {len(verdicts)} answers under load part from those of {self.source}: each alone may "
                    "be a near tie, so many are not",
                )

    def _unvisited(self, judged: Sequence[tuple[RequestRecord, Canary]], pairs: dict[str, str]) -> Iterator[Flag]:
        prefill, decode = (
            [server.name for server in self.info.servers if server.role == role] for role in ("prefill", "decode")
        )
        visited = {pairs[record.id] for record, _ in judged if record.id in pairs}
        missing = {f"{p} -> {d}" for p, d in itertools.product(prefill, decode)} - visited
        if judged and missing and not self.info.config.get("disaggregate_above"):
            yield Flag("pair-unchecked", f"no answer under load was checked of {', '.join(sorted(missing))}")


def _places(config: LoadConfig, trial: int, least: int) -> list[int]:
    """Which of a trial's requests are canaries: evenly over it; ever further apart where nobody knows how many there will be."""
    if not config.canaries:
        return []
    if plan.is_endless(config):
        return sorted({round(_GROWTH**place) for place in range(_ENDLESS)})
    total = plan.request_count(config, trial)
    count = min(total, max(least, math.ceil(config.canaries * total)))
    return [int((place + 0.5) * total / count) for place in range(count)]


def _check_greedy(config: LoadConfig) -> None:
    """Raises UserError for a load whose requests have no one right answer."""
    extra = request_fields.extra_body(config)
    if "temperature" in dropped_fields(vars(config)):
        raise UserError("without the field temperature, outputs are not greedy")
    for name in ("n", "best_of", "echo", "use_beam_search"):
        if extra.get(name) not in (None, False, 1):
            raise UserError(f"{name} in --extra-body asks for more than one greedy continuation")
