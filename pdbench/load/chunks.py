"""What one event of a stream says, in any form that servers give it: the slow path beside the usual chunk of response.py.

OpenAI completions and chat chunks of vLLM, SGLang, TGI, llama.cpp, OpenRouter, Mistral and others, and the events of other
interfaces (OpenAI responses, Anthropic messages, Ollama) become one `Event`.
"""

import json
import math
import re
from typing import Any

import msgspec

DONE = object()
"""Stands for `[DONE]` among an event's documents."""
_IDLE_WORDS = {
    "ping", "keepalive", "keep-alive", "keep_alive", "heartbeat", "processing", "pong", "alive", "ok", "queued",
}  # fmt: skip
_HARMLESS = ("info", "information", "warning", "notice", "debug", "log", "message")
"""Types of documents whose `message` is no error; no set, as a server may send a list for one."""
_REASONING = ("reasoning", "reasoning_content", "thinking", "reasoning_text", "reasoning_details")
_FAILED = re.compile(
    "abort|cancel|error|exception|fail|time.?out|timed.?out|disconnect|insufficient|unavailable|overload|shut.?down|"
    "kill|died|dead|crash|preempt|evict|interrupt"
)


class Part(msgspec.Struct, gc=False):
    """One choice of an event. `tokens` is None where neither ids nor logprobs say how many; `way` is which of them did;
    `token_ids` are the ids, where they are.

    `filled` says that it carries something generated, `reasoning` that none of it is answer; `message` that it is not an
    increment but the answer so far.
    """

    choice: int = 0
    text: str = ""
    filled: bool = False
    reasoning: bool = False
    message: bool = False
    tokens: int | None = None
    way: str | None = None
    finish: str | None = None
    token_ids: list[int] = []


class Usage(msgspec.Struct, gc=False):
    """The counts of one usage object as sent; -1 is a value that is no count (negative, a fraction, a word)."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    reasoning: int | None = None


class Event(msgspec.Struct, gc=False):
    parts: list[Part] = []
    usage: Usage | None = None
    error: str | None = None
    metrics: dict | None = None
    tools: bool = False


def failed(reason: str) -> bool:
    """Is this finish reason a failure of the server?"""
    return _FAILED.search(reason.partition(":")[0].lower()) is not None


def documents(payload: bytes) -> list[Any]:
    """The JSON documents of one event's data, usually one; raises ValueError where there is something else."""
    try:
        return [msgspec.json.decode(payload)]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    # Python's reader takes what servers written in Python send: NaN, lone surrogates, line ends inside strings.
    text, at, found, decoder = payload.decode("utf-8", "replace").strip(), 0, [], json.JSONDecoder(strict=False)
    if text.strip("[]<>").lower() in _IDLE_WORDS:
        return []
    try:
        while at < len(text):
            if text[at].isspace() or text[at] == ",":
                at += 1
            elif text[at : at + 5].lower() == "data:":
                at += 5
            elif text[at : at + 6].lower() == "[done]":
                found.append(DONE)
                at += 6
            else:
                value, at = decoder.raw_decode(text, at)
                found.append(value)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return found


def read(document: Any) -> Event:
    """What a document says; an empty Event for a keep-alive. Raises ValueError for what is no object."""
    if document is None or (isinstance(document, str) and (not document or document.lower() in _IDLE_WORDS)):
        return Event()
    if not isinstance(document, dict):
        raise ValueError(f"a JSON {type(document).__name__} is no chunk")
    kind = document.get("type")
    if isinstance(kind, str) and kind.lower() in _IDLE_WORDS:
        return Event()
    error = _error(document)
    if error is not None:
        return Event(error=error)
    listed = document.get("choices")
    if isinstance(listed, dict):
        listed = [listed]
    event = Event(usage=_usage(document))
    metrics = document.get("metrics")
    event.metrics = metrics if isinstance(metrics, dict) else None
    if isinstance(listed, list) and listed:
        for position, choice in enumerate(listed):
            if isinstance(choice, dict):
                event.tools = event.tools or _has_tools(choice)
                event.parts.append(_part(choice, position))
                if event.usage is None:
                    event.usage = _usage(choice)
    else:
        part = _foreign(document)
        if part is not None:
            event.parts.append(part)
    return event


def error_text(error: Any) -> str:
    """The message in an error of the OpenAI form ({"error": {"message": ..}} or its inside), else the text itself."""
    if isinstance(error, bytes):
        error = error.decode("utf-8", "replace").strip().removeprefix("data:").strip()
    if isinstance(error, str) and error.lstrip().startswith(("{", "[")):
        try:
            error = json.loads(error, strict=False)
        except (ValueError, RecursionError):
            pass
    if isinstance(error, list) and error:
        error = error[0]
    for key in ("response", "error", "errors", "message", "msg", "detail", "error_msg", "error_message", "text"):
        if isinstance(error, dict) and error.get(key):
            return error_text(error[key])
    return str(error) if error or error == 0 else "no message"


