"""The scripted streams: what public reports name, and their siblings, each with what a client has to see."""

import gzip
import json
import zlib
from dataclasses import replace

from tests.support.streams import Case, Truth, as_json, delta, sse, text, usage, words

CASES: list[Case] = []
GROUP = ""


def case(name: str, pieces: list[bytes], truth: Truth, **more: object) -> None:
    CASES.append(Case(name=name, group=GROUP, pieces=pieces, truth=truth, **more))  # type: ignore[arg-type]


DONE = b"data: [DONE]\n\n"
ROLE = delta(role="assistant", content="")
FIVE = [sse(text(f"t{letter} ")) for letter in "abcde"]
END = sse(text("", "length"), usage(5)) + DONE
GOOD = Truth(tokens=5, last=4, prompt=5)
GOOD_UNTOLD = Truth(tokens=5, last=4)

# fmt: off
GROUP = "plain"
case("completions, usage last", [*FIVE, END], GOOD)
case("finish a gap after the last token", [*FIVE, END], GOOD, late_end=True)
case("chat, role chunk first", [sse(ROLE), *words("a ", "b ", "c "), sse(usage(3)) + DONE], Truth(tokens=3, first=1,
     last=3, text="a b c "), chat=True)
case("empty text chunks between", [sse(text("")), FIVE[0], sse(text("")), FIVE[1], sse(text("", "stop"),
     usage(2)) + DONE], Truth(tokens=2, first=1, last=3))
case("usage missing", [*FIVE, sse(text("", "stop")) + DONE], Truth(tokens=5, last=4))
case("finish on the last text", [*FIVE[:4], sse(text("t4 ", "stop"), usage(5)) + DONE], GOOD)
case("one token", [sse(text("x", "length"), usage(1)) + DONE], Truth(tokens=1, last=0))
case("token ids", [*(sse(text("t ", token_ids=[i])) for i in range(4)), sse(text("", "stop", token_ids=[4]),
     usage(5)) + DONE], Truth(tokens=5, last=4))
case("invisible token by its id", [sse(text("a", token_ids=[1])), sse(text("", token_ids=[2])), sse(text("é", "stop",
     token_ids=[3]), usage(3)) + DONE], Truth(tokens=3, last=2, text="aé"))
case("token_ids null", [*(sse(text("t ", token_ids=None)) for _ in range(3)), sse(text("", "stop"), usage(3)) + DONE],
     Truth(tokens=3, last=2))
case("token_ids always empty", [*(sse(text("t ", token_ids=[])) for _ in range(3)), sse(text("", "stop"),
     usage(3)) + DONE], Truth(tokens=3, last=2))
case("longer than asked", [*FIVE, END], replace(GOOD, note="answers-too-long"), max_tokens=3)

GROUP = "reasoning, tools, content"
for _name in ("reasoning", "reasoning_content", "thinking"):
    case(f"{_name}, then content", [sse(ROLE), *words("hm ", "so ", name=_name)[:2], *words("yes ", "no "),
         sse(usage(4)) + DONE], Truth(tokens=4, first=1, answer=3, last=4), chat=True)
case("reasoning_details", [sse(delta(content="", reasoning_details=[{"type": "reasoning.text", "text": "hm"}])),
     *words("yes ", "no "), sse(usage(3, completion_tokens_details={"reasoning_tokens": 1})) + DONE], Truth(tokens=3,
     answer=1, last=2, reasoning=1), chat=True)
case("reasoning and reasoning_content alike", [sse(delta(reasoning="hm ", reasoning_content="hm ")), *words("yes ",
     "no "), sse(usage(3)) + DONE], Truth(tokens=3, answer=1, last=2, text="hm yes no "), chat=True)
case("reasoning with token ids", [sse(delta(reasoning="hm ", choice={"token_ids": [1, 2]})), sse(delta(content="yes",
     choice={"token_ids": [3]})), sse(delta("stop", choice={"token_ids": [4]}), usage(4)) + DONE], Truth(tokens=4,
     answer=1, last=2, in_first=2, reasoning=2), chat=True)
case("reasoning only", [*words("hm ", "so ", name="reasoning", finish="length"), sse(usage(2)) + DONE],
     Truth(tokens=2, answer=-1, last=1), chat=True)
