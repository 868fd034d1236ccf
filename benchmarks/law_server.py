"""A scripted server whose capacity is known: prefill one request at a time, then decode in a limited number of slots.

Real sockets, times by a law: a prompt takes --prefill-ms on one of --prefill-instances in the order of arrival (M/D/c), and its further
tokens begin when a decode slot is free and come one every --itl-ms. Nothing is computed, so it is never the machine that limits.
Try: python benchmarks/law_server.py --prefill-ms 100 --itl-ms 5
"""

import argparse
import heapq

from token_server import Stream, TokenServer


class LawServer(TokenServer):
    """Waits of prefill and decode are those of two queues, computed as a request arrives."""

    def __init__(self, prefill_s: float, itl_s: float, instances: int, slots: int) -> None:
        super().__init__(prefill_s, itl_s)
        self.prefill_free_s, self.slot_free_s = [0.0] * instances, [0.0] * slots
        self.decode_s: dict[int, float] = {}

    def first_s(self, stream: Stream) -> float:
        begin_s = max(stream.arrival_s, self.prefill_free_s[0])
        heapq.heapreplace(self.prefill_free_s, begin_s + self.ttft_s)
        first_s = begin_s + self.ttft_s
        decode_s = max(first_s, self.slot_free_s[0])
        heapq.heapreplace(self.slot_free_s, decode_s + (stream.total - 1) * self.itl_s)
        self.decode_s[stream.sock.fileno()] = decode_s
        return first_s

    def next_s(self, stream: Stream, due_s: float) -> float:
        if stream.left == stream.total - 1:  # the first token was sent just now
            due_s = self.decode_s[stream.sock.fileno()]
        return due_s + self.itl_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefill-ms", type=float, default=100.0)
    parser.add_argument("--itl-ms", type=float, default=5.0)
    parser.add_argument("--prefill-instances", type=int, default=1)
    parser.add_argument("--slots", type=int, default=64)
    options = parser.parse_args()
    server = LawServer(options.prefill_ms / 1e3, options.itl_ms / 1e3, options.prefill_instances, options.slots)
    print(server.listener.getsockname()[1], flush=True)
    server.serve()


if __name__ == "__main__":
    main()
