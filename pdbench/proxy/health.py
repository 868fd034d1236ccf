"""Watching the instances: out after failures in a row, in again after one passed check, gone when drained.

One worker watches for all. Try: curl http://127.0.0.1:8000/instances
"""

import asyncio

from pdbench.config import ProxyConfig
from pdbench.proxy import wire
from pdbench.proxy.instances import LEAVING, Instance, InstanceTable
from pdbench.proxy.upstream import Leg, Pool

CHECK_LIMIT_S = 5.0
_FIRST_INTERVAL_S = 0.25


async def watch(config: ProxyConfig, table: InstanceTable, pool: Pool) -> None:
    """Check every instance again and again, one that is out more often, and remove those that have left."""
    checks: dict[Instance, asyncio.Task[None]] = {}
    while True:
        for instance in table.all():
            if table.wanted(instance) == LEAVING and table.load(instance)[0] == 0:
                table.remove(instance)
            elif instance not in checks or checks[instance].done():
                checks[instance] = asyncio.create_task(_check(config, table, pool, instance))
        known = set(table.all())
        for gone in [instance for instance in checks if instance not in known]:
            checks.pop(gone).cancel()
        await asyncio.sleep(min(_FIRST_INTERVAL_S, config.health_interval_s))


async def _check(config: ProxyConfig, table: InstanceTable, pool: Pool, instance: Instance) -> None:
    """One check, and the wait before the next. Servers without a /health answer 404, and that is alive too."""
    leg = Leg(pool, instance, "health", tokens=None, limit_s=CHECK_LIMIT_S)
    leg.start(wire.request(b"GET", b"/health", instance.address.netloc.encode(), [], b"", b"health", None))
    try:
        await asyncio.shield(leg.finished)  # one that is cancelled here would be ended, and never close its connection
    finally:
        leg.abort("the check was given up")
    if leg.error is None and leg.status is not None:
        if leg.status < 500:
            table.passed(instance)
        else:
            table.failed(instance, config.unhealthy_after)
    wait_s = config.health_interval_s if table.healthy(instance) else _FIRST_INTERVAL_S
    await asyncio.sleep(min(wait_s, config.health_interval_s))
