"""The commands: each reads its options and calls one function of the rooms below. Nothing is measured or judged here.

Try: pdbench --help
"""

import sys
import tomllib
from pathlib import Path

import cyclopts
from cyclopts import App
from cyclopts.config import Dict as Settings
from rich.console import Console

from pdbench import __version__
from pdbench.errors import UserError

app = App(
    name="pdbench", help="Does prefill/decode disaggregation pay, in milliseconds and in joules?", version=__version__
)


def _recipe_settings(arguments: list[str]) -> list[Settings]:
    """A recipe named as the first positional argument (a .toml file) gives every option that no flag sets."""
    named = [Path(text) for text in arguments[1:2] if text.endswith(".toml")]
    for path in named:
        try:
            return [Settings(tomllib.loads(path.read_text()), use_commands_as_keys=False, source=str(path))]
        except FileNotFoundError:
            raise UserError(f"no recipe {path}: `ls recipes/` shows those that come with pdbench") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not TOML: {error}") from None
    return []


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a UserError becomes one line on stderr and its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app.config = _recipe_settings(arguments)
        app(arguments, exit_on_error=False, print_error=False)
    except UserError as error:
        Console(stderr=True).print(f"[red]pdbench:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except cyclopts.CycloptsError as error:
        Console(stderr=True).print(
            f"[red]pdbench:[/red] {str(error).strip()} Try `pdbench --help`.", highlight=False, soft_wrap=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
