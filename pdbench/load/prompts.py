"""Prompts: real English and Chinese texts, exact token lengths, shared prefixes and blocks; those of files.

Same seed, same bytes, on every machine; every prompt begins with its own number, so that no prefix cache answers by chance.
Seeds of texts hold the measurement's nonce, so that no cache knows them from an earlier one.
"""

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

from pdbench.config import LoadConfig
from pdbench.errors import UserError, in_line
from pdbench.load.input_files import InputFile, blank, short
from pdbench.load.request_fields import Prompt, ignores_eos
from pdbench.load.tokenizer import Tokenizer

_QUESTIONS = 16
_NUMBER_TOKENS = 16
_SENTENCE, _WORD = "No. 1.", 8
_FILLERS = (" a", "a", " 1", "1", ".", "\n", " the", "的", "e", "!")
_FORMS = (
    'give text, a list of token ids, {"prompt": ...}, {"text": ...}, {"question": ...}, {"instruction": ..., "input": ...}, '
    '{"messages": [...]} or ShareGPT {"conversations": [...]}'
)
_TURNS = ("conversations", "conversation", "messages", "turns")
_PROMPT = (
    "prompt", "text", "text_input", "question", "query", "instruction", "input", "content", "problem", "prompt_token_ids", "input_ids",
    "token_ids", "texts",
)  # fmt: skip
_REPLY = ("reply", "response", "output", "answer", "completion", "chosen", "target")
_PERSON = ("human", "user", "prompter", "person")
_BEFORE = ("system", "developer")
_MODEL = ("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard")


