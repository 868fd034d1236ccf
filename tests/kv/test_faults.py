"""Every fault of a transfer, over real sockets: each receive ends, each kept block is freed, nothing wrong is written."""

import threading
import time

import pytest
import torch

from pdbench.kv.messages import Prefilled, PrefillEnd
from tests.support.kv_instances import (
    BLOCK,
    Instance,
    drop,
    fetch,
    free_port,
    instances,
    prefill,
    prompt,
    settled,
)

pytestmark = pytest.mark.usefixtures("kv_secret")


def test_unequal_tensor_parallel_sizes_are_refused(caplog):
    port = free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode", ranks=2)) as (p, d):
        asked = prompt(8)
        fetch(d, asked, [1, 2], port)
        d.until(lambda: d.failed)
        assert "tensor_parallel is 2 on the decode side and 1 on the prefill side" in caplog.text
        assert p.sent == []


def test_prefill_that_nobody_asks_for_is_freed():
    with instances(lambda: Instance("prefill", free_port(), timeout_s=0.3)) as p:
        asked = prompt(8)
        prefill(p, asked, [1, 2])
        p.until(lambda: p.sent == [asked.request_id])


def test_prefill_that_never_comes_fails_the_fetch():
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=0.5), lambda: Instance("decode", timeout_s=0.5)) as (
        p,
        d,
    ):
        asked = prompt(8)
        fetch(d, asked, [5, 6], port)
        d.until(lambda: d.received)
        assert d.failed == [asked.request_id]
        # Should it come after all, its blocks are not kept in vain.
        p.step()
        prefill(p, asked, [1, 2])
        p.until(lambda: p.sent == [asked.request_id])


def test_a_prefill_that_queues_longer_than_the_timeout_is_waited_for():
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=1.0), lambda: Instance("decode", timeout_s=1.0)) as (
        p,
        d,
    ):
        asked = prompt(8)
        fetch(d, asked, [5, 6], port)
        p.step(expected=[asked])
        until = time.monotonic() + 2.5
        while time.monotonic() < until:  # both engines go on with other requests
            p.step()
            d.step()
        assert not d.received
        p.step(prefilled=[Prefilled(request_id=asked.request_id, blocks=[1, 2], replace=True, computed_tokens=8)])
        p.step(ended=[PrefillEnd(request_id=asked.request_id, kept=True, error=None)])
        settled(p, d, asked)


def test_nobody_listens_fails_the_fetch(kv_pair):
    _, d = kv_pair
    asked = prompt(8)
    fetch(d, asked, [5, 6], free_port())
    d.until(lambda: d.failed == [asked.request_id])


def test_prefill_that_is_aborted_fails_the_fetch_at_once(kv_pair):
    p, d = kv_pair
    asked = prompt(30)
    fetch(d, asked, list(range(8)), p.port)
    prefill(p, asked, list(range(8)), [12], error="prefill ended as aborted")
    settled(p, d, asked, failed=True)


def test_prefill_that_loses_its_blocks_and_ends_all_the_same_fails_the_fetch(kv_pair):
    p, d = kv_pair
    asked = prompt(30)
    prefill(p, asked, list(range(8)), ended=False)
    p.step(preempted=[asked.request_id])
    fetch(d, asked, list(range(8)), p.port)
    p.step(ended=[PrefillEnd(request_id=asked.request_id, kept=True, error=None)])
    settled(p, d, asked, failed=True)


def test_prefill_aborted_before_it_was_scheduled_keeps_nothing(kv_pair):
    p, d = kv_pair
    asked = prompt(30)
    fetch(d, asked, list(range(8)), p.port)
    p.step(expected=[asked])
    p.step(ended=[PrefillEnd(request_id=asked.request_id, kept=False, error="prefill ended as aborted")])
    d.until(lambda: d.failed == [asked.request_id])
    assert p.sent == []


@pytest.mark.parametrize("when", ["before prefill", "amid prefill", "after prefill", "before it was asked"])
def test_decode_that_gives_up_frees_both_sides(kv_pair, when):
    p, d = kv_pair
    asked = prompt(30)
    if when == "before it was asked":
        prefill(p, asked, list(range(8)))
        drop(d, asked, p.port)
        p.until(lambda: p.sent == [asked.request_id])
        assert d.received == []
        return
    fetch(d, asked, list(range(8)), p.port)
    if when == "before prefill":
        drop(d, asked, p.port)
    prefill(p, asked, list(range(8)), [12], ended=False)
    if when == "amid prefill":
        drop(d, asked, p.port)
    p.step(ended=[PrefillEnd(request_id=asked.request_id, kept=True, error=None)])
    if when == "after prefill":
        drop(d, asked, p.port)
    settled(p, d, asked, failed=True)


