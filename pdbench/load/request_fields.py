"""The JSON body of a request, the fields that a server refuses, and what a body says about its answer's length."""

import json
import re
from collections.abc import Collection
from typing import Any

import msgspec

from pdbench.config import LoadConfig, dropped_fields
from pdbench.errors import NOT_JSON, OptionError
from pdbench.load.chunks import count
from pdbench.load.texts import bytes_of
from pdbench.records import Flag

Prompt = str | tuple[int, ...]
"""Text, or token ids."""
_NEEDED_FIELDS = {"model", "prompt", "messages", "stream"}
# Fields that a request can do without; the name alone in an error is enough, or only with words that refuse it.
_OPTIONAL_FIELDS = ("return_token_ids", "ignore_eos", "stream_options")
_LENGTH_FIELDS = ("max_tokens", "max_completion_tokens")
_REFUSAL = re.compile(
    "unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|forbidden|not accepted|additional propert"
    "|invalid (param|argument|field|propert)|does not exist|instead",
    re.IGNORECASE,
)


def extra_body(config: LoadConfig) -> dict[str, Any]:
    """The fields of --extra-body that are sent. Raises UserError where it or --drop-fields cannot be used."""
    dropped = dropped_fields(vars(config))
    if needed := _NEEDED_FIELDS & dropped:
        raise OptionError(f"--drop-fields {' '.join(sorted(needed))}: no request can do without")
    try:
        # NaN would be sent as null.
        extra = json.loads(config.extra_body, parse_constant=_no_json) if config.extra_body else {}
        msgspec.json.encode(extra)
    except NOT_JSON as error:
        raise OptionError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise OptionError("--extra-body must be a JSON object, as in '{\"top_k\": 1}'")
    if own := _NEEDED_FIELDS & extra.keys():
        raise OptionError(
            f"--extra-body sets {' '.join(sorted(own))}, which the load sets: give --model, --prompt-file or --input-tokens"
        )
    return {name: value for name, value in extra.items() if name not in dropped}


def _no_json(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def ignores_eos(config: LoadConfig) -> bool:
    """Are answers as long as was asked, even past the model's end? By default where the options set lengths."""
    sets_lengths = bool(config.input_tokens or config.trace or config.phase != "both")
    return sets_lengths if config.ignore_eos is None else config.ignore_eos


def request_body(
    config: LoadConfig,
    model: str,
    prompt: Prompt,
    output_tokens: int,
    refused: Collection[str] = (),
    *,
    greedy: bool = False,
) -> bytes:
    """The JSON body of one request, without the fields that the server refuses; `greedy` whatever the load's temperature is."""
    chat = config.endpoint == "chat"
    body: dict[str, Any] = {
        "model": model,
        "messages" if chat else "prompt": [{"role": "user", "content": prompt}] if chat else prompt,
        config.max_tokens_field: output_tokens,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.token_ids:
        body["return_token_ids"] = True
    if ignores_eos(config):
        body["ignore_eos"] = True
    for name in refused:
        body.pop(name, None)
        if name in _LENGTH_FIELDS:
            body[_other_length_field(name)] = output_tokens
    if config.extra_body:
        body |= extra_body(config)
    if greedy and "temperature" in body:
        body["temperature"] = 0.0
    for name in dropped_fields(vars(config)):
        body.pop(name, None)
    return msgspec.json.encode(body)


def refused_fields(config: LoadConfig, message: str, refused: Collection[str]) -> list[str]:
    """The fields that a server's error names as refused and that a request can do without, or under another name.

    `refused` are those that it was sent without already; fields that the user asked for are none of them.
    """
    sent = {*_OPTIONAL_FIELDS, "temperature", config.max_tokens_field} - set(refused) - extra_body(config).keys()
    if config.ignore_eos:
        sent.discard("ignore_eos")
    if config.temperature:
        sent.discard("temperature")
    named = [name for name in sent if re.search(rf"(?<![A-Za-z_]){name}(?![A-Za-z_])", message)]
    return sorted(name for name in named if name in _OPTIONAL_FIELDS or _REFUSAL.search(message))


def refusal_flags(refused: Collection[str]) -> list[Flag]:
    """What a reader must know of requests that were sent again without some fields."""
    flags = []
    if "return_token_ids" in refused:
        flags.append(Flag("token-ids-refused", "the server refuses return_token_ids: tokens are counted by chunks"))
    if others := sorted(set(refused) - {"return_token_ids"}):
        effects = {
            "ignore_eos": "outputs may be shorter than --output-tokens",
            "stream_options": "usage may be missing",
            "temperature": "sampling is the server's",
        }
        effects |= {name: f"sent as {_other_length_field(name)}" for name in _LENGTH_FIELDS}
        what = ", ".join(f"{name} ({effects[name]})" for name in others)
        flags.append(Flag("fields-refused", f"the server refuses {what}: requests were sent again without"))
    return flags


def _other_length_field(name: str) -> str:
    return _LENGTH_FIELDS[1 - _LENGTH_FIELDS.index(name)]


class Asked(msgspec.Struct, gc=False):
    """The fields of the body as they were sent."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    n: Any = None
    best_of: Any = None
    stop: Any = None
    echo: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def choices(self) -> int:
        return max(1, count(self.n) or 1)

    @property
    def counted_choices(self) -> int:
        """The most choices that usage counts: those of which the best are sent, too."""
        return max(self.choices, count(self.best_of) or 1)

    @property
    def end_tokens(self) -> int:
        """The most tokens that end a choice and are not sent: one, or a stop string's, of a byte at least."""
        stops = self.stop if isinstance(self.stop, list) else [self.stop]
        return max((bytes_of([stop]) for stop in stops if isinstance(stop, str) and stop), default=1)

    @property
    def limit(self) -> int | None:
        """The most tokens of a choice; None without a limit."""
        most = count(self.max_tokens) or count(self.max_completion_tokens)
        return most if most is not None and most > 0 else None

    @property
    def tokens(self) -> int | None:
        """The most tokens that usage counts; None without a limit."""
        return None if self.limit is None else self.limit * self.counted_choices

    @property
    def fewest(self) -> int | None:
        """The fewest tokens that all choices together must have; None where any number will do."""
        least, most = count(self.min_tokens) or 0, self.limit
        if self.ignore_eos and most is not None:
            return most * self.choices
        return (least if most is None else min(least, most)) * self.choices if least > 0 else None


_decode = msgspec.json.Decoder(Asked).decode


def asked_of(body: bytes) -> Asked:
    """What a request's body asked for; nothing where it is not JSON."""
    try:
        return _decode(body)
    except msgspec.MsgspecError:
        return Asked()