case("thinking parts in a content list", [sse(delta(content=[{"type": "thinking", "thinking": [{"type": "text",
     "text": "hm"}]}])), sse(delta(content=[{"type": "text", "text": "yes "}])), sse(delta(content="no ")),
     sse(delta("stop"), usage(3)) + DONE], Truth(tokens=3, answer=1, last=2, text="hmyes no "), chat=True)
case("reasoning that is counted, not sent", [*words("a ", "b ", "c "), sse(usage(100,
     completion_tokens_details={"reasoning_tokens": 97})) + DONE], Truth(tokens=100, last=2, in_first=98,
     reasoning=97), chat=True)
case("tool calls", [sse(delta(role="assistant", content=None)), sse(delta(tool_calls=[{"index": 0, "id": "c1",
     "type": "function", "function": {"name": "get", "arguments": ""}}])), *(sse(delta(tool_calls=[{"index": 0,
     "function": {"arguments": part}}])) for part in ('{"a', '": ', "1", "}")), sse(delta("tool_calls"),
     usage(6)) + DONE], Truth(tokens=6, first=1, last=5), chat=True)
case("tool_calls null beside content", [sse(delta(content="a ", tool_calls=None)), sse(delta(content="b ",
     tool_calls=[])), sse(delta("stop"), usage(2)) + DONE], Truth(tokens=2, last=1, text="a b "), chat=True)
case("tool arguments as an object", [sse(delta(tool_calls=[{"index": 0, "function": {"name": "f",
     "arguments": {"a": 1}}}])), sse(delta("tool_calls"), usage(9)) + DONE], Truth(tokens=9, last=0, in_first=1),
     chat=True)
case("function_call", [sse(delta(function_call={"name": "f", "arguments": ""})),
     sse(delta(function_call={"arguments": "{}"})), sse(delta("function_call"), usage(2)) + DONE], Truth(tokens=2,
     last=1), chat=True)
case("text, then a tool call", [*words("a ", "b ")[:2], sse(delta(tool_calls=[{"index": 0, "id": "c",
     "function": {"name": "f", "arguments": "{}"}}])), sse(delta("tool_calls"), usage(3)) + DONE], Truth(tokens=3,
     last=2), chat=True)
case("refusal", [sse(delta(refusal="I ", content=None)), sse(delta(refusal="can't")), sse(delta("stop"),
     usage(2)) + DONE], Truth(tokens=2, last=1, text="I can't"), chat=True)
case("audio with transcript", [sse(delta(audio={"id": "a", "transcript": "hi "})), sse(delta(audio={"data": "AAAA"})),
     sse(delta("stop"), usage(2)) + DONE], Truth(tokens=2, last=1), chat=True)
case("final chunk repeats all as message", [*words("a ", "b ")[:2], sse(delta("stop",
     choice={"message": {"role": "assistant", "content": "a b "}}), usage(2)) + DONE], Truth(tokens=2, last=1,
     text="a b "), chat=True)
case("the only chunk is a message", [sse({"object": "chat.completion", "choices": [{"index": 0,
     "finish_reason": "stop", "message": {"role": "assistant", "content": "all at once"}}],
     "usage": {"prompt_tokens": 5, "completion_tokens": 3}})+ DONE], Truth(tokens=3, last=0, text="all at once"),
     chat=True)
case("content is a number", [sse(delta(content=4)), sse(delta(content="2")), sse(delta("stop"), usage(2)) + DONE],
     Truth(tokens=2, last=1, text="42"), chat=True)
case("delta null in the finish chunk", [*words("a ", "b ")[:2], sse(delta("stop", choice={"delta": None}),
     usage(2)) + DONE], Truth(tokens=2, last=1), chat=True)
case("two choices", [sse(text("a ", index=0), text("x ", index=1)), sse(text("b ", index=0), text("y ", index=1)),
     sse(text("", "stop", index=0)), sse(text("", "stop", index=1), usage(4)) + DONE], Truth(tokens=4, last=1,
     in_first=2, choices=2))
