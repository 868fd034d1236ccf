"""Before a trial: wait until the GPUs are as cool as they were before the first one, so that no order favours a deployment.

Try: python -c "from pdbench.power.cooldown import Cooldown; print(Cooldown(60.0).wait([0]))"
"""

import time
from collections.abc import Callable, Sequence

from pdbench.power.devices import open_gpu
from pdbench.power.reader import Reader

WITHIN_C = 2.0
"""A GPU counts as cool again this close to its first temperature: NVML's readings are whole degrees."""


class Cooldown:
    """Remembers each GPU's temperature before its first trial and waits for it, `at_most_s` seconds a trial."""

    def __init__(
        self,
        at_most_s: float,
        open_one: Callable[[int, str | None], Reader] = open_gpu,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._at_most_s, self._open, self._sleep = at_most_s, open_one, sleep
        self._first_c: dict[int, float] = {}

    def wait(self, gpus: Sequence[int]) -> dict[str, float]:
        """GPU -> degrees Celsius at the start of the trial that now begins; a GPU without a thermometer is left out."""
        readers = {index: self._open(index, None) for index in gpus}
        try:
            waited_s = 0.0
            while True:
                now_c = {index: c for index, reader in readers.items() if (c := _celsius(reader)) is not None}
                for index, celsius in now_c.items():
                    self._first_c.setdefault(index, celsius)
                hot = [index for index, celsius in now_c.items() if celsius > self._first_c[index] + WITHIN_C]
                if not hot or waited_s >= self._at_most_s:
                    return {f"gpu{index}": celsius for index, celsius in now_c.items()}
                self._sleep(1.0)
                waited_s += 1.0
        finally:
            for reader in readers.values():
                reader.close()


def _celsius(reader: Reader) -> float | None:
    value = reader.read(time.monotonic()).get("temperature_c")
    return None if value is None else float(value)
