"""Every option, declared once with its range: frozen dataclasses <- TOML recipe <- command-line flags (cyclopts reads the docstrings).

A recipe's keys are the flags' names with underscores, in one section per class ([serve], [load], [power], [cluster], [proxy]) or
without sections. An option that is None is decided at start, by what the machine has.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from cyclopts import Parameter

from pdbench.config.groups import Connector, DeploymentKind, FirstToken, Policy
from pdbench.config.load import (
    TEMPLATE_TOKENS,
    LoadConfig,
    answer_timeout_s,
    dropped_fields,
    is_open_loop,
    most_output_tokens,
    slo_limits,
)
from pdbench.config.measuring import CLOCK_OPTIONS, LiveConfig, PairConfig, PowerConfig
from pdbench.config.proxy import ProxyConfig
from pdbench.config.serving import ClusterConfig, ServeConfig, ServerConfig


def flag_of(option: str) -> str:
    """As it is on the command line: output_tokens is --output-tokens."""
    return f"--{option.replace('_', '-')}"


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """All options of a measurement together."""

    serve: ServeConfig = field(default_factory=ServeConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    power: PowerConfig = field(default_factory=PowerConfig)

    def plain(self) -> dict[str, Any]:
        """Section -> option -> value for the saved record."""
        return asdict(self) | {"serve": self.serve.plain()}
