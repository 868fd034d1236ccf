"""A host's command lines as other hosts reach it, and a measurement over several hosts of which one is lost."""

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from pdbench.config import PowerConfig, ServeConfig
from pdbench.errors import UserError
from pdbench.events import Event, ProxyEvent
from pdbench.host import Batch, HostLostError, LocalHost
from pdbench.records import Clock, DeviceRecord, DeviceSample
from pdbench.serving import plan
from pdbench.serving.deployment import ServerInfo
from pdbench.serving.vllm import Command, Setup
from pdbench.site import Measurement
from tests.support.scripted_vllm import Scripted

SETUP = Setup(None, "m", "m")


def command(config: ServeConfig, address: str | None) -> Command:
    (planned,) = Scripted(address=address).plan(plan.servers("single", config), config, SETUP)
    return planned


@pytest.mark.parametrize(
    ("listen", "address", "url"),
    [
        ("127.0.0.1", None, "http://127.0.0.1:8000"),
        ("0.0.0.0", None, "http://0.0.0.0:8000"),
        ("127.0.0.1", "10.0.0.1", "http://10.0.0.1:8000"),
        ("0.0.0.0", "10.0.0.1", "http://10.0.0.1:8000"),
        ("10.9.0.1", "10.0.0.1", "http://10.9.0.1:8000"),
        ("::1", None, "http://[::1]:8000"),
        ("127.0.0.1", "fd00::2", "http://[fd00::2]:8000"),
        ("::", "10.0.0.1", "http://10.0.0.1:8000"),
        ("0.0.0.0", "fd00::2", "http://[fd00::2]:8000"),
    ],
)
def test_server_is_reachable_for_other_hosts(listen: str, address: str | None, url: str) -> None:
    planned = command(ServeConfig(host=listen), address)
    assert planned.url == url
    if address and listen == "0.0.0.0":
        assert "0.0.0.0" in planned.argv  # it listens on all addresses


class KvHost(Scripted):
    """Its servers say which address KV goes over."""

    def command(self, spec, config, gpus, setup):  # type: ignore[no-untyped-def]
        return dataclasses.replace(super().command(spec, config, gpus, setup), kv_address=config.kv_ip)


@pytest.mark.parametrize(
    ("kv_ip", "address", "used"),
    [
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("10.9.0.1", "10.0.0.1", "10.9.0.1"),
        ("127.0.0.0/8", "10.0.0.1", "127.0.0.1"),
    ],
)
def test_kv_goes_over_this_hosts_own_address(kv_ip: str, address: str | None, used: str) -> None:
    config = ServeConfig(kv_ip=kv_ip)
    planned = KvHost(address=address).plan(plan.servers("single", config), config, SETUP)
    assert planned[0].kv_address == used


def test_what_is_no_network_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match=r"--kv-ip 10\.1\.0\.0/99 is no network: write it as"):
        command(ServeConfig(kv_ip="10.1.0.0/99"), None)


def test_network_in_which_this_host_has_no_address_is_refused() -> None:
    with pytest.raises(UserError, match=r"--kv-ip 203\.0\.113\.0/24: this host has no address in that network"):
        command(ServeConfig(kv_ip="203.0.113.0/24"), "10.0.0.1")


class Node(LocalHost):
    """A host whose clock is `ahead_s` ahead; what it read is given."""

    def __init__(self, address: str, ahead_s: float, lost: bool = False) -> None:
        super().__init__(address=address)
        self.ahead_s, self.lost = ahead_s, lost
        self.read = [
            Batch([DeviceRecord(id="gpu0", kind="gpu", name="g", samples=[DeviceSample(t_s=ahead_s + 1.0)])]),
            Batch([], [ProxyEvent(request_id=address, received_s=ahead_s + 2.0)]),
        ]

    def start_measuring(self, servers: Sequence[ServerInfo], interval_s: float | None) -> None:
        pass

    def stop_measuring(self) -> None:
        if self.lost:
            raise HostLostError("gone")

    def take(self) -> list[Batch]:
        return self.read

    def to_run_clock(self, clock: Clock) -> Callable[[float], float]:
        return lambda host_s: clock.of_monotonic(host_s - self.ahead_s)


def test_measurement_merges_hosts_on_the_runs_clock_and_keeps_what_a_lost_one_read() -> None:
    hosts = [(Node("10.0.0.1", 1000.0), []), (Node("10.0.0.2", 2000.0, lost=True), [])]
    measurement = Measurement(hosts, PowerConfig(), Clock(monotonic_s=0.5, unix_s=0.0))
    with measurement:
        measurement.idle("engine_ready", 0.0)
    devices = [(device.host, device.id, device.samples[0].t_s) for device in measurement.devices()]
    assert devices == [("10.0.0.1", "gpu0", 0.5), ("10.0.0.2", "gpu0", 0.5)]
    events: list[Event] = measurement.events()
    assert [event.received_s for event in events if isinstance(event, ProxyEvent)] == [1.5, 1.5]
