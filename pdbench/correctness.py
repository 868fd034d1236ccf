"""Before figures count: are outputs equal to a reference's, and did decode get all its KV from prefill?

Fresh greedy prompts go to the deployment and to a reference (the single instance of the same run, else the prefill instance
itself) as the load's requests do, so that what is checked is what is measured. vLLM's own counters on the decode side then say
how much of the prompts came as external KV.
"""

import os
from collections.abc import Sequence

from pdbench.errors import UserError
from pdbench.load.client import fetch
from pdbench.records import Gate, RequestRecord
from pdbench.server_metrics import scrape, total
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
_EXTERNAL_KV = ("vllm:prompt_tokens_by_source_total", 'source="external_kv_transfer"')


def run(running: DeploymentInfo, nonce: int, reference: Sequence[str] | None) -> tuple[Gate, list[str]]:
    """Send the prompts through `running`; returns the verdict and the outputs, which may be the next check's reference.

    `nonce` must be new for every check. Raises UserError when a request fails or a decode server does not report its counters.
    """
    before = _external_kv_tokens(running.urls("decode"))
    records = _outputs(running.url, running.model_name, nonce)
    after = _external_kv_tokens(running.urls("decode"))
    direct = running.urls("prefill")
    if reference is None and direct and running.config.get("connector_used") != "builtin-p2p-nccl":
        # Prefill alone can answer too, but not with vLLM's own P2P connector, which wants both addresses in every request id.
        reference = [record.text for record in _outputs(direct[0], running.model_name, nonce)]
    external = None if after is None else after - (before or 0)
    tokens = sum(record.prompt_tokens or 0 for record in records)
    outputs = [record.text for record in records]
    return check(outputs, reference, tokens, external, needs_kv=running.name == "disaggregated"), outputs


def check_key() -> None:
    """Raises UserError, before a proxy is started, when it would refuse what we send to it."""
    key, sent = os.environ.get("PDBENCH_PROXY_API_KEY"), os.environ.get("OPENAI_API_KEY", "").strip()
    if key and key != sent:
        raise UserError("PDBENCH_PROXY_API_KEY is set, so the proxy refuses other keys: set OPENAI_API_KEY to the same")


def check(
    outputs: Sequence[str],
    reference: Sequence[str] | None,
    prompt_tokens: int,
    external_kv_tokens: int | None,
    *,
    needs_kv: bool,
) -> Gate:
    """Judge `outputs` by `reference` and, with `needs_kv`, by how far decode's counter of external KV grew over them."""
    prompts = len(outputs)
    equal = None if reference is None else sum(a == b for a, b in zip(outputs, reference, strict=True))
    problems, unknown = [], []
    if equal is None:
        unknown.append("no reference to compare outputs with")
    elif equal < prompts:
        problems.append(f"only {equal} of {prompts} greedy outputs equal the reference's")
    if needs_kv and external_kv_tokens is None:
        unknown.append("this vLLM has no counter of external KV tokens")
    elif needs_kv and (external_kv_tokens or 0) < prompt_tokens - prompts:  # decode may recompute one token per prompt
        taken = f"{external_kv_tokens} of {prompt_tokens} prompt tokens"
        problems.append(f"decode took {taken} from prefill and computed the rest itself")
    detail = f"{equal} of {prompts} greedy outputs equal"
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


def _outputs(url: str, model: str, nonce: int) -> list[RequestRecord]:
    """The greedy outputs to the prompts, one request at a time."""
    options = {"model": model, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "seed": 0}
    records = [fetch(url, {"prompt": text.format(nonce=nonce), **options}, header=_THROUGH_PREFILL) for text in _TEXTS]
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
        counts.append(total(page, *_EXTERNAL_KV))
    known = [count for count in counts if count is not None]
    return int(sum(known)) if known else None
