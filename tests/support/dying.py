"""A server that dies in the middle of a measurement, at a point of its load and not of the clock."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pdbench.load.generator import Progress
from pdbench.serving import deployment as deployments
from pdbench.site import Site
from tests.support.processes import wait_until

SOON_S = 20.0
"""How long a load may go on after a death on a slow machine; the loads of these tests would take minutes."""


class Doomed:
    """One server of the deployment whose logs are in `folder`: a thread does `how` (its log, its supervisor's pid), once.

    `struck_s` and `ended_s` are the instants of that and of the ends of loads.
    """

    def __init__(self, folder: Path, server: str, how: Callable[[Path, int], None]) -> None:
        self.folder, self.server, self.how = folder, server, how
        self.struck_s: list[float] = []
        self.ended_s: list[float] = []
        self._thread: threading.Thread | None = None

    def strike(self, after_s: float = 0.0) -> None:
        """So long after its deployment has begun to start."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._strike, args=(after_s,), daemon=True)
            self._thread.start()

    def _strike(self, after_s: float) -> None:
        wait_until((self.folder / deployments.INFO_FILE).exists)
        time.sleep(after_s)
        info = deployments._load(self.folder)
        assert info is not None
        (pid,) = next(server.pids for server in info.servers if server.name == self.server)
        self.how(self.folder / f"{self.server}.log", pid)
        self.struck_s.append(time.monotonic())

    def site(self, *, warmup: bool = False, **options: object) -> Site:
        """Strikes when eight requests of a load have ended, or in its warm-up."""
        doomed = self

        class DoomedSite(Site):
            def run_load(self, load, on_progress, on_begin, problem):  # type: ignore[no-untyped-def]
                def progressed(progress: Progress) -> None:
                    if progress.done >= 8:
                        doomed.strike()
                    on_progress(progress)

                if warmup:
                    doomed.strike(0.3)
                try:
                    return super().run_load(load, progressed, on_begin, problem)
                finally:
                    doomed.ended_s.append(time.monotonic())

        return DoomedSite(**options)  # type: ignore[arg-type]

    def took_s(self) -> float:
        """From the death to the end of its load, or to now where it had none. Raises TimeoutError without a death."""
        wait_until(lambda: self.struck_s, what="the death")
        return (self.ended_s[0] if self.ended_s else time.monotonic()) - self.struck_s[0]
