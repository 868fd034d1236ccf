"""vLLM's own connectors over NIXL, with real vLLM on CPU (UCX over shared memory and TCP): where the package nixl is installed."""

import json
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from pdbench.config import Connector
from pdbench.serving.vllm import NIXL
from tests.conftest import serve_config, start

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(420)]


@pytest.mark.parametrize("connector", NIXL)
def test_answers_through_the_proxy_equal_those_of_prefill_alone(tmp_path: Path, connector: Connector) -> None:
    pytest.importorskip("nixl")
    with closing(start("disaggregated", serve_config(tmp_path, connector=connector))) as deployment:
        info = deployment.info()
        urls = {server.role: server.url for server in info.servers}

        def complete(url: str, prompt: list[int]) -> dict:
            body = {"model": info.model_name, "prompt": prompt, "max_tokens": 12, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            headers = {"content-type": "application/json", "x-request-id": "mine"}
            request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return dict(json.load(answer)["choices"][0])

        for tokens in (40, 100, 300):
            prompt = [10 + (7 * index + tokens) % 200 for index in range(tokens)]
            through = complete(urls["proxy"], prompt)
            assert through["token_ids"] == complete(urls["prefill"], prompt)["token_ids"]
        page = urllib.request.urlopen(urls["decode"] + "/metrics", timeout=10).read().decode()
        moved = [line for line in page.splitlines() if line.startswith("vllm:prompt_tokens_by_source_total")]
        assert [line for line in moved if 'source="external_kv_transfer"' in line and not line.endswith(" 0.0")], moved
