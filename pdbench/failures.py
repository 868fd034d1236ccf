"""Requests that failed, in words: by class, with what was said most often."""

from collections import Counter
from collections.abc import Mapping, Sequence

from pdbench.records import Flag, RequestRecord, Run

LIMIT_PCT = 1.0
"""Above this share of a run's measured requests its figures do not count, and the command ends with exit code 1."""
INTERRUPTED = "interrupted"
"""The class of what was in flight when the load was stopped: no failure of a server."""
NO_TOKENS = "no_tokens"
CUT_SHORT = ("server-died", "client-lost", "node-lost")
VOID = ("gate-failed", "canary-failed", "reference-wrong", *CUT_SHORT)
"""Flags of runs whose figures do not count: answers were wrong, or a trial was cut short."""


def describe(requests: Sequence[RequestRecord]) -> str | None:
    """What failed of measured requests: "3 of 100 requests failed: refused 2, http_500 1; most often refused: ..."; None for nothing."""
    said = Counter((kind, each.error.message if each.error else "") for each in requests if (kind := kind_of(each)))
    kinds = Counter[str]()
    for (kind, _), count in said.items():
        kinds[kind] += count
    if not kinds:
        return None
    classes = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    commonest = next(iter(kinds.most_common(1)))[0]
    message = next(message for (kind, message), _ in said.most_common() if kind == commonest)
    words = f"; most often {commonest}: {message[:200]}" if message else ""
    return f"{sum(kinds.values())} of {len(requests)} requests failed: {classes}{words}"


def too_many(errors: Mapping[str, int], sent: int) -> bool:
    """Did more fail than may? `errors`: class -> requests."""
    failed = sum(count for kind, count in errors.items() if kind != INTERRUPTED)
    return 100 * failed > LIMIT_PCT * sent


def void(flags: Sequence[Flag], errors: Mapping[str, int] | None, sent: int) -> str | None:
    """Why the figures of a run do not count, so that its command ends with exit code 1: the flag with its detail. None: they count.

    `errors` are its failed requests by class; None of a load that is meant to be too much, as a search's are.
    """
    for flag in flags:
        if flag.name in VOID:
            return f"{flag.name}: {flag.detail}; its figures do not count"
        if flag.name == "requests-failed" and errors is not None and too_many(errors, sent):
            return f"{flag.name}: {flag.detail} (over {LIMIT_PCT:g} %, its figures do not count)"
    return None


def cut_short(run: Run) -> set[int]:
    """The trials that Ctrl-C or a death cut short: those that a flag names, of others the last one."""
    named = {f"trial {trial.index + 1}": trial.index for trial in run.trials}
    cut = [flag.detail.partition(":")[0] for flag in run.flags if flag.name in (INTERRUPTED, *CUT_SHORT)]
    last = [trial.index for trial in run.trials[-1:] if any(not word.startswith("trial ") for word in cut)]
    return {*last, *(named[word] for word in cut if word in named)}


def remedy(kind: str) -> str:
    """What to do about requests that all failed with this class."""
    if kind == "refused":
        return "nothing listens there: start the servers, or give the address where they are"
    if kind == "connect":
        return "this host cannot reach it: check the address, the way there, and `ulimit -n`"
    if kind == "tls":
        return "check its certificate: SSL_CERT_FILE=FILE names its authority, --no-tls-verify takes any"
    if kind in ("timeout", "stall"):
        return "lower the load, raise --request-timeout-s or --read-timeout-s, or read the servers' logs"
    if kind in ("http_401", "http_403"):
        return "give a key that it takes, in OPENAI_API_KEY"
    if kind.startswith("http_4"):
        return "send what the server takes: its message says what it refuses"
    return "read the servers' logs"


def kind_of(request: RequestRecord) -> str | None:
    """The class of its failure; None where it succeeded, or was stopped with the load."""
    if request.error:
        return None if request.error.kind == INTERRUPTED else request.error.kind
    return None if request.token_s else NO_TOKENS
