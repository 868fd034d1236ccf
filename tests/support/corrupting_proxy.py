"""pdbench's proxy, which on purpose gives decode the KV cache of another request's prompt; the first argument says when.

`after:N`: from the N-th request on; `above:N`: with more than N in flight; `decode:HOST`: at decode instances of that host name.
"""

import sys
from dataclasses import replace
from itertools import count

import msgspec

from pdbench import cli
from pdbench.proxy import kv_protocols
from pdbench.proxy.handler import RequestHandler

RULE, VALUE = sys.argv[1].split(":")
ATTEMPT = RequestHandler._attempt
NUMBERS = count(1)
PROMPTS: list[msgspec.Raw] = []
"""The last one; the load's prompts have one length in tokens."""


async def attempt(self, prefill, decode):
    number, prompt = next(NUMBERS), self.request.fields["prompt"]
    wrong = {
        "after": lambda: number > int(VALUE),
        "above": lambda: self.context.requests > int(VALUE),
        "decode": lambda: decode.address.host == VALUE,
    }[RULE]()
    if wrong and PROMPTS and b"-" in self.request.request_id:  # of the load, not of the gate
        self.request = replace(self.request, fields=self.request.fields | {"prompt": PROMPTS[0]})
    PROMPTS[:] = [prompt]
    return await ATTEMPT(self, prefill, decode)


def unverified(make):
    """The connector's parameters with its check of both prompts' fingerprints switched off."""
    return lambda *given: msgspec.json.encode(msgspec.json.decode(make(*given)) | {"verify_prompt": False})


if __name__ == "__main__":
    RequestHandler._attempt = attempt  # type: ignore[method-assign]
    tcp = kv_protocols.PROTOCOLS["tcp"]
    kv_protocols.PROTOCOLS["tcp"] = tcp._replace(
        prefill_params=unverified(tcp.prefill_params), decode_params=unverified(tcp.decode_params)
    )
    cli.main(["proxy", *sys.argv[2:]])