def exact_text(sentences: Iterator[str], tokens: int, tokenizer: Tokenizer, start: str = "") -> str:
    """`start` continued by `sentences` to exactly `tokens` tokens. Raises UserError where the tokenizer allows no such text."""
    text, own = start, tokens - tokenizer.added
    while (missing := own - len(ids := tokenizer.encode(text))) > 0:
        # Doubling the look-ahead keeps the number of encodings small for very long prompts.
        added = 0
        while added < missing:
            sentence = next(sentences)
            text, added = text + sentence, added + max(1, len(sentence) // 4)
    text = tokenizer.decode(ids[: max(0, own)]).replace("\N{REPLACEMENT CHARACTER}", "")
    for _ in range(4 * tokens + 64):
        count = tokenizer.count(text)
        if count == tokens:
            return text
        if count > tokens:
            text = text[:-1]
            continue
        grown = ((text + filler, tokenizer.count(text + filler)) for filler in _FILLERS)
        text = next((longer for longer, size in grown if count < size <= tokens), text[:-1])
        if not text:
            break
    raise UserError(f"no text of exactly {tokens} tokens with this tokenizer: ask for more --input-tokens")


@functools.cache
def passages() -> tuple[str, ...]:
    """The built-in texts: the first 16 are questions, the rest is prose that long prompts are made of."""
    text = resources.files("pdbench.load").joinpath("texts.txt").read_text(encoding="utf-8")
    return tuple(part.strip() for part in text.split("\n\n") if part.strip())


@functools.cache
def _sentences() -> tuple[str, ...]:
    """Each after a space."""
    sentence = re.compile(r"[^.?!\u3002\uff1f\uff01]+[.?!\u3002\uff1f\uff01]+[\"\u201d]?")
    return tuple(f" {part.strip()}" for text in passages() for part in sentence.findall(text))


class _Known(NamedTuple):
    """How many tokens each sentence has within a text; `rest` encodes what follows a sentence."""

    tokens: dict[str, int]
    rest: Tokenizer


@functools.lru_cache(maxsize=8)
def _known_sentences(tokenizer: Tokenizer) -> _Known | None:
    """None where a text of sentences may have other tokens than its sentences: most tokenizers begin a token at every space."""
    if tokenizer.is_remote:  # hundreds of questions
        return None
    rest = tokenizer.after(_SENTENCE)
    # Every sentence may follow every other: the last word of each before the first of each.
    firsts = sorted({f" {sentence[1:].partition(' ')[0]}"[:_WORD] for sentence in _sentences()})
    lasts = sorted({f" {sentence.rpartition(' ')[2][-_WORD:]}" for sentence in _sentences()})
    texts: list[Sequence[str]] = [[part for first in firsts for part in (last, first)] for last in lasts]
    texts += [_sentences(), _sentences()[::-1]]
    ids = {part: rest.encode(part) for part in {*firsts, *lasts, *_sentences()}}
    for parts in texts:
        if rest.encode("".join(parts)) != [id_ for part in parts for id_ in ids[part]]:
            return None
    text = "".join(_sentences())
    if rest.decode(rest.encode(text)) != text:
        return None
    return _Known({sentence: len(ids[sentence]) for sentence in _sentences()}, rest)


def built_in(index: int, seed: str) -> str:
    """The built-in question of this index (20 to 100 words or characters), numbered by `seed`."""
    return f"{number(seed)} {passages()[index % _QUESTIONS]}"


def sentences_in_random_order(seed: str) -> Iterator[str]:
    """Endless real sentences, drawn by `seed`."""
    generator = random.Random(f"text/{seed}")
    while True:
        yield _sentences()[int(generator.random() * len(_sentences()))]


def of_length(tokens: int, seed: str, tokenizer: Tokenizer, *, shared: float = 0.0, group: str = "0") -> str:
    """A prompt of exactly `tokens` tokens, whose first `shared` (0 to 1) is the same for all prompts of a group and length."""
    prefix_tokens = round(tokens * shared)
    start = _shared_prefix(prefix_tokens, group, tokenizer) if prefix_tokens > 1 else ""
    if shared < 1:
        start += ("\n" if start else "") + number(seed)
    if tokenizer.count(start) > tokens:
        start = tokenizer.cut(start, max(1, tokens - 1))
    text = _of_known_sentences(tokens, seed, tokenizer, start) if shared < 1 else None
    return text or exact_text(sentences_in_random_order(seed), tokens, tokenizer, start)


def _of_known_sentences(tokens: int, seed: str, tokenizer: Tokenizer, start: str) -> str | None:
    """What `exact_text` gives after a `start` that ends as a sentence, many times as fast: only the last two sentences are encoded.

    None for a text that is too short for it, or where the tokenizer does not allow it.
    """
    known, left = _known_sentences(tokenizer), tokens - tokenizer.count(start)
    if known is None:
        return None
    chosen: list[str] = []
    sentences = sentences_in_random_order(seed)
    while left > 0:
        chosen.append(next(sentences))
        left -= known.tokens[chosen[-1]]
    if len(chosen) < 3:
        return None
    left += sum(known.tokens[sentence] for sentence in chosen[-2:])
    with suppress(UserError):
        end = exact_text(sentences, left, known.rest, "".join(chosen[-2:]))
        if end.startswith(chosen[-2]):
            return "".join((start, *chosen[:-2], end))
    return None


def of_blocks(
    tokens: int,
    block_ids: Sequence[Hashable],
    block_tokens: int,
    group: str,
    seed: str,
    tokenizer: Tokenizer,
    *,
    may_be_ids: bool = False,
) -> Prompt:
    """A prompt of blocks that are equal wherever their id is in a group (Mooncake's hash_ids), exactly `tokens` long in all.

    Equal ids and lengths give equal prompts; what no id names is this prompt's own, by `seed`. What the server puts before a
    prompt takes the first tokens' place, so that blocks stand where the server's own blocks do. It is a text; where the
    tokenizer would make other tokens of that, it is token ids with `may_be_ids`, else a text that is adjusted at its end.
    """
    ids = [id_ for block in block_ids for id_ in _block(f"{group}/block/{block!r}", block_tokens, tokenizer)]
    if len(ids) < tokens:
        ids += _block(f"{seed}/rest", tokens - len(ids), tokenizer)
    ids = ids[tokenizer.added : tokens]
    text = tokenizer.decode(ids)
    if tokenizer.encode(text) == ids:
        return text
    if may_be_ids and len(tokenizer.start) == tokenizer.added:
        return (*tokenizer.start, *ids)
    return exact_text(sentences_in_random_order(seed), tokens, tokenizer, text)


def length(mean: int, distribution: str, spread: float, seed: str) -> int:
    """One length: fixed; uniform in mean * (1 +- spread); lognormal of this mean with sigma = spread. At least 1."""
    if distribution == "fixed":
        return mean
    uniform = random.Random(f"length/{seed}").random()
    if distribution == "uniform":
        return max(1, round(mean * (1 - spread + 2 * spread * uniform)))
    normal = NormalDist().inv_cdf(min(max(uniform, 1e-12), 1 - 1e-12))
    return max(1, round(mean * math.exp(spread * normal - spread**2 / 2)))


def describe_lengths(config: LoadConfig) -> list[str]:
    """The lengths that a load's options set, and what prompts share; those of a trace or file only as they are cut."""
    inputs = None if config.trace or config.prompt_file else config.input_tokens
    outputs = None if config.trace or config.reply_lengths else config.output_tokens
    sides = [
        ("in", inputs, config.input_distribution, config.input_spread, config.max_input_tokens),
        ("out", outputs, config.output_distribution, config.output_spread, config.max_output_tokens),
    ]
    if config.phase == "prefill":
        sides[1] = "out", 1, "fixed", 0.0, None
    words = []
    for way, tokens, distribution, spread, most in sides:
        bound = "at most " if way == "out" and not ignores_eos(config) else ""
        shape = "" if distribution == "fixed" else f" ({distribution} with spread {spread:g})"
        words += [f"{bound}{tokens:,} token{'s' if tokens > 1 else ''} {way}{shape}"] if tokens else []
        words += [f"at most {most:,} tokens {way}"] if most else []
    if config.shared_prefix:
        groups = f" in {config.prefix_groups:,} groups" if config.prefix_groups > 1 else ""
        words.append(f"{100 * config.shared_prefix:g} % of each prompt shared{groups}")
    return words


@functools.lru_cache(maxsize=4096)
def _block(seed: str, tokens: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids by `seed`: its number, then sentences; a block too short for a number is of random tokens."""
    sentences, ids_of_sentences = _sentence_ids(tokenizer)
    draw = random.Random(f"ids/{seed}").random
    if tokens < _NUMBER_TOKENS:
        return tuple(ids_of_sentences[int(draw() * len(ids_of_sentences))] for _ in range(tokens))
    ids = tokenizer.encode(f" {number(seed)}")
    while len(ids) < tokens:
        ids += sentences[int(draw() * len(sentences))]
    return tuple(ids[:tokens])


@functools.lru_cache(maxsize=4)
def _sentence_ids(tokenizer: Tokenizer) -> tuple[list[list[int]], list[int]]:
    """English sentences, whose tokens can be cut anywhere and remain text, and these tokens."""
    sentences = [tokenizer.encode(sentence) for sentence in _sentences() if sentence.isascii()]
    return sentences, sorted({id_ for ids in sentences for id_ in ids})


@functools.lru_cache(maxsize=4096)
def _shared_prefix(tokens: int, group: str, tokenizer: Tokenizer) -> str:
    start = number(group) if tokenizer.count(number(group)) <= tokens else ""
    return exact_text(sentences_in_random_order(f"shared/{group}"), tokens, tokenizer, start)


def number(seed: str) -> str:
    """What a prompt begins with: decimal digits, of which most tokenizers make the same number of tokens every time."""
    return f"No. {random.Random(f'number/{seed}').randrange(10**12):012d}."


class FilePrompt(NamedTuple):
    """A prompt, text or token ids, and the reply that the file has to it."""

    prompt: Prompt
    reply: str | None = None


@dataclass(frozen=True)
class PromptFile:
    """`prompts` are those that can be sent, of `total` rows; `notes` say what was left out, and why."""

    name: str
    prompts: list[FilePrompt]
    total: int
    unit: str
    notes: tuple[str, ...] = ()


class _NoQuestionError(Exception):
    """A conversation that does not begin with a person's words, or an empty prompt: left out, and counted."""


def read_prompt_file(path: Path) -> PromptFile:
    """The prompts of a file, packed or not. A text file holds one per paragraph; without an empty line in it, one per line.

    Raises UserError that names the file, the row and the forms which are read.
    """
    file = InputFile("--prompt-file", path)
    rows: list[tuple[int, Any]]
    if file.is_json:
        _, rows = file.json_rows()
    elif file.name.endswith((".csv", ".tsv")):
        rows = list(file.csv_rows())
    else:
        parts = re.split(r"\n\s*\n", file.text.strip())
        parts = parts if len(parts) > 1 else file.text.split("\n")
        rows = [(number, part.strip()) for number, part in enumerate(parts, 1) if part.strip()]
    prompts: list[FilePrompt] = []
    reasons: Counter[str] = Counter()
    conversations = 0
    for number, row in rows:
        try:
            conversations += _turns_of(row) is not None
            prompts.append(_prompt_of(row))
        except _NoQuestionError as reason:
            reasons[str(reason)] += 1
        except ValueError as error:
            raise file.error(number, f"{error}; {_FORMS}") from None
    notes = [f"{count} {reason} left out" for reason, count in reasons.items()]
    if not prompts:
        why = f" ({', '.join(notes)})" if notes else ""
        raise UserError(f"{file} holds no prompt{why}: {_FORMS}")
    if copies := len(prompts) - len({each.prompt for each in prompts}):
        notes.append(f"{copies} prompts equal another")
    unit = "conversations" if conversations * 2 > len(rows) else "prompts"
    return PromptFile(path.name, prompts, len(rows), unit, tuple(notes))


def prompt_file_of(config: LoadConfig) -> PromptFile:
    """The prompts of --prompt-file. Raises UserError."""
    file = read_prompt_file(Path(str(config.prompt_file)))
    if config.endpoint == "chat" and any(not isinstance(each.prompt, str) for each in file.prompts):
        raise UserError(f"--prompt-file {file.name} holds token ids, which a chat cannot take: --endpoint completions")
    return file


def _prompt_of(row: Any) -> FilePrompt:
    """Raises ValueError for what is no prompt, _NoQuestionError for what is left out."""
    turns = _turns_of(row)
    if not isinstance(row, dict):
        return FilePrompt(_content(row, "the prompt")) if turns is None else _first_question(turns)
    reply = next((row[key] for key in _REPLY if isinstance(row.get(key), str)), None)
    if turns is not None:
        question = _first_question(turns)
        return question._replace(reply=question.reply or reply)
    body = row.get("body")
    if isinstance(body, dict):  # a line of an OpenAI batch file
        return _prompt_of(body)
    key = next((key for key in _PROMPT if key in row), None)
    if key is None:
        raise ValueError(f"no prompt among the keys {in_line(*row) or '(none)'}")
    prompt = _content(row[key], key)
    further = row.get("input", row.get("context")) if key == "instruction" else None
    if isinstance(further, str) and not blank(further) and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{further}"
    return FilePrompt(prompt, reply)


def _turns_of(row: Any) -> Sequence[Any] | None:
    """The turns of a row that is a conversation, else None."""
    if isinstance(row, dict):
        turns = next((row[key] for key in _TURNS if isinstance(row.get(key), list)), None)
        if turns is None and isinstance(row.get("body"), dict):
            return _turns_of(row["body"])
        if turns is not None:
            return turns
        row = row.get("prompt")
    return row if isinstance(row, list) and row and all(isinstance(turn, dict) for turn in row) else None


def _first_question(turns: Sequence[Any]) -> FilePrompt:
    """The first words of a person, system turns before them left out, and the reply to them."""
    spoken: list[tuple[str, Any]] = []
    for turn in turns:
        if isinstance(turn, str):  # turns without speakers are a person's (MT-bench, AIPerf)
            spoken.append((_PERSON[0], turn))
        elif isinstance(turn, dict):
            who = str(turn.get("from") or turn.get("role") or turn.get("user") or "").lower()
            words = next((turn[key] for key in ("value", "content", "text", "prompt") if key in turn), None)
            spoken.append((who or _PERSON[0], words))
        else:
            raise ValueError(f"{short(turn)} among the turns is no turn")
    while spoken and spoken[0][0] in _BEFORE:
        spoken.pop(0)
    if not spoken or spoken[0][0] not in _PERSON or spoken[0][1] is None:
        raise _NoQuestionError("conversations without a person's question first")
    reply = None
    if len(spoken) > 1 and spoken[1][0] in _MODEL and spoken[1][1] is not None:
        with suppress(_NoQuestionError):
            reply = _content(spoken[1][1], "the reply")
    return FilePrompt(_content(spoken[0][1], "the question"), reply if isinstance(reply, str) else None)


def _content(value: Any, name: str) -> Prompt:
    """Text, the text parts of a list, or token ids. Raises ValueError or _NoQuestionError."""
    if value == [] or (isinstance(value, str) and blank(value)):
        raise _NoQuestionError("empty prompts")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} holds half of a character: {value!a:.80}") from None
        return value
    if isinstance(value, list):
        if all(type(part) is int and part >= 0 for part in value):
            return tuple(value)
        if len(value) == 1 and isinstance(value[0], str | list):
            return _content(value[0], name)
        if all(isinstance(part, dict) for part in value):
            texts = [part.get("text", part.get("content", part.get("contents"))) for part in value]
            texts = [text[0] if isinstance(text, list) and text else text for text in texts]
            # Pictures and other parts have no text.
            words = "".join(text for text in texts if isinstance(text, str))
            if blank(words):
                raise _NoQuestionError("prompts without text")
            return _content(words, name)
    raise ValueError(f"{name} is {short(value)}")
