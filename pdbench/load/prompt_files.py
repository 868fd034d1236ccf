"""Prompts from files: ShareGPT and OpenAI conversations, JSON Lines and arrays, token ids, CSV, text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pdbench.errors import UserError
from pdbench.load import input_files

FORMS = (
    'give text, a list of token ids, {"prompt": ...}, {"text": ...}, {"question": ...}, {"instruction": ..., "input": ...}, '
    '{"messages": [...]} or ShareGPT {"conversations": [...]}'
)
Prompt = str | tuple[int, ...]
_TURNS = ("conversations", "conversation", "messages", "turns")
_PROMPT = (
    "prompt", "text", "text_input", "question", "query", "instruction", "input", "content", "problem", "prompt_token_ids", "input_ids",
    "token_ids", "texts",
)  # fmt: skip
_REPLY = ("reply", "response", "output", "answer", "completion", "chosen", "target")
_PERSON = ("human", "user", "prompter", "person")
_BEFORE = ("system", "developer")
_MODEL = ("gpt", "assistant", "model", "chatgpt", "bot", "bing", "bard")


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
    text = input_files.read_text("--prompt-file", path)
    rows: list[tuple[int, Any]] = []
    if input_files.looks_like_json(path, text) and text.strip():
        _, rows = input_files.json_rows("--prompt-file", path, text)
    elif input_files.base_name(path).endswith((".csv", ".tsv")):
        rows = list(input_files.csv_rows("--prompt-file", path, text)[1])
    else:
        parts = re.split(r"\n\s*\n", text.strip()) if re.search(r"\n\s*\n", text.strip()) else text.split("\n")
        rows = [(number, part.strip()) for number, part in enumerate(parts, 1) if part.strip()]
    prompts: list[FilePrompt] = []
    reasons: dict[str, int] = {}
    conversations = 0
    for number, row in rows:
        try:
            conversations += _turns_of(row) is not None
            prompts.append(_prompt_of(row))
        except _NoQuestionError as reason:
            reasons[str(reason)] = reasons.get(str(reason), 0) + 1
        except ValueError as error:
            raise UserError(f"--prompt-file {path}, row {number}: {error}; {FORMS}") from None
    notes = [f"{count} {reason} left out" for reason, count in reasons.items()]
    if not prompts:
        why = f" ({', '.join(notes)})" if notes else ""
        raise UserError(f"--prompt-file {path} holds no prompt{why}: {FORMS}")
    if copies := len(prompts) - len({each.prompt for each in prompts}):
        notes.append(f"{copies} prompts equal another")
    return PromptFile(
        path.name, prompts, len(rows), "conversations" if conversations * 2 > len(rows) else "prompts", tuple(notes)
    )


def _prompt_of(row: Any) -> FilePrompt:
    """Raises ValueError for what is no prompt, _NoQuestionError for what is left out."""
    turns = _turns_of(row)
    if turns is not None:
        question = _first_question(turns)
        reply = question.reply or (_reply_of(row) if isinstance(row, dict) else None)
        return FilePrompt(question.prompt, reply)
    if not isinstance(row, dict):
        return FilePrompt(_content(row, "the prompt"))
    body = row.get("body")
    if isinstance(body, dict):  # a line of an OpenAI batch file
        return _prompt_of(body)
    key = next((key for key in _PROMPT if key in row), None)
    if key is None:
        raise ValueError(f"no prompt among the keys {', '.join(map(str, row))[:200] or '(none)'}")
    prompt = _content(row[key], key)
    further = row.get("input", row.get("context")) if key == "instruction" else None
    if isinstance(further, str) and further.strip() and isinstance(prompt, str):
        prompt = f"{prompt}\n\n{further}"
    return FilePrompt(prompt, _reply_of(row))


def _reply_of(row: dict[str, Any]) -> str | None:
    return next((row[key] for key in _REPLY if isinstance(row.get(key), str)), None)


def _turns_of(row: Any) -> Sequence[Any] | None:
    """The turns of a row that is a conversation, else None."""
    if isinstance(row, dict):
        turns = next((row[key] for key in _TURNS if isinstance(row.get(key), list)), None)
        body, prompt = row.get("body"), row.get("prompt")
        if turns is None and isinstance(body, dict):
            return _turns_of(body)
        if turns is None and isinstance(prompt, list) and _is_turns(prompt):
            return prompt
        return turns
    return row if _is_turns(row) else None


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _first_question(turns: Sequence[Any]) -> FilePrompt:
    """The first words of a person, system turns before them left out, and the reply to them."""
    spoken: list[tuple[str, Any]] = []
    for turn in turns:
        if isinstance(turn, str):  # turns without speakers are a person's (MT-bench, AIPerf)
            spoken.append((_PERSON[0], turn))
        elif isinstance(turn, dict):
            key = next((key for key in ("value", "content", "text", "prompt") if key in turn), None)
            who = str(turn.get("from") or turn.get("role") or turn.get("user") or "").lower()
            spoken.append((who or _PERSON[0], turn[key] if key else None))
        else:
            raise ValueError(f"{_short(turn)} among the turns is no turn")
    while spoken and spoken[0][0] in _BEFORE:
        spoken.pop(0)
    if not spoken or spoken[0][0] not in _PERSON or spoken[0][1] is None:
        raise _NoQuestionError("conversations without a person's question first")
    reply = None
    if len(spoken) > 1 and spoken[1][0] in _MODEL and spoken[1][1] is not None:
        try:
            answer = _content(spoken[1][1], "the reply")
            reply = answer if isinstance(answer, str) else None
        except _NoQuestionError:
            pass
    return FilePrompt(_content(spoken[0][1], "the question"), reply)


def _content(value: Any, name: str) -> Prompt:
    """Text, the text parts of a list, or token ids. Raises ValueError or _NoQuestionError."""
    if isinstance(value, str):
        if not value.strip():
            raise _NoQuestionError("empty prompts")
        return value
    if isinstance(value, list):
        if not value:
            raise _NoQuestionError("empty prompts")
        if all(type(part) is int and part >= 0 for part in value):
            return tuple(value)
        if len(value) == 1 and isinstance(value[0], str | list):
            return _content(value[0], name)
        texts = [
            part.get("text", part.get("content", part.get("contents"))) for part in value if isinstance(part, dict)
        ]
        texts = [text[0] if isinstance(text, list) and text else text for text in texts]
        if len(texts) == len(value):
            # Pictures and other parts have no text.
            words = "".join(text for text in texts if isinstance(text, str))
            if not words.strip():
                raise _NoQuestionError("prompts without text")
            return words
    raise ValueError(f"{name} is {_short(value)}")


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