def _error(document: dict) -> str | None:
    """The message where the document reports an error, else None."""
    if document.get("error") or document.get("errors"):
        return error_text(document)
    kind, choices = document.get("type"), document.get("choices")
    if document.get("object") == "error" or kind in ("error", "response.failed", "response.error"):
        return error_text(document)
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("error"):
            return error_text(choice["error"])
    if choices:
        return None
    codes = {key: document.get(key) for key in ("code", "status", "status_code", "statusCode", "error_code")}
    numbers = [number for code in codes.values() if (number := count(code)) is not None]
    if max(numbers, default=0) >= 400 or codes["status"] in ("error", "failed"):
        return error_text(document)
    if any(document.get(key) for key in ("error_msg", "error_message", "errorMessage", "exception")):
        return error_text(document)
    if document.get("usage") or any(key in document for key in ("content", "token", "delta", "response", "done")):
        return None
    message = document.get("message")
    if document.get("detail") or document.get("success") is False:
        return error_text(document)
    if isinstance(message, str) and message and message.lower() not in _IDLE_WORDS:
        harmless = max(numbers, default=-1) >= 0 or document.get("object") in _HARMLESS or kind in _HARMLESS
        return None if harmless else error_text(document)
    return None


def count(value: Any) -> int | None:
    """A count in any form: 5, 5.0, "5"; None for none, -1 for what cannot be a count."""
    if value is None or isinstance(value, bool | dict | list):
        return None
    if isinstance(value, str):
        try:
            value = float(value) if value.strip() else None
        except ValueError:
            return -1
        return count(value)
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() and value >= 0 else -1
    return value if isinstance(value, int) and value >= 0 else -1


def _usage(document: dict) -> Usage | None:
    """The document's usage, wherever it is kept."""
    usage = document.get("usage")
    for key in ("x_groq", "response", "message"):
        inside = document.get(key)
        if not isinstance(usage, dict) and isinstance(inside, dict):
            usage = inside.get("usage")
    if not isinstance(usage, dict):
        details, timings = document.get("details"), document.get("timings")
        if isinstance(details, dict) and "generated_tokens" in details:
            usage = {"completion_tokens": details["generated_tokens"]}
        elif isinstance(timings, dict) and "predicted_n" in timings:
            usage = {"completion_tokens": timings["predicted_n"], "prompt_tokens": timings.get("prompt_n")}
        elif "eval_count" in document:
            usage = {"completion_tokens": document["eval_count"], "prompt_tokens": document.get("prompt_eval_count")}
        else:
            return None

    def first(*keys: str, inside: dict = usage) -> int | None:
        return next((number for key in keys if (number := count(inside.get(key))) is not None), None)

    prompt, completion = first("prompt_tokens", "input_tokens"), first("completion_tokens", "output_tokens")
    total = first("total_tokens")
    if completion is None and prompt is not None and total is not None and total >= prompt >= 0:
        completion = total - prompt
    cached = first("cached_tokens", "prompt_cache_hit_tokens", "cache_read_input_tokens")
    for key in ("prompt_tokens_details", "input_tokens_details"):
        if isinstance(details := usage.get(key), dict):
            cached = first("cached_tokens", inside=details) if cached is None else cached
    reasoning = first("reasoning_tokens")
    for key in ("completion_tokens_details", "output_tokens_details"):
        if isinstance(details := usage.get(key), dict):
            reasoning = first("reasoning_tokens", inside=details) if reasoning is None else reasoning
    if "prompt_tokens" not in usage and "cache_read_input_tokens" in usage and prompt is not None and prompt >= 0:
        # Anthropic's input is what no cache had.
        prompt += max(0, cached or 0) + max(0, count(usage.get("cache_creation_input_tokens")) or 0)
    # Some servers leave reasoning out of the completion: their total says so.
    if reasoning and prompt and completion and reasoning > 0 and total == prompt + completion + reasoning:
        completion += reasoning
    return Usage(prompt=prompt, completion=completion, cached=cached, reasoning=reasoning)


def _part(choice: dict, position: int) -> Part:
    delta = choice.get("delta")
    if isinstance(delta, str):
        delta = {"content": delta}
    delta = delta if isinstance(delta, dict) else {}
    index = count(choice.get("index"))
    part = Part(choice=position if index is None or index < 0 else index)
    answer, thought, filled = _generated(delta)
    text, own_thought, own_filled = _generated({**choice, "content": choice.get("text")})
    answer, thought, filled = answer or text, thought or own_thought, filled or own_filled
    message = choice.get("message")
    if not filled and isinstance(message, dict):
        answer, thought, filled = _generated(message)
        part.message = filled
    part.text, part.filled, part.reasoning = thought + answer, filled, bool(thought) and not answer
    if part.reasoning and (_has_tools(choice) or delta.get("refusal")):
        part.reasoning = False
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    if not isinstance(ids, list):
        ids = delta.get("token_ids")
    if isinstance(ids, list):
        part.tokens, part.way = len(ids), "token_ids"
        part.token_ids = [token for token in ids if isinstance(token, int)]
    elif isinstance(logprobs, dict):
        for names in (("content", "refusal"), ("tokens",), ("token_logprobs",)):
            lists = [logprobs[name] for name in names if isinstance(logprobs.get(name), list)]
            if sum(map(len, lists)):
                part.tokens, part.way = sum(map(len, lists)), "logprobs"
                break
    part.finish = _reason(choice.get("finish_reason")) or _reason(choice.get("finishReason"))
    part.finish = part.finish or _reason(delta.get("finish_reason"))
    return part