case("index as a string", [sse(text("a ", index="0")), sse(text("b ", index="0")), sse(text("", "stop", index="0"),
     usage(2)) + DONE], Truth(tokens=2, last=1))

GROUP = "several tokens per chunk"
case("four tokens per chunk, usage last", [*(sse(text("a b c d ")) for _ in range(5)), sse(text("", "length"),
     usage(20)) + DONE], Truth(tokens=20, last=4, in_first=4))
case("four per chunk, usage in the finish chunk", [*(sse(text("a b c d ")) for _ in range(5)), sse(text("", "stop",
     usage={"prompt_tokens": 5, "completion_tokens": 20})) + DONE], Truth(tokens=20, last=4, in_first=4))
case("four per chunk, token ids", [*(sse(text("a b c d ", token_ids=[1, 2, 3, 4])) for _ in range(5)), sse(text("",
     "length", token_ids=[]), usage(20)) + DONE], Truth(tokens=20, last=4, in_first=4))
case("four per chunk, nothing says how many", [*(sse(text("a b c d ")) for _ in range(5)), sse(text("",
     "stop")) + DONE], Truth(last=4, note="tokens-unknown"))
case("speculative decoding, token ids", [sse(text("a ", token_ids=[1])), sse(text("b c d ", token_ids=[2, 3, 4])),
     sse(text("e f ", token_ids=[5, 6])), sse(text("", "stop", token_ids=[7]), usage(7)) + DONE], Truth(tokens=7,
     last=3))
case("logprobs say how many", [*(sse(delta(content="a b ", choice={"logprobs": {"content": [{"token": "a"},
     {"token": " b"}]}}))for _ in range(3)), sse(delta("stop")) + DONE], Truth(tokens=6, last=2, in_first=2),
     chat=True)
case("logprobs of completions", [*(sse(text("a b ", logprobs={"tokens": ["a", " b"], "token_logprobs": [0,
     0]})) for _ in range(3)), sse(text("", "stop")) + DONE], Truth(tokens=6, last=2, in_first=2))
case("all in one chunk", [sse(text("one two three", "stop"), usage(3)) + DONE], Truth(tokens=3, last=0))
case("several events per segment", [FIVE[0] + FIVE[1], FIVE[2] + FIVE[3], FIVE[4], END], Truth(tokens=5, last=2,
     in_first=2))
case("four events per segment", [*([b"".join(FIVE[:4])] * 4), sse(text("", "length"), usage(16)) + DONE],
     Truth(tokens=16, last=3, in_first=4))
case("four events per segment, token ids", [*([sse(text("t ", token_ids=[1])) * 4] * 4), sse(text("", "length",
     token_ids=[]), usage(16)) + DONE], Truth(tokens=16, last=3, in_first=4))
case("the first token held back until the second", [FIVE[0] + FIVE[1], *FIVE[2:], END], Truth(tokens=5, last=3, in_first=2))
case("two events of four tokens per segment", [*([sse(text("a b c d ")) * 2] * 4), sse(text("", "length"), usage(32)) + DONE],
     Truth(tokens=32, last=3, in_first=8))
case("a tool parser that holds tokens back", [sse(delta(role="assistant", content="")),
     sse(delta(tool_calls=[{"index": 0, "id": "c", "function": {"name": "get_weather",
     "arguments": '{"city": "Oslo", "unit": "C"}'}}])), sse(delta("tool_calls"), usage(18)) + DONE], Truth(tokens=18,
     first=1, last=1), chat=True)

case("ids of the whole answer at its end", [*FIVE, sse(text("", "stop", token_ids=[1, 2, 3, 4, 5])) + DONE], GOOD_UNTOLD)
case("logprobs of the whole answer at its end", [*FIVE, sse(text("", "stop", logprobs={"tokens": ["t"] * 5})) + DONE],
     GOOD_UNTOLD)

GROUP = "usage"
_each = [sse(text("ab ", usage={"prompt_tokens": 5, "completion_tokens": 2 * i + 2})) for i in range(4)]
case("continuous, cumulative", [*_each, sse(text("", "stop", usage={"prompt_tokens": 5, "completion_tokens": 8}),
     usage(8)) + DONE], Truth(tokens=8, last=3, in_first=2))
