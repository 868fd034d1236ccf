"""The correctness gate: before figures count, outputs must be equal and decode must prove that prefill's KV reached it.

Fresh greedy prompts go to the deployment and to a reference (the single instance of the same run, or else the prefill
instance asked directly). vLLM's own counters on the decode side then say how much of the prompts came as external KV.
"""

import http.client
import json
import re
from urllib.parse import urlsplit

from pdbench.errors import UserError
from pdbench.http import get
from pdbench.records import Gate
from pdbench.serving.deployment_info import DeploymentInfo

_TEXTS = (
    "{nonce}. Explain in one sentence why prefill is bound by compute and decode by memory bandwidth.",
    "Note {nonce}. A ship leaves the harbour. Describe what the captain sees, hears and hopes for before the night.",
    "编号 {nonce}。请用两句话说明为什么要把预填充和解码分开，并给出一个例子。",
    "At {nonce} seconds, list three uses of a clock, then compare them: which is the oldest, which is the strangest, and why?",
)
# The nonce stands at the front: a prefix that decode has cached from an earlier gate would not have to come from prefill.
OUTPUT_TOKENS = 16


def prompts(nonce: int) -> list[str]:
    """Prompts that no prefix cache has seen, if `nonce` is new."""
    return [text.format(nonce=nonce) for text in _TEXTS]


def answers(url: str, model: str, texts: list[str], timeout_s: float = 120.0) -> list[tuple[str, int]]:
    """Each prompt's greedy output and prompt length in tokens, one at a time. Raises UserError when a request fails."""
    return [_answer(url, model, text, timeout_s) for text in texts]


def _answer(url: str, model: str, text: str, timeout_s: float) -> tuple[str, int]:
    body = {
        "model": model,
        "prompt": text,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "seed": 0,
        # As the load asks, so that what is checked is what is measured.
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        reply = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"{url} did not answer the gate's request ({type(error).__name__}: {error}): read the logs"
        ) from None
    finally:
        connection.close()
    try:
        events = [json.loads(line[6:]) for line in reply.splitlines() if line.startswith("data: {")]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        return text, events[-1]["usage"]["prompt_tokens"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{url} refused the gate's request ({response.status}: {reply[:300]}): read the logs") from None


def external_kv_tokens(urls: list[str]) -> int | None:
    """Prompt tokens that these servers took from external KV so far, by vLLM's counter; None when it has none.

    Raises UserError when one of them does not tell: nothing would be known then.
    """
    found = []
    for url in urls:
        answer = get(url, "/metrics", timeout_s=10.0)
        if answer is None:
            raise UserError(
                f"{url}/metrics does not answer, without which no KV can be proven to have come: read the logs"
            )
        text = answer.decode()
        pattern = r'^vllm:prompt_tokens_by_source_total\{[^}]*source="external_kv_transfer"[^}]*\} ([0-9.e+]+)$'
        found += re.findall(pattern, text, flags=re.MULTILINE)
    return int(sum(map(float, found))) if found else None


def check(
    running: DeploymentInfo,
    nonce: int,
    reference: list[str] | None,
    output: list[tuple[str, int]],
    external: int | None,
) -> Gate:
    """Judge `output` (text, prompt tokens) against `reference`; `external` is the growth of decode's counter over them."""
    texts = prompts(nonce)
    tokens = sum(length for _, length in output)
    equal = None if reference is None else sum(a == b for a, (b, _) in zip(reference, output, strict=True))
    problems, unknown = [], []
    if equal is None:
        unknown.append("no reference to compare outputs with")
    elif equal < len(texts):
        problems.append(f"only {equal} of {len(texts)} greedy outputs equal the reference's")
    if running.name == "disaggregated":
        if external is None:
            unknown.append("this vLLM has no counter of external KV tokens")
        elif external < tokens - len(texts):  # decode may recompute the last token of each prompt
            problems.append(
                f"decode took {external} of {tokens} prompt tokens from prefill and computed the rest itself"
            )
    proof = "" if external is None else f"; {external} of {tokens} prompt tokens came to decode as external KV"
    detail = "; ".join(problems + unknown) or f"{equal} of {len(texts)} greedy outputs equal{proof}"
    return Gate(
        passed=not problems,
        prompts=len(texts),
        equal_outputs=equal,
        prompt_tokens=tokens,
        external_kv_tokens=external,
        detail=detail,
    )


def run(running: DeploymentInfo, nonce: int, reference: list[str] | None) -> tuple[Gate, list[str]]:
    """Send the prompts through `running`; returns the verdict and the outputs, which may be the next one's reference."""
    texts = prompts(nonce)
    before = external_kv_tokens(running.decode_urls())
    output = answers(running.url, running.model_name, texts)
    after = external_kv_tokens(running.decode_urls())
    direct = running.prefill_url()
    if reference is None and direct and running.config.get("connector_used") != "builtin-p2p-nccl":
        # Prefill can answer by itself; vLLM's own P2P connector cannot, it wants both addresses in every request id.
        reference = [text for text, _ in answers(direct, running.model_name, texts)]
    external = None if after is None else after - (before or 0)
    return check(running, nonce, reference, output, external), [text for text, _ in output]
