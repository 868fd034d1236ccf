"""Verdicts in words, a line each: "TBT p99 13.2 x lower, 95 % 11.8–14.9 (58.6 → 4.4 ms)"; in English and Chinese.

Try: pdbench compare single_results disaggregated_results
"""

from pdbench.analysis.compare import Comparison, Difference, Interval
from pdbench.analysis.thresholds import ThresholdResult

WORDS = {
    "en": {
        "lower": "lower",
        "higher": "higher",
        "to": " to ",
        "same": "the same within 5 %",
        "unclear": "no difference that {k} trials can show",
        "would": "; 5 % needs {n}",
        "never": "; 5 % needs over 1,000",
        "one-trial": "one trial: no interval",
        "few-values": "not judged: {0} values, {1} needed",
        "zero": "not judged: it was zero in a trial",
        "advice": "One trial shows what was seen, not how sure it is: measure again with --trials 3 for intervals and verdicts.",
    },
    "zh": {
        "lower": "更低",
        "higher": "更高",
        "to": " 至 ",
        "same": "在 5 % 以内相同",
        "unclear": "{k} 次试验看不出差异",
        "would": "；看出 5 % 需要 {n} 次",
        "never": "；看出 5 % 需要 1,000 次以上",
        "one-trial": "仅一次试验：无区间",
        "few-values": "未判定：只有 {0} 个数值，需要 {1} 个",
        "zero": "未判定：某次试验中为零",
        "advice": "一次试验只说明看到了什么，不说明有多可靠：请用 --trials 3 重新测量，以得到区间和结论。",
    },
}
TITLES_ZH = {
    "Output tokens/s": "每秒输出 token",
    "Tokens/s per GPU": "每 GPU 每秒 token",
    "Goodput": "有效吞吐 (goodput)",
    "Energy per token": "每 token 能耗",
    "Mean power": "平均功率",
}


def title(line: Difference, language: str = "en") -> str:
    """The metric's name in the reader's language."""
    return TITLES_ZH.get(line.metric.title, line.metric.title) if language == "zh" else line.metric.title


def line(line: Difference, language: str = "en") -> str:
    """The whole verdict: metric, change, interval, both values."""
    return f"{title(line, language)}: {judgement(line, language, spelled=True)} ({values(line)})"


def advice(comparison: Comparison, language: str = "en") -> str:
    """What to do where one trial stands behind the figures; empty where there are more."""
    return WORDS[language]["advice"] if comparison.one_trial else ""


def values(line: Difference) -> str:
    """Both runs' figures with their unit: `58.6 → 4.44 ms`."""
    return f"{number(line.a)} → {number(line.b)} {line.metric.unit}".rstrip()


def judgement(line: Difference, language: str = "en", spelled: bool = False) -> str:
    """The change and its interval, `2.18 x lower (2.10–2.26)`, or the change seen and why there is none.

    `spelled` says what a table's header and note say otherwise: that the interval is a 95 % one, that one trial gives none.
    """
    words = WORDS[language]
    if line.verdict == "unjudged" or line.ratio is None:
        seen = "" if line.change is None else percent(line.change)
        why = words[line.unjudged or "zero"].format(line.values, line.values_needed)
        why = "" if line.unjudged == "one-trial" and seen and not spelled else why
        return ", ".join(filter(None, (seen, why)))
    if line.verdict in ("better", "worse"):
        change, interval = times(line.ratio, language)
        more = ""
    else:
        interval = f"{percent(line.ratio.low)}{words['to']}{percent(line.ratio.high)}"
        change, more = words["same"], ""
        if line.verdict == "unclear":
            needed = line.trials_needed
            change = words["unclear"].format(k=line.trials)
            more = words["never"] if needed is None else words["would"].format(n=max(needed, line.trials + 1))
    return (f"{change}, 95 % {interval}" if spelled else f"{change} ({interval})") + more


def times(ratio: Interval, language: str = "en") -> tuple[str, str]:
    """A ratio and its interval as people say it: from 1.5-fold on `2.4 x higher`, below that in per cent."""
    words = WORDS[language]
    lower = ratio.value < 1
    word = words["lower" if lower else "higher"]
    factor = (1 / ratio.value, 1 / ratio.high, 1 / ratio.low) if lower else (ratio.value, ratio.low, ratio.high)
    if factor[0] >= 1.5:
        return f"{number(factor[0])} x {word}", f"{_above_one(factor[1])}–{number(factor[2])}"
    change = [abs(bound - 1) * 100 for bound in (ratio.value, ratio.high, ratio.low)]
    low, high = sorted(change[1:])
    return f"{number(change[0])} % {word}", f"{number(low)}–{number(high)} %"


def percent(ratio: float) -> str:
    """A ratio as a signed change: +4.1 %."""
    change = (ratio - 1) * 100
    return f"{change:+.{0 if abs(change) >= 100 else 1}f} %".replace("-", "−")


def _above_one(factor: float) -> str:
    """A bound that excludes 1, with as many digits as show it: a verdict and its interval must not contradict each other."""
    return number(factor) if number(factor) != "1.00" else f"{1 + float(f'{factor - 1:.1g}'):.12g}"


def number(value: float) -> str:
    """Three significant digits, thousands apart."""
    if 0 < abs(value) < 0.001:
        return f"{value:.1g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


def threshold(result: ThresholdResult) -> str:
    """A condition with the reason for its outcome in one line."""
    change = result.change
    if change is None:
        return f"{result.condition.text}: {line(result.difference)}"
    value, low, high = (f"{'+' if v >= 0 else '−'}{number(abs(v))}" for v in (change.value, change.low, change.high))
    return f"{result.condition.text}: {value} {result.unit}, 95 % {low} to {high}"
