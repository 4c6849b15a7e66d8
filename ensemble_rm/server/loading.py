"""A service's life inside an application's: loads beside it, ends when it has drained.

Knows tasks; knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from ensemble_rm.server.service import RewardService


@asynccontextmanager
async def loaded(
    service: RewardService, on_failure: Callable[[BaseException], None] | None
) -> AsyncIterator[None]:
    """Load the ensemble, beside what runs inside where failures have somewhere to go.

    Parameters
    ----------
    service : RewardService
    on_failure : callable, optional
        Called with the error of a load that fails; without it the load is waited for.
    """
    if on_failure is None:
        await service.load()
        yield
        await service.close()
        return

    async def load() -> None:
        try:
            await service.load()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server ends with it
            on_failure(error)

    task = asyncio.get_running_loop().create_task(load())
    yield
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await service.close()
