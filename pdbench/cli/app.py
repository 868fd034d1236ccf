"""The command line: what every command shares."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Group, Parameter
from rich.console import Console

from pdbench import __version__, recipe
from pdbench.config import Options

console = Console()
_HELP = "Does prefill/decode disaggregation pay, in milliseconds and in joules?"
app = App(name="pdbench", help=_HELP, version=__version__, suppress_keyboard_interrupt=False)
_RECIPE_HELP = "A TOML file that sets options; a flag overrides what it sets."
Recipe = Annotated[Path | None, Parameter(help=_RECIPE_HELP, validator=recipe.check)]
DEFAULTS = Options()
MEASURING = Group("Measurement and output", sort_key=0)
