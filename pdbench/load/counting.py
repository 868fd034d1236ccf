"""How many tokens an answer has, and which of the ways to count them is believed.

Ids or logprobs count exactly. Usage counts where every chunk carries it and it grows with them. Else a chunk with something in
it counts as one instant, and the answer's usage says how many tokens there were: it corrects `output_tokens`, never instants.
Counts that cannot be are refused, those that contradict what arrived leave `output_tokens` None; both are noted for a flag.
"""

import msgspec

from pdbench.load.chunks import Part, Usage, failed
from pdbench.load.request_fields import Asked
from pdbench.load.texts import bytes_of, coarse, echoed_chunks
from pdbench.load.unsent import UNSEEN_TOKENS, Answer, bound_first, unsent_at_end, unsent_reasoning
from pdbench.records import RequestRecord

REFUSED, CONTRADICTS, UNKNOWN = "usage-refused", "usage-contradicts", "tokens-unknown"
REASONING, UNSENT = "reasoning-unknown", "unsent-unknown"
LONGER, OTHER_PROMPT, HELD_BACK = "answers-too-long", "prompt-tokens-differ", "tokens-held-back"
_MOST_PROMPT_TOKENS = 10_000_000
_ORDER = 10
"""A count this many times beyond all that could be is nonsense."""
_LIMITS = ("length", "max_tokens")
"""Finish reasons of answers that reached their limit."""
_OTHER_SHARE = 0.02
"""By more than this and `UNSEEN_TOKENS` the server's count of a prompt is not the tokenizer's."""


