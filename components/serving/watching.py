"""A job's events as long as its client waits and there is time."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from starlette.types import Receive

from components.serving.messages import Event, Refused

RUNNING: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly
Item = Event | Exception | None  # None: the events are over


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def watched(
    events: AsyncIterator[Event], *, receive: Receive, started: float, seconds: float
) -> AsyncGenerator[Event]:
    """The events of a job, which is canceled when this generator ends, however it ends.

    Args:
        receive: of a request whose body was read; tells that the client went away.
        started: when the request came, by time.monotonic().
        seconds: that the job may take from then on; after them the last event is Refused("late").

    Raises ClientGoneError, and what reading the events raises.
    """
    items: asyncio.Queue[Item] = asyncio.Queue()
    tasks = [kept(read_into(events, items)), kept(wait_for_leaving(receive, items))]
    deadline = asyncio.get_running_loop().time() + seconds - (time.monotonic() - started)
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await items.get()
            except TimeoutError:
                yield Refused("late", f"the image was not ready within {seconds:g} s: ask for fewer images or steps")
                return
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        for task in tasks:  # the first closes the events in its own time: whoever cancels this can't interrupt it
            task.cancel()


def kept(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that runs to its end."""
    task = asyncio.create_task(work)
    RUNNING.add(task)
    task.add_done_callback(RUNNING.discard)
    return task


async def read_into(events: AsyncIterator[Event], items: asyncio.Queue[Item]) -> None:
    try:
        async for event in events:
            items.put_nowait(event)
        items.put_nowait(None)
    except Exception as error:  # goes on where the events are read
        items.put_nowait(error)
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()


async def wait_for_leaving(receive: Receive, items: asyncio.Queue[Item]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    items.put_nowait(ClientGoneError())