case("null until the last", [*(sse(text("t ", usage=None)) for _ in range(3)), sse(text("", "stop", usage=None),
     usage(3)) + DONE], Truth(tokens=3, last=2))
case("on every chunk, 0 until the end", [*(sse(text("t ", usage={"prompt_tokens": 5,
     "completion_tokens": 0})) for _ in range(3)), sse(text("", "stop", usage={"prompt_tokens": 5,
     "completion_tokens": 3})) + DONE], Truth(tokens=3, last=2))
case("on every chunk, each its own", [*(sse(text("t ", usage={"prompt_tokens": 5,
     "completion_tokens": 1})) for _ in range(4)), sse(text("", "stop")) + DONE], Truth(tokens=4, last=3,
     note="usage-refused"))
case("on every chunk, always the total", [*(sse(text("t ", usage={"prompt_tokens": 5,
     "completion_tokens": 4})) for _ in range(4)), sse(text("", "stop", usage={"prompt_tokens": 5,
     "completion_tokens": 4})) + DONE], Truth(tokens=4, last=3))
case("floats", [*FIVE, sse(text("", "stop"), usage(5.0, 7.0)) + DONE], Truth(tokens=5, last=4, prompt=7))
case("strings", [*FIVE, sse(text("", "stop"), usage("5", "7")) + DONE], Truth(tokens=5, last=4, prompt=7))
case("negative", [*FIVE, sse(text("", "stop"), usage(-5, -1)) + DONE], Truth(tokens=5, last=4, note="usage-refused"))
case("absurdly big", [*FIVE, sse(text("", "stop"), usage(99999999999999, 99999999999999)) + DONE], Truth(tokens=5,
     last=4, note="usage-refused"))
case("zero though tokens came", [*FIVE, sse(text("", "stop"), usage(0)) + DONE], Truth(tokens=5, last=4,
     note="usage-refused"))
case("fewer than token ids came", [*(sse(text("t ", token_ids=[i])) for i in range(5)), sse(text("", "stop",
     token_ids=[]), usage(2)) + DONE], Truth(tokens=5, last=4, note="usage-contradicts"))
case("after [DONE]", [*FIVE, sse(text("", "stop")) + DONE, sse(usage(5, 9))], Truth(tokens=5, last=4, prompt=9))
case("in the choice", [*FIVE, sse(text("", "stop")| {"choices": [{"index": 0, "text": "", "finish_reason": "stop",
     "usage": {"prompt_tokens": 9, "completion_tokens": 5}}]})+ DONE], Truth(tokens=5, last=4, prompt=9))
case("in x_groq", [*FIVE, sse(text("", "stop", x_groq={"usage": {"prompt_tokens": 9,
     "completion_tokens": 5}})) + DONE], Truth(tokens=5, last=4, prompt=9))
case("total only", [*FIVE, sse(text("", "stop"), {"choices": [], "usage": {"prompt_tokens": 9,
     "total_tokens": 14}}) + DONE], Truth(tokens=5, last=4, prompt=9))
case("cached prompt tokens", [*FIVE, sse(text("", "stop"), usage(5, 2048,
     prompt_tokens_details={"cached_tokens": 2032})) + DONE], Truth(tokens=5, last=4, prompt=2048, cached=2032))
case("prompt_tokens_details null", [*FIVE, sse(text("", "stop"), usage(5, 9, prompt_tokens_details=None)) + DONE],
     Truth(tokens=5, last=4, prompt=9))
case("on every chunk, always max_tokens", [*(sse(text("t ", usage={"prompt_tokens": 5,
     "completion_tokens": 128})) for _ in range(5)), sse(text("", "stop")) + DONE], Truth(last=4, note="usage-contradicts"))
case("cached tokens left out of the prompt", [*FIVE, sse(text("", "stop"), usage(5, 21, cached_tokens=2011)) + DONE],
     Truth(tokens=5, last=4, prompt=2032, cached=2011))
case("no count of the prompt: 0", [*FIVE, sse(text("", "stop"), usage(5, 9), usage(5, 0)) + DONE], Truth(tokens=5,
     last=4, prompt=9, note="usage-refused"))
