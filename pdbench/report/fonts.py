"""A font with Chinese characters for the pictures, where this machine has one; matplotlib's own font has none.

Try: python -c "from pdbench.report.fonts import chinese_font; print(chinese_font())"
"""

import logging
import re
from functools import cache
from pathlib import Path

from matplotlib.font_manager import findSystemFonts, fontManager

_CHINESE = re.compile(
    r"cjk|han ?sans|noto ?sans ?[st]c|wen ?quan ?yi|wqy|droid ?sans ?fallback|ya ?hei|msyh|sim ?hei|pingfang|heiti"
    r"|hiragino ?sans ?gb|arial ?unicode|uming|ukai",
    re.IGNORECASE,
)
NO_FONT = "no font with Chinese characters was found, so the pictures are in English: install fonts-noto-cjk, for one"


@cache
def chinese_font() -> str | None:
    """The family's name; None when there is none. Looks at the folders too, for what came after matplotlib's list was made."""
    if not _known():
        for path in findSystemFonts():
            if _CHINESE.search(Path(path).stem.replace("-", " ")):
                fontManager.addfont(path)
    # That a Chinese font has no bold cut needs no warning for every text.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    # Fonts for all of Chinese, Japanese and Korean come in a cut for each; simplified Chinese is ours.
    return min(_known(), key=lambda name: (not name.endswith("SC"), name), default=None)


def _known() -> list[str]:
    return [entry.name for entry in fontManager.ttflist if _CHINESE.search(entry.name)]


def language_of_pictures(language: str) -> str:
    """`language` where this machine can draw it, else English."""
    return "en" if language == "zh" and chinese_font() is None else language
