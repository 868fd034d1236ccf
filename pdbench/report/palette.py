"""Colours and names that every picture shares. Okabe and Ito's palette: told apart by colour-blind readers, and in print.

Try: python -c "from pdbench.report.palette import colour; print(colour('prefill'), colour('decode'))"
"""

from collections.abc import Sequence

INK, MUTED, FAINT, PAPER = "#1f2933", "#5f6b7a", "#dfe3e8", "#ffffff"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#F0E442",
)
BAD, GOOD = "#B3261E", "#00704F"

_ROLES = {
    "prefill": VERMILLION,
    "decode": BLUE,
    "single": GREEN,
    "replica": PURPLE,
    "replicas": PURPLE,
    "tensor-parallel": ORANGE,
    "disaggregated": BLUE,
    "client": "#9aa5b1",
    "queue": YELLOW,
    "kv_transfer": GREEN,
    "other": FAINT,
    "proxy": "#7b8794",
    "bench": SKY,
}
_SPARE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)


def colour(name: str, place: int = 0) -> str:
    """The colour of a role, phase or deployment; a name of its own takes the spare colour at `place`."""
    return _ROLES.get(name, _SPARE[place % len(_SPARE)])


def colours(names: Sequence[str]) -> list[str]:
    """A colour each for things drawn side by side, no two the same as long as the palette lasts."""
    taken: list[str] = []
    for name in names:
        own = _ROLES.get(name)
        free = [spare for spare in _SPARE if spare not in taken]
        taken.append(own if own and own not in taken else (free or _SPARE)[0])
    return taken
