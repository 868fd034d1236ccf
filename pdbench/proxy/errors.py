"""How a request can fail on its way: refused by the proxy itself, or failed at a stage of an instance."""


class RefusedError(Exception):
    """The proxy's own answer to a request that it does not forward: an HTTP status, one line, and the stage."""

    def __init__(self, status: int, message: str, *, stage: str = "request", retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.stage = stage
        self.retry_after_s = retry_after_s


class StageError(Exception):
    """A stage (prefill or decode) failed at an instance before a byte was passed on; another instance may be tried."""

    def __init__(self, stage: str, slot: int | None, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.stage = stage
        self.slot = slot
        self.message = message
        self.status = 504 if timed_out else 502