case("alone between tokens, then cut", [FIVE[0], sse(usage(1)), FIVE[1], sse(usage(2))], Truth(error="truncated"))
case("choices null beside usage", [*FIVE, sse(text("", "stop"), {"choices": None,
     "usage": usage(5)["usage"]}) + DONE], GOOD)
case("no finish, no [DONE], but the final usage", [*FIVE, sse(usage(5))], replace(GOOD, note="ended-by-usage"))

GROUP = "errors"
for _name, _error in {"error object": {"error": {"message": "engine died", "code": 500}},
     "error string": {"error": "engine died"}, "flat error object": {"object": "error", "message": "engine died",
     "code": 500}, "code without choices": {"code": 503, "message": "engine died"},
     "code as a string": {"code": "500", "msg": "engine died", "choices": []}, "detail": {"detail": "engine died"},
     "message and type": {"message": "engine died", "type": "InternalServerError"}, "type error": {"type": "error",
     "error": {"type": "overloaded_error", "message": "engine died"}}, "error in a choice": text("", "error",
     error={"code": 502, "message": "engine died"})}.items():
    case(f"{_name}, then [DONE]", [FIVE[0], sse(_error) + DONE], Truth(error="server_error", tokens=1))
for _name, _line in {"a line of text": b"Internal Server Error\n\n",
     "another response": b"HTTP/1.1 500 Internal Server Error\r\n\r\n", "a traceback": b"RuntimeError: engine died\n"}.items():
    case(f"{_name} for an event, then [DONE]", [FIVE[0], _line + DONE], Truth(error="bad_json", tokens=1))
for _name, _said in {"code 0": {"code": 0, "message": "success"}, "status 200": {"status": 200, "message": "continue"},
     "a warning": {"object": "warning", "message": "deprecated"}}.items():
    case(f"{_name} is no error", [FIVE[0], sse(_said) + FIVE[1], *FIVE[2:], END], GOOD)
case("error before any token", [sse({"error": {"message": "busy"}}) + DONE], Truth(error="server_error", first=None))
case("event: error with data", [FIVE[0], b"event: error\ndata: engine died\n\n" + DONE], Truth(error="server_error"))
case("event: error with JSON", [FIVE[0], b'event: error\ndata: {"message": "engine died"}\n\n' + DONE],
     Truth(error="server_error"))
case("event: error, a comment only", [FIVE[0], b"event: error\n: engine died\n\n" + DONE],
     Truth(error="server_error"))
case("error: for data:, then [DONE]", [FIVE[0], b'error: {"code":500,"message":"engine died","type":"server_error"}\n\n' + DONE],
     Truth(error="server_error", tokens=1))
case("error after the finish", [FIVE[0], sse(text("", "stop")), sse({"error": "lost"}) + DONE],
     Truth(error="server_error"))
case("error null is none", [sse(text("a ", error=None)), sse({**text("b "), "error": None}), sse(text("", "stop"),
     usage(2)) + DONE], Truth(tokens=2, last=1))
case("HTTP 500, JSON", [as_json({"error": {"message": "boom"}})], Truth(error="http_500", first=None), frame="length",
     status=b"500 Internal Server Error", kind=b"application/json")
case("HTTP 429, HTML", [b"<html>slow down</html>"], Truth(error="http_429", first=None), frame="length",
     status=b"429 Too Many Requests", kind=b"text/html")
case("HTTP 503, empty", [b""], Truth(error="http_503", first=None), frame="length", status=b"503 Service Unavailable",
     kind=b"")
case("200 with a JSON error", [as_json({"error": {"message": "boom"}})], Truth(error="server_error", first=None),
     frame="length", kind=b"application/json")
