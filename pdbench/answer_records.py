"""Checks of answers, as a run saves them: of its canaries and of its correctness gate."""

import msgspec


class Canary(msgspec.Struct, kw_only=True):
    """A measured request whose greedy answer was compared with a reference's: "equal", "near-tie" (equal but for choices between tokens
    that nearly tie), "undecided" (nobody says how likely tokens were), "wrong", or None, not judged.

    `number` counts those of its trial. After `equal_tokens` came the first difference that counts; there the reference's token is
    `gap_nats` more probable to it (None: unknown). `repeated`: the server may have had the prompt in a cache.
    """

    number: int
    token_ids: list[int] = []
    verdict: str | None = None
    equal_tokens: int | None = None
    gap_nats: float | None = None
    repeated: bool = False


class Gate(msgspec.Struct, kw_only=True):
    """The correctness gate: were outputs equal to the reference's, and did decode get all its KV? `canaries`: verdict -> how many."""

    passed: bool
    prompts: int
    equal_outputs: int | None
    prompt_tokens: int | None
    external_kv_tokens: int | None
    detail: str
    canaries: dict[str, int] = {}
