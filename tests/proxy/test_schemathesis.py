"""The proxy against its own OpenAPI description: schemathesis sends what the description allows and what it forbids."""

import json
import subprocess
import sys

from tests.support.proxy_processes import instance, proxy, wait_until


def test_the_proxy_does_what_its_description_says(tmp_path):
    with instance(tmp_path, "prefill", "--deaf") as prefill, instance(tmp_path, "decode", "--deaf") as decode:
        with proxy(tmp_path, prefill=[prefill], decode=[decode]) as server:
            description = server.ask("GET", "/openapi.json").json
            added = description["paths"]["/instances"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            # Instances that are added get health checks: none is to be looked for outside this host.
            added["properties"]["url"]["pattern"] = r"^http://127\.0\.0\.1:[1-9][0-9]{0,3}$"
            file = tmp_path / "openapi.json"
            file.write_text(json.dumps(description))
            command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", server.url, "--no-color"]
            options = ["--max-examples", "4", "--phases", "coverage,fuzzing", "--generation-deterministic"]
            done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
            assert server.complete().status == 200
            wait_until(lambda: server.in_flight() == 0, "nothing is in flight")