def _generated(holder: dict) -> tuple[str, str, bool]:
    """(answer, reasoning, is there anything?) of a delta, a message or a choice."""
    answer, thought, filled = _content(holder.get("content"))
    if not thought:
        thought = next((text for key in _REASONING if (text := _flat(holder.get(key)))), "")
    answer += _flat(holder.get("refusal"))
    calls = holder.get("tool_calls")
    for call in [*(calls if isinstance(calls, list) else [calls]), holder.get("function_call")]:
        if isinstance(call, dict):
            function = call.get("function")
            for part in (call, function if isinstance(function, dict) else {}):
                answer += _flat(part.get("name")) + _flat(part.get("arguments"))
            filled = filled or bool(call.get("id"))
    audio = holder.get("audio")
    if isinstance(audio, dict):
        answer += _flat(audio.get("transcript"))
        filled = filled or bool(audio.get("data"))
    filled = filled or bool(holder.get("images"))
    return answer, thought, bool(answer or thought or filled)


def _content(content: Any) -> tuple[str, str, bool]:
    """(answer, reasoning, is there anything?) of a delta's content: text, or a list of typed parts."""
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        text = _flat(content)
        return text, "", bool(text)
    answer, thought, filled = "", "", False
    for part in content:
        kind = str(part.get("type") or "").lower() if isinstance(part, dict) else ""
        text = _flat(part)
        if "think" in kind or "reason" in kind:
            thought += text
        else:
            answer += text
        filled = filled or bool(text) or "image" in kind or "audio" in kind
    return answer, thought, filled


def _flat(value: Any) -> str:
    """The text in a string, a number, or nested parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_flat, value))
    if isinstance(value, dict):
        keys = ("text", "thinking", "content", "reasoning", "summary", "refusal", "transcript", "value")
        text = next((text for key in keys if (text := _flat(value.get(key)))), "")
        return text or ("" if "type" in value or "index" in value or not value else json.dumps(value))
    return "" if value is None or isinstance(value, bool) else str(value)


def _has_tools(choice: dict) -> bool:
    delta = choice.get("delta") or choice.get("message")
    return isinstance(delta, dict) and bool(delta.get("tool_calls") or delta.get("function_call"))


def _reason(value: Any) -> str | None:
    """A finish reason in any form; None where there is none yet."""
    if isinstance(value, dict):
        reason, message = _reason(value.get("type") or value.get("reason")), value.get("message")
        return f"{reason}: {message}" if reason and message and failed(reason) else reason
    if value is None or value is False:
        return None
    text = "stop" if value is True else str(value).strip()
    return None if text.lower() in ("", "null", "none") else text


def _foreign(document: dict) -> Part | None:
    """An event without `choices`: OpenAI responses, Anthropic messages, Ollama, TGI, llama.cpp; None where it says nothing."""
    kind, delta, part = str(document.get("type") or ""), document.get("delta"), Part()
    if kind.endswith(".delta") and isinstance(delta, str):
        part.text, part.reasoning = delta, "reasoning" in kind
    elif kind in ("response.completed", "response.incomplete", "message_stop"):
        part.finish = "length" if kind.endswith("incomplete") else "stop"
    elif kind.startswith("response."):
        return None
    elif isinstance(delta, dict):
        answer, thought, _ = _generated({"content": delta.get("text"), "thinking": delta.get("thinking")})
        answer += _flat(delta.get("partial_json")) or _flat(delta.get("content"))
        part.text, part.reasoning = thought + answer, bool(thought) and not answer
        part.finish = _reason(delta.get("stop_reason"))
    elif isinstance(message := document.get("message"), dict) and "done" in document:
        answer, thought, _ = _generated(message)
        part.text, part.reasoning = thought + answer, bool(thought) and not answer
    elif isinstance(token := document.get("token"), dict):
        special = token.get("special") is True
        part.text, part.tokens, part.way = "" if special else _flat(token.get("text")), 1, "token_ids"
        details = document.get("details")
        part.finish = _reason(details.get("finish_reason")) if isinstance(details, dict) else None
    elif isinstance(document.get("response"), str) or isinstance(document.get("content"), str):
        part.text = document.get("response") or document.get("content") or ""
    else:
        return None
    if document.get("done") is True or document.get("stop") is True:
        part.finish = _reason(document.get("done_reason")) or "stop"
    part.filled = bool(part.text)
    return part
