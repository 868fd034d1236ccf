"""Recipes, TOML files that set options, with one section per class of options or without sections; which options count where several
are given: a flag against a recipe, and options that others leave without effect."""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import date, time
from pathlib import Path
from typing import Any

from pdbench.config import ClusterConfig, LoadConfig, PowerConfig, ProxyConfig, ServeConfig, flag_of, slo_limits
from pdbench.errors import OptionError, UserError

SECTIONS = {
    "serve": ServeConfig,
    "load": LoadConfig,
    "power": PowerConfig,
    "cluster": ClusterConfig,
    "proxy": ProxyConfig,
}

_OF_BOTH = {field.name for field in fields(LoadConfig)} & {field.name for field in fields(ProxyConfig)}
"""What a load and a proxy each have of their own under one name."""

_TRACE = tuple(field.name for field in fields(LoadConfig) if field.name.startswith("trace"))
REPLACES = {
    "requests": ("duration_s", "steady_s"),
    "duration_s": ("requests",),
    "steady_s": ("requests",),
    "rate": ("stages", *_TRACE),
    "stages": ("rate", "ramp_to", *_TRACE),
    "trace": ("rate", "ramp_to", "stages", "prompt_file"),
    "prompt_file": _TRACE,
    "url": ("against",),
    "against": ("url",),
}
"""A flag takes the place of these options of a recipe; the recipe's would contradict it."""


def without_replaced(settings: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """A recipe's settings without those in whose place a command's flags are."""
    flags = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    replaced = {name for flag in flags for name in REPLACES.get(flag, ())} - flags
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--slo" or word.startswith("--slo="):
            replaced |= slo_limits(word.partition("=")[2] or following).keys()
    kept = {name: value for name, value in settings.items() if name not in replaced}
    if isinstance(kept.get("slo"), str):
        kept["slo"] = ",".join(part for option, part in slo_limits(kept["slo"]).items() if option not in flags)
    return kept


def check(kind: Any, path: Path | None) -> None:
    """Raises ValueError, which cyclopts reports, for what is no recipe: it would be left out without a word."""
    if path and not (path.suffix == ".toml" and path.is_file()):
        raise ValueError("Give a .toml file.")


def read(path: Path, command: str) -> dict[str, Any]:
    """Option -> value for a command, sections taken off. Raises UserError for a file that cannot be read, for an unknown section or key
    in one, and for an option that is there twice.

    Of an option in [proxy] and in another section, `pdbench proxy` takes the one in [proxy], other commands the other one.
    """
    try:
        settings = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no recipe {path}: `ls recipes/` shows those that come with pdbench") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a .toml file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text: write it as UTF-8") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists in lists without end
        raise UserError(f"{path} is not TOML: {error}") from None
    sections = {key: value for key, value in settings.items() if isinstance(value, dict)}
    places: dict[str, str] = {}
    options: dict[str, Any] = {}
    flat = {key: value for key, value in settings.items() if key not in sections}
    for section, values in sorted({"": flat, **sections}.items(), key=lambda item: _is_foreign(item[0], command)):
        place = f"[{section}]" if section else "no section"
        if section and section not in SECTIONS:
            raise UserError(f"{path}: no section {place}: choose from {', '.join(f'[{name}]' for name in SECTIONS)}")
        known = {field.name for field in fields(SECTIONS[section])} if section else set()
        for key, value in values.items():
            name = key.replace("-", "_")
            if section and name not in known:
                raise OptionError(f"{path}: no option {key} in {place}; `pdbench run --help` lists them")
            if name.startswith("no_"):
                raise UserError(f"{path}: {key} is no option of a recipe: write {name[3:]} = false")
            if isinstance(value, list) and any(isinstance(each, dict) for each in value):
                raise UserError(f"{path}: [[{key}]] is a list of sections: write [{key}] once")
            if isinstance(value, date | time):
                raise UserError(f"{path}: {key} is a date: write text in quotes")
            earlier = places.get(name)
            if earlier and (earlier == place or "[proxy]" not in (earlier, place)):
                raise UserError(f"{path}: {name} is there twice, in {earlier} and in {place}: keep one of them")
            places[name] = place
            if not (section and _is_foreign(section, command) and name in _OF_BOTH):
                options.setdefault(name, value)
    return options


def _is_foreign(section: str, command: str) -> bool:
    """Do a command's options stand in another section?"""
    return section != "proxy" if command == "proxy" else section == "proxy"


def _own_lengths(load: LoadConfig) -> bool:
    return not (load.trace or load.prompt_file)


_COUNTS: tuple[tuple[str, Callable[[LoadConfig], object], str], ...] = (
    ("requests", lambda load: load.duration_s is None, "--duration-s ends the load"),
    ("requests", lambda load: load.steady_s is None, "--steady-s ends the load"),
    ("arrival", lambda load: load.rate and not load.ramp_to, "only a --rate without --ramp-to has it"),
    ("burstiness", lambda load: load.arrival == "gamma", "it needs --arrival gamma"),
    ("ramp_s", lambda load: load.ramp_to, "it needs --ramp-to"),
    ("time_scale", lambda load: load.trace, "it needs --trace"),
    ("input_tokens", _own_lengths, "the trace or prompt file has lengths of its own"),
    ("input_distribution", lambda load: load.input_tokens and _own_lengths(load), "only --input-tokens has it"),
    ("input_spread", lambda load: load.input_distribution != "fixed", "it needs --input-distribution"),
    ("output_tokens", lambda load: not load.trace, "the trace has lengths of its own"),
    ("output_distribution", lambda load: not load.trace, "the trace has lengths of its own"),
    ("output_spread", lambda load: load.output_distribution != "fixed", "it needs --output-distribution"),
    ("shared_prefix", _own_lengths, "the trace or prompt file has prompts of its own"),
    ("prefix_groups", lambda load: load.shared_prefix, "it needs --shared-prefix"),
    ("verbatim_prompts", lambda load: load.prompt_file, "it needs --prompt-file"),
    ("reply_lengths", lambda load: load.prompt_file, "it needs --prompt-file"),
)
"""An option, when it counts, and why it does not else."""


def without_effect(load: LoadConfig) -> dict[str, str]:
    """Option -> one line, for those that were set and change nothing about this load."""
    usual = LoadConfig()
    lines: dict[str, str] = {}
    for name, counts, reason in _COUNTS:
        value = getattr(load, name)
        if value != getattr(usual, name) and not counts(load):
            words = "" if value is True else f" {value}"
            lines.setdefault(name, f"{flag_of(name)}{words} has no effect: {reason}")
    return lines
