"""Recipes: TOML files that set options, with one section per class of options or without sections."""

import tomllib
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
