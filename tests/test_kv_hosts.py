"""Prefill on one host and decode on another: two network namespaces with an address each, joined by a virtual cable."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pdbench.kv.messages import SECRET_VARIABLE

ADDRESSES = {"prefill": "10.211.55.1", "decode": "10.211.55.2"}
PORT = 14579

SIDE = """
import sys, torch
from kv_instances import Instance, fetch, prefill, prompt
side = sys.argv[1]
asked = prompt(100, name="request")
torch.manual_seed(7 if side == "prefill" else 8)
instance = Instance(side, {port}, host="{prefill}" if side == "prefill" else "{decode}", timeout_s=20.0)
print("up", flush=True)
sys.stdin.readline()
if side == "prefill":
    prefill(instance, asked, list(range(25)), [50, 100])
    instance.until(lambda: instance.sent)
    found = instance.blocks(list(range(25)))
else:
    fetch(instance, asked, list(range(30, 55)), {port}, host="{prefill}")
    instance.until(lambda: instance.received)
    assert not instance.failed
    found = instance.blocks(list(range(30, 55)))
print(found.double().sum().item(), found.view(torch.int32).sum().item())
instance.worker.close()
""".format(port=PORT, **ADDRESSES)


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts():
    """Role -> namespace name."""
    names = {role: f"kv-{role[0]}-{uuid.uuid4().hex[:6]}" for role in ADDRESSES}
    links = {role: name.replace("kv-", "v") for role, name in names.items()}
    try:
        try:
            for name in names.values():
                run("ip", "netns", "add", name)
            run("ip", "link", "add", links["prefill"], "type", "veth", "peer", "name", links["decode"])
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("this machine lets us make no network namespaces")
        for role, name in names.items():
            run("ip", "link", "set", links[role], "netns", name)
            run("ip", "-n", name, "addr", "add", f"{ADDRESSES[role]}/24", "dev", links[role])
            run("ip", "-n", name, "link", "set", links[role], "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_kv_crosses_hosts_by_kv_ip_and_kv_port(hosts):
    environment = os.environ | {SECRET_VARIABLE: "a secret of the tests"}
    root = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    sides = {}
    for role, name in hosts.items():
        command = ["ip", "netns", "exec", name, sys.executable, "-c", SIDE, role]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        sides[role] = subprocess.Popen(command, env=environment, **pipes)
    try:
        for process in sides.values():  # both have imported everything, and prefill listens
            assert process.stdout.readline() == "up\n"
        for process in sides.values():
            process.stdin.write("go\n")
            process.stdin.flush()
        sums = {role: process.communicate(timeout=60)[0] for role, process in sides.items()}
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    assert all(process.returncode == 0 for process in sides.values())
    assert sums["prefill"] == sums["decode"] != ""
