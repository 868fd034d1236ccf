"""Recipes, TOML files that set options, with one section per class of options or without sections; which options count where several
are given: a flag against a recipe, and options that others leave without effect."""

import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pdbench.config import ClusterConfig, LoadConfig, PowerConfig, ProxyConfig, ServeConfig
from pdbench.errors import UserError

SECTIONS = {
    "serve": ServeConfig,
    "load": LoadConfig,
    "power": PowerConfig,
    "cluster": ClusterConfig,
    "proxy": ProxyConfig,
}

_TRACE = tuple(field.name for field in fields(LoadConfig) if field.name.startswith("trace"))
REPLACES = {
    "requests": ("duration_s", "steady_s"),
    "duration_s": ("requests",),
    "steady_s": ("requests",),
    "rate": ("stages", *_TRACE),
    "stages": ("rate", "ramp_to", *_TRACE),
    "trace": ("rate", "ramp_to", "stages", "prompt_file"),
    "prompt_file": _TRACE,
}
"""A flag takes the place of these options of a recipe; the recipe's would contradict it."""


def check(kind: Any, path: Path | None) -> None:
    """Raises ValueError, which cyclopts reports, for what is no recipe: it would be left out without a word."""
    if path and not (path.suffix == ".toml" and path.is_file()):
        raise ValueError("Give a .toml file.")


def read(path: Path) -> dict[str, Any]:
    """Option -> value, sections taken off. Raises UserError for a file that cannot be read, and for an unknown section or key in one."""
    try:
        settings = tomllib.loads(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no recipe {path}: `ls recipes/` shows those that come with pdbench") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name a .toml file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text: write it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    options: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(value, dict):
            options[key] = value
            continue
        if key not in SECTIONS:
            raise UserError(f"{path}: no section [{key}]: choose from {', '.join(f'[{name}]' for name in SECTIONS)}")
        for name in value:
            if name not in (field.name for field in fields(SECTIONS[key])):
                raise UserError(f"{path}: no option {name} in [{key}]; `pdbench run --help` lists them", exit_code=2)
        options |= value
    return options


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
            lines.setdefault(name, f"--{name.replace('_', '-')}{words} has no effect: {reason}")
    return lines