class Counter:
    """Counts one answer's tokens into its record as they come; the response's fast path adds instants without it."""

    def __init__(self, record: RequestRecord) -> None:
        self.record = record
        self.by_token_ids = self.by_chunks = self.by_logprobs = self.by_usage = self.by_messages = self.tools = False
        self.usage: int | None = None
        self._finished: set[int] = set()
        self._first_text: str | None = None  # of the chunk with the first token; None: the answer's first text
        self._finals: dict[int, tuple[str, list[int]] | None] = {}  # each choice's; None: all its chunks have a reason
        self._repeats: list[tuple[Part, Usage | None, float]] = []
        self._choices: list[tuple[int, int]] = []  # (place in token_s, choice) of those that are not choice 0's
        self._seen: set[int] = set()
        self._steps: list[tuple[int, bool, float]] | None = []  # the chunks counted by usage; None: it does not count
        self._recounted = self.settled = False
        self._usage_on_chunks = self._usage_at = -1
        self._answer_index = self._reasoning = self._reasoning_chunks = self._ends_sent = 0

    @property
    def usage_ended(self) -> bool:
        """Was an event with nothing but usage the last to come?"""
        return self._usage_at == len(self.record.token_s) > 0

    @property
    def finished(self) -> int:
        """How many choices have their finish reason."""
        return len(self._finished)

    @property
    def _ended(self) -> int:
        """How many choices have ended before their limit."""
        return 0 if (self.record.finish_reason or "length").lower() in _LIMITS else self.finished

    def finish(self, choice: int) -> bool:
        """A choice has its finish reason; have all?"""
        self._finished.add(choice)
        return self._finished >= self._seen | self._first_choice

    @property
    def _first_choice(self) -> set[int]:
        """Choice 0, if it has a token: the response's fast path adds its tokens alone."""
        return {0} if len(self.record.token_s) > len(self._choices) else set()

    def is_repeat(self, part: Part, usage: Usage | None, at_s: float, texts: list[str]) -> bool:
        """Is this the final chunk once more? It is kept: what comes after it, or `settle`, may say that it was another token."""
        final, known = (part.text, part.token_ids), self._finals.get(part.choice)
        counts = part.filled or bool(part.tokens)
        if known is not None and counts and (known != final or part.finish is None):  # every chunk has a finish reason
            self._take_repeats(texts)
            self._finals[part.choice] = known = None
        if part.finish is None or failed(part.finish):
            return False
        if known != final:
            self._finals.setdefault(part.choice, final if self.record.token_s else None)
        elif counts:
            self._repeats.append((part, usage, at_s))
        return known == final

    def _take_repeats(self, texts: list[str], most: int | None = None) -> None:
        """Count what was kept as repeats, up to `most` tokens; not of several choices, as now it would come out of order."""
        repeats, self._repeats = self._repeats, []
        for part, usage, at_s in repeats:
            if self._choices or (most is not None and len(self.record.token_s) >= most):
                break
            texts.append(part.text)
            if self.record.canary:
                self.record.canary.token_ids += part.token_ids
            self.take_part(part, usage, at_s)

    def take_part(self, part: Part, usage: Usage | None, at_s: float) -> int:
        """Count a choice's part, which came at `at_s`; its tokens, as far as they are known."""
        if part.filled:
            self._seen.add(part.choice)
        tokens = part.tokens
        said_once = part.finish is not None and not part.filled and self.by_chunks and not self.by_token_ids
        if tokens and said_once and tokens >= len(self.record.token_s):  # of the whole answer, at its end
            self.usage = self.usage or tokens
            return 0
        if tokens is None or (tokens == 0 and part.filled and not self.by_token_ids):
            tokens = self._tokens_without_ids(part, usage, at_s)
        elif part.way == "token_ids":
            self.by_token_ids |= tokens > 0
        else:
            self.by_logprobs = True
        if tokens and not self.record.token_s:
            self._first_text = part.text
        self._ends_sent += bool(tokens and part.finish and not part.filled)
        if tokens:
            self._add(tokens, part.choice, at_s, reasoning=part.reasoning, filled=part.filled)
        return tokens

    def add_many(self, tokens: int, at_s: float) -> None:
        """Count the tokens of a chunk of the usual form that has several."""
        self._add(tokens, 0, at_s, reasoning=False, filled=True)

    def take_usage(self, usage: Usage, *, alone: bool) -> None:
        """A usage object; `alone`: in an event without choices."""
        record = self.record
        if usage.prompt is not None:
            planned, cached = record.prompt_tokens, max(0, usage.cached or 0)
            slack = UNSEEN_TOKENS + _OTHER_SHARE * (planned or 0)
            differs = [
                planned is not None and abs(count - planned) > slack for count in (usage.prompt, usage.prompt + cached)
            ]
            # Some servers leave cached tokens out.
            counted = usage.prompt + cached if cached > usage.prompt or differs == [True, False] else usage.prompt
            if 0 < counted <= _MOST_PROMPT_TOKENS and usage.prompt >= 0:
                if all(differs):
                    self._note(OTHER_PROMPT)
                record.prompt_tokens = counted
            else:
                self._note(REFUSED)
        if usage.cached is not None:
            if 0 <= usage.cached <= (_MOST_PROMPT_TOKENS if record.prompt_tokens is None else record.prompt_tokens):
                record.cached_prompt_tokens = usage.cached
            else:
                self._note(REFUSED)
        if usage.completion is not None and usage.completion >= 0:
            self.usage = max(usage.completion, self.usage or 0)
            if alone:  # one between tokens is no end, and then none is
                self._usage_at = len(record.token_s) if self._usage_at in (-1, len(record.token_s)) else 0
        elif usage.completion is not None:
            self._note(REFUSED)
        if usage.reasoning is not None and usage.reasoning >= 0:
            self._reasoning = max(self._reasoning, usage.reasoning)

    def settle(self, texts: list[str], asked: Asked) -> None:
        """Decide what the answer's counts are; once, at its end."""
        record = self.record
        self.settled = True
        if self._steps and self._hidden(asked):
            self._recount()  # it grows with choices that are not sent, too
        # A final chunk comes twice at most, unless usage counts otherwise; one more in chunks of several tokens says nothing.
        repeated = sum(part.tokens or 1 for part, usage, _ in self._repeats if usage is None)
        if len(self._repeats) > 1 or (
            repeated and self.usage is not None and self.usage - len(record.token_s) == repeated
        ):
            self._take_repeats(texts, self.usage)
        if asked.echo is True and record.token_s and texts and self.by_chunks and not self.by_token_ids:
            echoed = 0 if self._choices else echoed_chunks(texts, msgspec.json.decode(asked.prompt))
            if echoed:
                del record.token_s[:echoed]
                texts, self._first_text = texts[echoed:], None
        instants = len(record.token_s)
        ways = {
            "token_ids": self.by_token_ids, "logprobs": self.by_logprobs, "usage": self.by_usage, "chunks": self.by_chunks,
        }  # fmt: skip
        used = [way for way, was_used in ways.items() if was_used]
        if used:
            record.counted_by = used[0] if len(used) == 1 else "mixed"
        usage = self._plausible_usage(instants, texts, asked)
        if record.error is not None:
            # A count that came before the last token is of another answer than the one that was cut.
            at_end = (self.usage_ended or self._finished) and not self._recounted
            record.output_tokens = usage if at_end and (usage or 0) >= instants else None
        else:
            record.output_tokens = self._output_tokens(instants, usage, texts, asked)
        if asked.tokens and (record.output_tokens or 0) > asked.tokens + 1:  # some count the end of text
            self._note(LONGER)
        if self._choices:
            record.token_choice = [0] * instants
            for place, choice in self._choices:
                record.token_choice[place] = choice
        if self._reasoning_chunks:
            record.answer_index = self._answer_index if self._answer_index < instants else None
        total = record.output_tokens
        if self._reasoning and total is not None and self._reasoning <= total:
            record.reasoning_tokens = self._reasoning
        elif self._reasoning:
            self._note(REFUSED)
        elif self._reasoning_chunks and total == instants:
            record.reasoning_tokens = self._reasoning_chunks
        if total is not None and total > instants:
            self._settle_unsent(total, texts, asked)

    def _settle_unsent(self, total: int, texts: list[str], asked: Asked) -> None:
        """Which of more tokens than instants were not sent, and what that leaves open of the others."""
        record, marked = self.record, self._reasoning_chunks > 0
        answer = Answer(
            texts=texts,
            first_text=next(iter(texts), "") if self._first_text is None else self._first_text,
            reasoning=(record.reasoning_tokens or 0) if self._reasoning else 0,
            marked=marked,
            tools=self.tools,
            ends=max(0, self._ended - (self._ends_sent if marked or self.tools else 0)),
            end_tokens=asked.end_tokens,
            hidden=self._hidden(asked),
        )
        reasoning = unsent_reasoning(record, answer, total)
        at_end = None if reasoning is None else unsent_at_end(record, answer, total - reasoning)
        record.unsent_tokens = None if reasoning is None or at_end is None else reasoning + at_end
        if record.unsent_tokens is None:
            self._note(REASONING if reasoning is None else UNSENT)
        if record.error is None and (record.coarse or self.by_chunks or answer.parsed):
            unsure = min(at_end or 0, answer.ends * answer.end_tokens)
            bound_first(record, answer, total - (record.unsent_tokens or 0) + unsure)
            if record.coarse and not self.by_chunks:
                self._note(HELD_BACK)

    def _hidden(self, asked: Asked) -> bool:
        """May usage count choices of which nothing came?"""
        return asked.counted_choices > len(self._first_choice | {choice for _, choice in self._choices})

    def short(self, asked: Asked) -> str | None:
        """Why a whole answer is shorter than it had to be; None where it is not, or nobody knows."""
        record, fewest = self.record, asked.fewest
        if fewest is None or record.output_tokens is None or max(record.output_tokens, len(record.token_s)) >= fewest:
            return None
        if self.usage is None and (self.tools or self._reasoning_chunks):
            return None  # a parser may have held tokens back
        certain = self.usage is not None or record.counted_by in ("token_ids", "logprobs", "usage")
        # Chunks may hold several tokens: then only an end before the limit that must be reached shows that some are missing.
        reached = (record.finish_reason or "").lower() in _LIMITS
        if not certain and (reached or fewest != asked.tokens):
            return None
        why = f"min_tokens {asked.min_tokens}, which the server did not keep"
        if asked.ignore_eos:
            why = "ignore_eos (--no-ignore-eos for servers that do not know it)"
        return (
            f"{record.output_tokens} of {fewest} tokens, finish_reason {record.finish_reason}: the request says {why}"
        )

    def _tokens_without_ids(self, part: Part, usage: Usage | None, at_s: float) -> int:
        """The tokens of a part by usage where that counts, else 1 if there is something in it."""
        total = None if usage is None else usage.completion
        if self._steps is not None and not (self.by_chunks or self.by_token_ids or self.by_logprobs):
            step = None if total is None or total < 0 else total - len(self.record.token_s)
            if part.filled:
                if step is not None and 1 <= step <= 4 * len(part.text) + UNSEEN_TOKENS:
                    self.by_usage = True
                    self._usage_on_chunks = max(self._usage_on_chunks, total or 0)
                    self._steps.append((part.choice, part.reasoning, at_s))
                    return step
                if step == 0 and part.finish is not None and self.by_usage:
                    return 0  # text that was held back
                self._usage_on_chunks = max(self._usage_on_chunks, total or 0)
                if step is not None:
                    self._recount()
                self._steps = None
            elif self.by_usage and step is not None and 0 < step <= UNSEEN_TOKENS:
                return step
        if part.filled:
            self.by_chunks = True
        return int(part.filled)

    def _recount(self) -> None:
        """Usage on the chunks does not grow with them: one instant per chunk instead."""
        steps, self._steps = self._steps or [], None
        self.record.token_s[:], self._choices = [], []
        self._answer_index = self._reasoning_chunks = self._ends_sent = 0
        self.by_usage, self.by_chunks, self._recounted = False, True, True
        for choice, reasoning, at_s in steps:
            self._add(1, choice, at_s, reasoning=reasoning, filled=True)

    def _add(self, tokens: int, choice: int, at_s: float, *, reasoning: bool, filled: bool) -> None:
        token_s = self.record.token_s
        before = len(token_s)
        # What is empty (an id without text) belongs to what comes next.
        if (reasoning or not filled) and self._answer_index == before:
            self._answer_index = before + tokens
        if reasoning:
            self._reasoning_chunks += tokens
        if not before:
            self.record.first_tokens = tokens
        token_s.extend([at_s] * tokens)
        if choice:
            self._choices.extend((place, choice) for place in range(before, before + tokens))

    def _plausible_usage(self, instants: int, texts: list[str], asked: Asked) -> int | None:
        """The server's count unless it cannot be."""
        usage = self.usage
        if usage is None:
            return None
        junk = self._recounted and usage <= self._usage_on_chunks and usage < instants
        most = max(asked.tokens or 0, instants, UNSEEN_TOKENS)
        if usage > _ORDER * most:
            most = max(most, bytes_of(texts))
        if junk or usage > _ORDER * most or (usage == 0 and instants):
            self._note(REFUSED)
            self.usage = None
        return self.usage

    def _output_tokens(self, instants: int, usage: int | None, texts: list[str], asked: Asked) -> int | None:
        """The answer's tokens; None where nobody knows."""
        said, most = usage or 0, max(instants, bytes_of(texts)) + UNSEEN_TOKENS
        too_many = (said > (asked.tokens or 0) or self._recounted) and said - min(self._reasoning, said) > most
        if self.record.counted_by in ("token_ids", "logprobs"):
            # A parser on the server may hold back tokens that it counts: only then are there more than came.
            if usage is None or usage == instants:
                return instants
            may_hold = self.tools or self._reasoning_chunks or self._reasoning or self._hidden(asked)
            may_hold = may_hold or usage - instants <= max(1, self._ended * asked.end_tokens)  # a marker, an end
            if usage > instants and may_hold and not too_many:
                return usage
            self._note(CONTRADICTS)
            return instants
        if self.record.counted_by == "usage":
            return max(instants, usage or 0)
        if usage is None:
            if coarse(texts):
                self._note(UNKNOWN)
                return None
            return instants
        if too_many or instants - usage > max(1, instants // 50):
            self._note(CONTRADICTS)
            return None
        return usage

    def _note(self, note: str) -> None:
        if note not in self.record.notes:
            self.record.notes.append(note)


def message_rest(part: Part, texts: list[str], *, by_messages: bool) -> Part:
    """What a `message` adds to the texts before it: nothing where they came as deltas or are the same, else what is new."""
    so_far = "".join(texts)
    if by_messages and not so_far.startswith(part.text):
        return msgspec.structs.replace(part, text=part.text.removeprefix(so_far))
    return msgspec.structs.replace(part, text="", filled=False, tokens=None)