def test_another_prompt_under_the_transfer_id_is_refused_and_the_right_one_still_served(kv_pair):
    p, d = kv_pair
    asked = prompt(8)
    prefill(p, asked, [1, 2])
    before = d.blocks([10, 11]).clone()
    for wrong in (
        prompt(8, transfer_id=asked.transfer_id, fingerprint="other"),
        prompt(12, transfer_id=asked.transfer_id),
    ):
        fetch(d, wrong, [10, 11, 12][: -(-wrong.tokens // BLOCK)], p.port)
        d.until(lambda wrong=wrong: wrong.request_id in d.failed)
    assert torch.equal(before, d.blocks([10, 11]))
    fetch(d, asked, [10, 11], p.port)
    settled(p, d, asked)


def test_a_transfer_id_serves_once(kv_pair):
    p, d = kv_pair
    first = prompt(8)
    prefill(p, first, [1, 2])
    fetch(d, first, [10, 11], p.port)
    settled(p, d, first)
    replay = prompt(8, transfer_id=first.transfer_id)
    fetch(d, replay, [12, 13], p.port)
    d.until(lambda: replay.request_id in d.failed)
    again = prompt(8, transfer_id=first.transfer_id)
    prefill(p, again, [3, 4])
    p.until(lambda: again.request_id in p.sent)


@pytest.mark.parametrize("order", ["asked before", "asked after", "never asked"])
def test_a_transfer_id_that_is_not_sent_yet_serves_its_first_prefill(order):
    """A proxy that sends a prefill twice: the second keeps nothing, and the first is not forgotten for it."""
    port = free_port()
    with instances(lambda: Instance("prefill", port, timeout_s=1.0), lambda: Instance("decode")) as (p, d):
        first = prompt(30)
        again = prompt(30, transfer_id=first.transfer_id)
        if order == "asked before":
            fetch(d, first, list(range(8)), port)
        prefill(p, first, list(range(8)), [12], ended=False)
        if order == "asked before":
            d.until(lambda: torch.equal(d.blocks([0]), p.blocks([0])))
        prefill(p, again, list(range(20, 28)))
        p.until(lambda: again.request_id in p.sent)
        p.step(
            prefilled=[
                Prefilled(request_id=first.request_id, blocks=list(range(3, 8)), replace=False, computed_tokens=30)
            ]
        )
        p.step(ended=[PrefillEnd(request_id=first.request_id, kept=True, error=None)])
        if order == "asked after":
            fetch(d, first, list(range(8)), port)
        p.until(lambda: first.request_id in p.sent)
        if order != "never asked":
            settled(p, d, first)
            assert torch.equal(p.blocks(list(range(8))), d.blocks(list(range(8))))


def test_two_requests_for_one_transfer_id(kv_pair):
    p, d = kv_pair
    first, second = prompt(8), prompt(8)
    second = prompt(8, transfer_id=first.transfer_id)
    fetch(d, first, [10, 11], p.port)
    fetch(d, second, [12, 13], p.port)
    d.until(lambda: d.failed == [second.request_id])
    prefill(p, first, [1, 2])
    settled(p, d, first)


def test_a_prefill_that_dies_fails_its_fetches_and_serves_again_when_it_returns(kv_pair):
    p, d = kv_pair
    good, waiting = prompt(8), prompt(8)
    prefill(p, good, [1, 2])
    fetch(d, good, [10, 11], p.port)
    settled(p, d, good)
    fetch(d, waiting, [12, 13], p.port)
    p.worker.close()
    d.until(lambda: d.failed == [waiting.request_id])
    with instances(lambda: Instance("prefill", p.port)) as returned:
        after = prompt(8)
        prefill(returned, after, [4, 5])
        fetch(d, after, [14, 15], p.port)
        settled(returned, d, after)
        assert torch.equal(returned.blocks([4, 5]), d.blocks([14, 15]))


def test_a_decode_that_dies_frees_what_it_asked_for(kv_pair):
    p, d = kv_pair
    asked, early = prompt(30), prompt(8)
    fetch(d, asked, list(range(8)), p.port)
    fetch(d, early, [10, 11], p.port)
    prefill(p, asked, list(range(8)), [12], ended=False)
    d.until(lambda: torch.equal(d.blocks([0]), p.blocks([0])))
    d.worker.close()
    p.step(ended=[PrefillEnd(request_id=asked.request_id, kept=True, error=None)])
    p.until(lambda: asked.request_id in p.sent)
    prefill(p, early, [20, 21])
    p.until(lambda: early.request_id in p.sent)


def test_no_thread_outlives_its_worker():
    """One that still ran a kernel when Python exits would abort the process."""
    before, port = set(threading.enumerate()), free_port()
    with instances(lambda: Instance("prefill", port), lambda: Instance("decode")) as (p, d):
        asked = prompt(30)
        fetch(d, asked, list(range(8)), p.port)
        prefill(p, asked, list(range(8)))
        settled(p, d, asked)
        names = {thread.name for thread in threading.enumerate()} - {thread.name for thread in before}
        assert {"kv-listen", "kv-peer", "kv-send", "kv-receive"} <= names
    assert not set(threading.enumerate()) - before
