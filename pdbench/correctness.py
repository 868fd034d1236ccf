"""Before figures count: are outputs equal to a reference's, and did decode get all its KV from prefill?

Fresh greedy prompts go to the deployment and to a reference (the single instance of the same run, else the prefill instance
itself) as the load's requests do, so that what is checked is what is measured. vLLM's own counters on the decode side then say
how much of the prompts came as external KV.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from pdbench.answers import LIKELIEST, TOKENS, Answer, compare, follow, read, too_many
from pdbench.errors import UserError
from pdbench.http import request
from pdbench.load.client import fetch
from pdbench.records import Canary, Gate, RequestRecord
from pdbench.server_metrics import figures, scrape
from pdbench.serving.deployment import DeploymentInfo

# The nonce stands at the front: a prefix that decode has cached from an earlier check would not have to come from prefill.
_TEXTS = (
    "{nonce}. Explain in one sentence why prefill is bound by compute and decode by memory bandwidth.",
    "Note {nonce}. A ship leaves the harbour. Describe what the captain sees, hears and hopes for before the night.",
    "编号 {nonce}。请用两句话说明为什么要把预填充和解码分开，并给出一个例子。",
    "At {nonce} seconds, list three uses of a clock, then compare them: which is the oldest, which is the strangest, and why?",
)
# Also where --disaggregate-above lets decode compute prompts as short as these: the transfer is what is checked.
_THROUGH_PREFILL = {"X-Pdbench-Disaggregate": "always"}
PATIENCE_S = 120.0
SOUND = ("equal", "near-tie")


def run(
    running: DeploymentInfo, nonce: int, reference: Sequence[RequestRecord] | None
) -> tuple[Gate, list[RequestRecord]]:
    """Send the prompts through `running`; returns the verdict and the answers, which may be the next check's reference.

    `nonce` must be new for every check. Raises UserError when a request fails or a decode server does not report its counters.
    """
    before = _external_kv_tokens(running.urls("decode"))
    outputs = _outputs(running.url, running.model_name, nonce)
    after = _external_kv_tokens(running.urls("decode"))
    # Prefill alone can answer too, but not with vLLM's own P2P connector, which wants both addresses in every request id.
    direct = running.urls("prefill") if running.config.get("connector_used") != "builtin-p2p-nccl" else []
    if reference is None and direct:
        reference = _outputs(direct[0], running.model_name, nonce)
    verdicts = None
    if reference is not None:
        bodies = [_body(running.model_name, text, nonce) for text in _TEXTS]
        triples = zip(bodies, outputs, reference, strict=True)
        found = [_verdict(direct[0] if direct else None, *each) for each in triples]
        verdicts = [each if each in SOUND else f"prompt {number} {each}" for number, each in enumerate(found, 1)]
    external = None if after is None else after - (before or 0)
    tokens = sum(record.prompt_tokens or 0 for record in outputs)
    return check(len(outputs), verdicts, tokens, external, needs_kv=running.name == "disaggregated"), outputs


def check_key() -> None:
    """Raises UserError, before a proxy is started, when it would refuse what we send to it."""
    key, sent = os.environ.get("PDBENCH_PROXY_API_KEY"), os.environ.get("OPENAI_API_KEY", "").strip()
    if key and key != sent:
        raise UserError("PDBENCH_PROXY_API_KEY is set, so the proxy refuses other keys: set OPENAI_API_KEY to the same")


def check(
    prompts: int,
    verdicts: Sequence[str] | None,
    prompt_tokens: int,
    external_kv_tokens: int | None,
    *,
    needs_kv: bool,
) -> Gate:
    """Judge outputs by their verdicts ("equal", "near-tie", else what is wrong; None: no reference) and, with `needs_kv`, by how far decode's
    counter of external KV grew over them."""
    equal = None if verdicts is None else verdicts.count("equal")
    wrong = [each for each in verdicts or () if each not in SOUND]
    near_ties = 0 if verdicts is None else verdicts.count("near-tie")
    problems, unknown = [], []
    if equal is None:
        unknown.append("no reference to compare outputs with")
    elif wrong or too_many(near_ties, prompts):
        why = wrong[0] if wrong else "each alone may be a near tie, so many are not"
        problems += [f"only {equal} of {prompts} greedy outputs equal the reference's", why]
    if needs_kv and external_kv_tokens is None:
        unknown.append("this vLLM has no counter of external KV tokens")
    elif needs_kv and (external_kv_tokens or 0) < prompt_tokens - prompts:  # decode may recompute one token per prompt
        taken = f"{external_kv_tokens} of {prompt_tokens} prompt tokens"
        problems.append(f"decode took {taken} from prefill and computed the rest itself")
    detail = f"{equal} of {prompts} greedy outputs equal" + (f", {near_ties} but for near ties" if near_ties else "")
    if external_kv_tokens is not None:
        detail += f"; {external_kv_tokens} of {prompt_tokens} prompt tokens came to decode as external KV"
    return Gate(
        passed=not problems,
        prompts=prompts,
        equal_outputs=equal,
        prompt_tokens=prompt_tokens,
        external_kv_tokens=external_kv_tokens,
        detail="; ".join(problems + unknown) or detail,
    )


def _body(model: str, text: str, nonce: int) -> dict[str, Any]:
    prompt = text.format(nonce=nonce)
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "seed": 0}


def _verdict(url: str | None, body: dict[str, Any], output: RequestRecord, reference: RequestRecord) -> str:
    """ "equal", "near-tie", or what is wrong. Where they differ, the instance at `url` says how likely tokens are."""
    if output.text == reference.text:
        return "equal"
    ids = [record.canary.token_ids if record.canary else [] for record in (output, reference)]
    if (
        url is None or not ids[0] or len(ids[0]) != len(ids[1]) or ids[0] == ids[1]
    ):  # too short, or another text of the same tokens
        return "has another answer"

    def ask(prompt: str | Sequence[int], tokens: int) -> Answer:
        """The greedy answer with the likeliest tokens at every place. Raises OSError where there is none."""
        asked = {"logprobs": LIKELIEST, "return_tokens_as_token_ids": True, "return_token_ids": True}
        sent = json.dumps(body | asked | {"prompt": prompt, "max_tokens": tokens}).encode()
        status, content = request(url, "/v1/completions", timeout_s=PATIENCE_S, body=sent)
        if status != 200:
            raise OSError(f"{url} answers {status}")
        return read(content)

    try:
        answer = ask(body["prompt"], TOKENS)
        for record, token_ids in zip((output, reference), ids, strict=True):
            verdict, place, gap = compare(answer, token_ids, record.text)
            if verdict == "undecided":
                verdict, place, gap = follow(answer, token_ids, place, ask)
            if verdict not in SOUND:
                apart = f", {gap:.1f} nats apart" if gap is not None else ""
                return "has another answer" + (f" from token {place + 1} on{apart}" if place is not None else "")
    except OSError as error:
        return f"has another answer, perhaps at a near tie: {error}"
    return "near-tie"


def _outputs(url: str, model: str, nonce: int) -> list[RequestRecord]:
    """The greedy outputs to the prompts, one request at a time, each by another pair of instances."""
    records = [
        fetch(url, _body(model, text, nonce), header=_THROUGH_PREFILL, canary=Canary(number=number))
        for number, text in enumerate(_TEXTS)
    ]
    for record in records:
        if record.error or record.prompt_tokens is None:
            reason = f"{record.error.kind}: {record.error.message}" if record.error else "no prompt_tokens in its usage"
            keyed = record.error is not None and record.error.kind in ("http_401", "http_403")
            remedy = "set OPENAI_API_KEY to a key that it takes" if keyed else "read the logs"
            raise UserError(f"{url} failed a request of the correctness check ({reason}): {remedy}")
    return records


def _external_kv_tokens(urls: Sequence[str]) -> int | None:
    """Prompt tokens that these servers took from external KV so far, by vLLM's counter; None when it has none."""
    counts = []
    for url in urls:
        page = scrape(url, timeout_s=10.0)
        if page is None:
            raise UserError(f"{url}/metrics does not answer, so no KV can be proven to have come: read the logs")
        if (tokens := figures(page).get("external_tokens")) is not None:
            counts.append(tokens)
    return int(sum(counts)) if counts else None
