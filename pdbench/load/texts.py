"""What an answer's text tells of its tokens where nothing else does: bounds, as no tokenizer is at hand."""

import re
from collections.abc import Sequence

from pdbench.records import COARSE_SHARE

TOKEN_BYTES = 16
"""Few tokens are longer."""
_SPLIT_WORD = re.compile(r"\w\0(?=\w)")
# Tokenizers first split texts into such pieces (GPT-2's pattern and later ones; SentencePiece's are no larger), and no token spans two.
# What is no ASCII and no letter (marks, signs) is a part of the word or of the signs beside it, so that no script has too many.
_SIGN, _MARK, _ANY = r"(?:[^\w\s]|_)", r"[^\w\s\x00-\x7f]", r"[^\s\x00-@\[-`{-\x7f]"
_PIECES = re.compile(rf"{_SIGN}?{_MARK}*[^\W\d_]{_ANY}*(?:'[a-z]{{1,2}})?|[0-9]+|{_SIGN}+|{_ANY}+")
_BLIND = 2.5
"""Where more chunks than this make one piece (scripts without spaces), pieces do not show whether a chunk holds two tokens."""
_ODD = 1.02
"""A few chunks may hold two tokens all the same, as where a character comes in parts."""
_SINGLE_SHARE = 0.1
"""In such scripts one letter in so many chunks, at least, is a chunk of its own, if these are tokens; chunks of two tokens hardly ever are one."""
_SPLIT_SHARE = 0.02
"""So many tokens, at least, go on in a word that the one before began. Chunks that never do may be whole words, of any number of tokens."""

_MARKERS = 2
"""Tokens of an answer that are several pieces, as `<think>` and `</think>`."""


def bytes_of(texts: Sequence[str]) -> int:
    return len("".join(texts).encode("utf-8", "surrogatepass"))


def fewest_tokens(texts: Sequence[str]) -> int:
    """A lower bound for the tokens in chunks of these texts: their pieces, one for each chunk at least."""
    return sum(max(1, len(_PIECES.findall(text))) for text in texts if text)


def are_tokens(texts: Sequence[str]) -> bool:
    """Does each chunk hold one piece, where two tokens would often be two, and are these not whole words?"""
    texts = [text for text in texts if text]
    pieces = len(_PIECES.findall("".join(texts)))
    shows = len(texts) <= _BLIND * pieces or sum(len(text) == 1 for text in texts) >= _SINGLE_SHARE * len(texts)
    split = len(_SPLIT_WORD.findall("\0".join(texts)))
    return shows and split >= _SPLIT_SHARE * len(texts) and fewest_tokens(texts) <= _ODD * len(texts)


def echoed_chunks(texts: Sequence[str], prompt: object) -> int:
    """How many of the first chunks repeat the prompt; 0 where the first ones are not it."""
    echoed, so_far, wanted = 0, "", prompt.strip() if isinstance(prompt, str) else ""
    for place, text in enumerate(texts, 1):
        so_far += text
        # The whitespace at its end may come in chunks of its own, or not at all.
        if wanted and so_far.strip() == wanted and (not echoed or str(prompt).lstrip().startswith(so_far.lstrip())):
            echoed = place
        elif echoed or len(so_far) > len(str(prompt)):
            break
    return echoed


def coarse(texts: Sequence[str]) -> bool:
    """Do chunks plainly hold more than a token: several of them more than one piece, or most that or more bytes than tokens have?"""
    texts = [text for text in texts if text]
    pieces = [fewest_tokens([text]) > 1 for text in texts]
    larger = sum(1 for text, several in zip(texts, pieces, strict=True) if several or len(text) > TOKEN_BYTES)
    return 2 * larger > len(texts) or sum(pieces) > max(_MARKERS, COARSE_SHARE * len(texts))


def joined(texts: Sequence[str]) -> str:
    """The text of an answer; halves of a character that came in two chunks are joined, what stays half is replaced."""
    text = "".join(texts)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
