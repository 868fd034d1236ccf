"""How a request can fail on its way: refused by the proxy itself, or failed at a stage of an instance."""

from pdbench.proxy.wire import Headers


class RefusedError(Exception):
    """The proxy's own answer to a request that it does not forward: an HTTP status, one line, and the stage; for a 405
    the methods `allowed`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        stage: str = "request",
        retry_after_s: int | None = None,
        allowed: tuple[bytes, ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.stage = stage
        self.retry_after_s = retry_after_s
        self.allowed = allowed

    @property
    def headers(self) -> Headers:
        """The headers that tell a client when, or how, to ask again."""
        retry = [] if self.retry_after_s is None else [(b"retry-after", b"%d" % self.retry_after_s)]
        return [*retry, (b"allow", b", ".join(self.allowed))] if self.allowed else retry


def method_refused(allowed: tuple[bytes, ...]) -> RefusedError:
    """The answer to a method that a path does not have."""
    return RefusedError(405, f"ask with {b' or '.join(allowed).decode()}", allowed=allowed)


class StageError(Exception):
    """A stage (prefill or decode) failed at an instance before a byte was passed on; another instance may be tried."""

    def __init__(self, stage: str, slot: int | None, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.stage = stage
        self.slot = slot
        self.message = message
        self.status = 504 if timed_out else 502
