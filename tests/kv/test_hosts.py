"""Prefill on one host and decode on another: two network namespaces with an address each, joined by a virtual cable."""

import os
import subprocess
import sys
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest

from pdbench.kv.compat import SECRET_VARIABLE
from tests.support.kv import SECRET

ADDRESSES = {"prefill": "10.211.55.1", "decode": "10.211.55.2"}
PORT = 24579  # beside those that Ray gives its workers, 10002 to 19999, and those of clients, from 32768

BEGIN = """
import sys, torch
from tests.support.kv import Instance, fetch, new_transfer, prefill
side = sys.argv[1]
torch.manual_seed(7 if side == "prefill" else 8)
instance = Instance(side, {port}, host="{prefill}" if side == "prefill" else "{decode}", timeout_s=4.0)

def report(word):
    print(word, flush=True)
    sys.stdin.readline()

def hand_over(name, tokens, failed=False):
    count, transfer = tokens // 4, new_transfer(tokens, name)
    if side == "prefill":
        prefill(instance, transfer, list(range(count)), [tokens // 2, tokens])
        instance.until(lambda: name in instance.sent)
        return instance.blocks(list(range(count)))
    fetch(instance, transfer, list(range(30, 30 + count)), {port}, host="{prefill}")
    instance.until(lambda: name in instance.received)
    assert (name in instance.failed) == failed
    return instance.blocks(list(range(30, 30 + count)))

report("up")
""".format(port=PORT, **ADDRESSES)

SCRIPT = (
    BEGIN
    + """
blocks = hand_over("first", 100)
report(f"{blocks.double().sum().item()} {blocks.view(torch.int32).sum().item()}")
sender, receiver = instance.worker._sender, instance.worker._receiver
assert sender._peers if sender else receiver._instances
if side == "decode":
    hand_over("lost", 8, failed=True)
instance.until(lambda: not (sender._peers if sender else receiver._instances))
report("alone")
hand_over("second", 8)
report("handed over")
instance.worker.close()
"""
)


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
            pytest.skip("this machine does not allow network namespaces")
        for role, name in names.items():
            run("ip", "link", "set", links[role], "netns", name)
            run("ip", "-n", name, "addr", "add", f"{ADDRESSES[role]}/24", "dev", links[role])
            run("ip", "-n", name, "link", "set", links[role], "up")
        yield names
    finally:
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def sides(hosts):
    """Role -> process that runs SCRIPT on its host; all have imported everything, and prefill listens."""
    root = Path(__file__).parents[2]
    environment = os.environ | {SECRET_VARIABLE: SECRET, "PYTHONPATH": str(root)}
    running = {}
    try:
        for role, name in hosts.items():
            command = ["ip", "netns", "exec", name, sys.executable, "-c", SCRIPT, role]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            running[role] = subprocess.Popen(command, env=environment, **pipes)
        all_report(running, "up")
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def all_report(running, word):
    for process in running.values():
        assert process.stdout.readline() == f"{word}\n"


def go_on(running):
    for process in running.values():
        process.stdin.write("go\n")
        process.stdin.flush()


def test_kv_crosses_hosts_and_a_host_that_vanishes_silently_is_noticed_and_comes_back(hosts):
    cable = ["ip", "-n", hosts["decode"], "link", "set", hosts["decode"].replace("kv-", "v")]
    with sides(hosts) as running:
        go_on(running)
        sums = {role: process.stdout.readline() for role, process in running.items()}
        assert sums["prefill"] == sums["decode"] != ""
        run(*cable, "down")
        go_on(running)
        all_report(running, "alone")
        run(*cable, "up")
        go_on(running)
        all_report(running, "handed over")
        go_on(running)
        assert [process.wait(60) for process in running.values()] == [0, 0]
