"""A P/D proxy in the shape of vLLM's disagg_prefill_proxy_server.py: Quart in front, aiohttp behind, prefill first.

Only benchmarks/proxy_cost.py runs it, in a virtual environment of its own: pip install quart aiohttp uvloop
"""

import sys
import uuid

import aiohttp
from quart import Quart, make_response, request

prefill_url, decode_url, port = sys.argv[1:]
app = Quart(__name__)


async def events(url, body, headers):
    """The answer's bytes, as they come."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        async with session.post(url, json=body, headers=headers) as reply:
            async for piece in reply.content.iter_chunked(1024):
                yield piece


@app.post("/v1/completions")
async def completions():
    """Prefill with one token, then decode."""
    body = await request.get_json()
    headers = {"X-Request-Id": f"___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2_{uuid.uuid4().hex}"}
    async for _ in events(f"{prefill_url}/v1/completions", {**body, "max_tokens": 1, "stream": False}, headers):
        pass
    answer = await make_response(events(f"{decode_url}/v1/completions", body, headers))
    answer.timeout = None
    answer.headers["content-type"] = "text/event-stream"
    return answer


if __name__ == "__main__":
    app.run(port=int(port))