case("200 with a whole JSON answer", [as_json({"object": "text_completion", "choices": [{"index": 0, "text": "a b",
     "finish_reason": "stop"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})], Truth(error="not_a_stream",
     first=None), frame="length", kind=b"application/json")
case("200 with HTML", [b"<html>login</html>"], Truth(error="not_a_stream", first=None), frame="length",
     kind=b"text/html")

GROUP = "finish"
for _reason in ("length", "content_filter", "eos_token", "end_turn", "STOP"):
    case(f"finish {_reason}", [*FIVE, sse(text("", _reason), usage(5)) + DONE], GOOD)
for _reason in ("abort", "error", "cancelled", {"type": "abort", "message": "KVTransferError"}):
    case(f"finish {_reason if isinstance(_reason, str) else 'abort as an object'}", [*FIVE[:2], sse(text("", _reason),
         usage(2)) + DONE], Truth(error="aborted", tokens=2))
case("finish as an object", [*FIVE, sse(text("", {"type": "length", "length": 5}), usage(5)) + DONE], GOOD)
for _reason in ("request_cancelled", "EngineDeadError", "FINISH_ABORT", "server_shutdown", "preempted"):
    case(f"finish {_reason}", [*FIVE[:2], sse(text("", _reason), usage(2)) + DONE], Truth(error="aborted", tokens=2))
case("finish on every chunk", [*(sse(text("x ", "stop")) for _ in range(5)), sse(usage(5)) + DONE], replace(GOOD,
     text="x x x x x "))
case("finish on every chunk, token ids", [*(sse(text("x ", "length", token_ids=[i])) for i in range(5)),
     sse(usage(5)) + DONE], GOOD)
case("final chunk repeats all as text", [*FIVE, sse(text("ta tb tc td te ", "stop")) + DONE], replace(GOOD_UNTOLD,
     text="ta tb tc td te "))
case("one of two choices, then [DONE]", [FIVE[0], sse(text("", "stop")), DONE], Truth(error="truncated", tokens=1), choices=2,
     max_tokens=4)
case("one of two choices, then cut", [FIVE[0], sse(text("", "stop"))], Truth(error="truncated", tokens=1), choices=2,
     end="cut")
case("finish twice", [*FIVE, sse(text("", "stop"), text("", "length"), usage(5)) + DONE], GOOD)
case("final chunk twice", [*FIVE[:4], sse(text("t4 ", "stop"), text("t4 ", "stop"), usage(5)) + DONE], GOOD)
case("final chunk twice, another created", [*FIVE[:4], sse(text("t4 ", "stop"), text("t4 ", "stop", created=2),
     usage(5)) + DONE], GOOD)
case("finish stop, then abort", [*FIVE, sse(text("", "stop"), text("", "abort")) + DONE], Truth(error="aborted"))
case("[DONE] without a finish", [*FIVE, sse(usage(5)) + DONE], GOOD)
case("[DONE] alone", [DONE], Truth(error="empty", first=None))
case("finish without text", [sse(text("", "stop"), usage(0)) + DONE], Truth(error="empty", first=None))
case("finish without [DONE]", [*FIVE, sse(text("", "stop"))], Truth(tokens=5, last=4))
case("forced, but aborted early", [*FIVE[:2], sse(text("", "abort"), usage(2)) + DONE], Truth(error="aborted",
     tokens=2), forced=True)
case("forced, but stopped early", [*FIVE, sse(text("", "stop"), usage(5)) + DONE], Truth(error="short", tokens=5),
     forced=True)
case("forced, [DONE] early", [*FIVE[:2], DONE], Truth(error="short", tokens=2), forced=True)
case("forced and whole", [*(sse(text("t " * 32, token_ids=[1] * 32)) for _ in range(4)), sse(text("", "length",
     token_ids=[]), usage(128)) + DONE], Truth(tokens=128, last=3, in_first=32), forced=True)

GROUP = "keep-alives"
for _name, _noise in {"comments": b": ping\n\n", "comment lines": b":\n", "empty data": b"data:\n\n",
     "data null": b"data: null\n\n", "data {}": b"data: {}\n\n",
     "event: ping": b'event: ping\ndata: {"type": "ping"}\n\n', "type ping": b'data: {"type": "ping"}\n\n',
     "retry and id lines": b"retry: 3000\nid: 7\n\n", "data: ping": b"data: ping\n\n"}.items():
    case(f"{_name}", [_noise, FIVE[0], _noise + FIVE[1], FIVE[2], _noise, sse(text("", "stop"),
         usage(3)) + DONE + _noise], Truth(tokens=3, first=1, last=3))

GROUP = "events"
_stop = sse(text("", "stop"), usage(5)) + DONE
for _name, _change in {"CRLF": lambda piece: piece.replace(b"\n", b"\r\n"), "CR": lambda piece: piece.replace(b"\n",
     b"\r"), "no space after data:": lambda piece: piece.replace(b"data: ", b"data:"),
     "one line end between events": lambda piece: piece.replace(b"\n\n", b"\n"),
     "JSON lines without data:": lambda piece: piece.replace(b"data: ", b"").replace(b"\n\n", b"\n"),
     "event and id with each": lambda piece: piece.replace(b"data: ", b"event: message\nid: 1\ndata: "),
     "data: twice": lambda piece: piece.replace(b"data: {", b"data: data: {")}.items():
    case(_name, [_change(piece) for piece in (*FIVE, _stop)], GOOD)
case("mixed line ends", [FIVE[0].replace(b"\n", b"\r\n"), FIVE[1].replace(b"\n", b"\r"), *FIVE[2:], _stop], GOOD)
case("BOM first", [b"\xef\xbb\xbf" + FIVE[0], *FIVE[1:], _stop], GOOD)
case("JSON over several data lines", [b"data: " + json.dumps(text(f"t{i} "), indent=1).encode().replace(b"\n",
     b"\ndata: ") + b"\n\n" for i in range(5)]+ [_stop], GOOD)
case("two objects in one event", [b"data: " + as_json(text("a ")) + b"\ndata: " + as_json(text("b ")) + b"\n\n", FIVE[2],
     b"data: " + as_json(text("", "stop")) + as_json(usage(3)) + b"\n\n" + DONE], Truth(tokens=3, last=1, in_first=2))
case("[DONE] with trailing blanks", [*FIVE, sse(text("", "stop"), usage(5)) + b"data: [DONE]  \n\n"], GOOD)
case("[done] in lower case", [*FIVE, sse(text("", "stop"), usage(5)) + b"data: [done]\n\n"], GOOD)
case("[DONE] without a blank line", [*FIVE, sse(text("", "stop"), usage(5)) + b"data: [DONE]\n"], GOOD)
case("[DONE] without a line end", [*FIVE, sse(text("", "stop"), usage(5)) + b"data: [DONE]"], GOOD)
case("last event without its blank line", [*FIVE, sse(text("", "stop")), sse(usage(5))[:-2]], GOOD)
case("data: [PING]", [sse(b"[PING]"), *FIVE, sse(text("", "stop"), usage(5)) + DONE], Truth(tokens=5, first=1, last=5))
case("garbage after the finish", [*FIVE, sse(text("", "stop"), usage(5)) + b"data: {broken\n\n" + DONE],
     Truth(tokens=5, last=4, note="malformed-after-finish"))
case("garbage after [DONE]", [*FIVE, sse(text("", "stop"), usage(5)) + DONE + b"garbage\ndata: {\n\n" + FIVE[0]],
     GOOD)
case("garbage before the finish", [*FIVE[:2], b"data: {broken\n\n", *FIVE[2:], _stop], Truth(error="bad_json",
     tokens=2))
case("cut inside characters and events", [(whole := sse(text("t0 é世 "), text("t1 😀 ")))[:70], whole[70:111],
     whole[111:], *FIVE[2:], _stop], Truth(tokens=5, first=2, last=5, in_first=2))
case("escapes and surrogates",
     [sse(b'{"choices":[{"index":0,"text":"\\ud83d\\ude00 \\u00e9 ","finish_reason":null}]}'),
     sse(b'{"choices":[{"index":0,"text":"\\ud83d","finish_reason":null}]}'),
     sse(b'{"choices":[{"index":0,"text":"\\ude00","finish_reason":null}]}'), sse(text("", "stop"), usage(3)) + DONE],
     Truth(tokens=3, last=2, text="😀 é 😀"))
case("NaN beside the text", [sse(b'{"choices":[{"index":0,"text":"a ","finish_reason":null,"score":NaN}]}'), FIVE[1],
     sse(text("", "stop"), usage(2)) + DONE], Truth(tokens=2, last=1))

GROUP = "HTTP"
case("Content-Length", [*FIVE, END], GOOD, frame="length")
case("HTTP/1.0 until close", [*FIVE, END], GOOD, frame="close")
case("Content-Length longer than the body", [*FIVE, END], GOOD, frame="length", length=5000)
case("held open after [DONE]", [*FIVE, END], GOOD, end="hang")
case("chunked without its end", [*FIVE, END], GOOD, end="cut")
case("no content type", [*FIVE, END], GOOD, kind=b"")
case("text/plain", [*FIVE, END], GOOD, kind=b"text/plain")
case("application/x-ndjson", [piece.replace(b"data: ", b"").replace(b"\n\n", b"\n") for piece in (*FIVE, END)], GOOD,
     kind=b"application/x-ndjson")
case("cut before any token (FIN)", [sse(ROLE)], Truth(error="truncated", first=None), chat=True, end="cut")
case("cut after tokens (FIN)", FIVE[:2], Truth(error="truncated", tokens=2), end="cut")
case("cut inside an event", [*FIVE[:2], FIVE[2][:40]], Truth(error="truncated", tokens=2), end="cut")
case("cut by RST", FIVE[:2], Truth(error="reset", tokens=2), end="reset")
case("ended in order without a finish", FIVE[:2], Truth(error="truncated", tokens=2))
case("RST after the finish", [*FIVE, sse(text("", "stop"), usage(5))], GOOD, end="reset")
_gzip = zlib.compressobj(wbits=31)
case("gzip", [_gzip.compress(piece) + _gzip.flush(zlib.Z_SYNC_FLUSH) for piece in (*FIVE, END)] + [_gzip.flush()],
     GOOD, headers=[b"Content-Encoding: gzip"])
case("gzip in members", [gzip.compress(piece) for piece in (*FIVE, END)], GOOD, headers=[b"Content-Encoding: gzip"])
_deflate = zlib.compressobj(wbits=-15)
case("deflate without a header", [_deflate.compress(piece) + _deflate.flush(zlib.Z_SYNC_FLUSH) for piece in (*FIVE, END)],
     GOOD, headers=[b"Content-Encoding: deflate"])
case("early hints first", [*FIVE, END], GOOD, early=b"HTTP/1.1 103 Early Hints\r\nContent-Encoding: gzip\r\n\r\n")
case("an encoding that nobody asked for", [b"\x1b\x05\x00"], Truth(error="encoded", first=None),
     headers=[b"Content-Encoding: br"])
case("HTTP 500 in gzip", [gzip.compress(as_json({"error": {"message": "boom"}}))], Truth(error="http_500", first=None),
     frame="length", status=b"500 Oh", kind=b"application/json", headers=[b"Content-Encoding: gzip"])

GROUP = "other interfaces"
case("OpenAI responses", [b'event: response.created\ndata: {"type":"response.created","response":{"usage":null}}\n\n',
     *(b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"%b "}\n\n' % word
     for word in (b"a",
     b"b", b"c")),
     b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":5,"output_tokens":3}}}\n\n'],
     Truth(tokens=3, first=1, last=3, prompt=5), chat=True)
case("Anthropic messages",
     [b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":5,"output_tokens":1}}}\n\n',
     *(b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"%b "}}\n\n' % word
     for word in (b"a",
     b"b", b"c")),
     b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":3}}\n\n'
     b'event: message_stop\ndata: {"type":"message_stop"}\n\n'],
     Truth(tokens=3, first=1, last=3, prompt=5), chat=True)
case("Anthropic messages, a cached prompt",
     [b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":21,'
     b'"cache_read_input_tokens":5,"cache_creation_input_tokens":6,"output_tokens":1}}}\n\n',
     b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"type":"text_delta","text":"a "}}\n\n',
     b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":1}}\n\n'
     b'event: message_stop\ndata: {"type":"message_stop"}\n\n'],
     Truth(tokens=1, first=1, last=1, prompt=32, cached=5), chat=True)
case("Ollama", [*(as_json({"message": {"role": "assistant", "content": word}, "done": False}) + b"\n" for word in ("a ",
     "b ")), as_json({"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop",
     "eval_count": 2, "prompt_eval_count": 5})+ b"\n"], Truth(tokens=2, last=1, prompt=5), chat=True,
     kind=b"application/x-ndjson")
