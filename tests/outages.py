"""A gate before a server that closes for a while: it refuses connections, leaves them hanging, or says 503.

An outage begins when it is asked for, or with the first request that fits a pattern; it lasts so many seconds, or until
the gate is opened.
"""

import asyncio
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from tests.conftest import free_port

How = Literal["refuses", "hangs", "says 503"]
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Gate:
    def __init__(self, target: str, partner: "Gate | None" = None) -> None:
        self.target, self.port, self.partner = int(target.rpartition(":")[2]), free_port(), partner
        self.planned: list[tuple[re.Pattern[bytes], How, float]] = []
        self.closings: list[tuple[How, bytes, float]] = []  # of each outage: how, the request, seconds
        self.how: How | None = None
        self.loop = asyncio.new_event_loop()
        self.server: asyncio.Server | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.over = asyncio.Event()  # set to end an outage before its time
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close_for(self, seconds: float, how: How) -> None:
        """Begin an outage and return as soon as it has begun."""
        asyncio.run_coroutine_threadsafe(self._close(seconds, how, b""), self.loop).result(10)

    def close_at(self, pattern: bytes, seconds: float, how: How) -> None:
        """Begin an outage with a request whose first line fits; the request gets no answer."""
        self.planned.append((re.compile(pattern), how, seconds))

    def reopen(self) -> None:
        """End an outage and return as soon as the server is reached again."""
        self.loop.call_soon_threadsafe(self.over.set)
        asyncio.run_coroutine_threadsafe(self.open.wait(), self.loop).result(10)

    async def end(self) -> None:
        """Cut all connections."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self.server.close()

    async def _listen(self) -> None:
        self.server = await asyncio.start_server(self._handle, "127.0.0.1", self.port)

    async def _close(self, seconds: float, how: How, request: bytes) -> None:
        if self.partner is not None:
            asyncio.run_coroutine_threadsafe(self.partner._close(seconds, how, request), self.partner.loop)
        self.how, began = how, time.monotonic()
        self.open.clear()
        self.over.clear()
        if how == "refuses":
            self.server.close()
        if how != "hangs":
            for writer in self.writers:
                writer.transport.abort()

        async def end() -> None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), seconds)
            if how == "refuses":
                await self._listen()
            self.how = None
            self.open.set()
            self.closings.append((how, request, time.monotonic() - began))

        self.ending = asyncio.ensure_future(end())

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            if self.how == "says 503":
                await reader.readuntil(b"\r\n\r\n")
                writer.write(BUSY)
                await writer.drain()
            else:
                back, forth = await asyncio.open_connection("127.0.0.1", self.target)
                self.writers.add(forth)
                await asyncio.gather(self._pump(reader, forth, watched=True), self._pump(back, writer, watched=False))
        writer.close()
        self.writers.discard(writer)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, watched: bool) -> None:
        with suppress(OSError):
            while data := await source.read(2**16):
                line = data.partition(b"\r\n")[0]
                for plan in [plan for plan in self.planned if watched and self.how is None and plan[0].search(line)]:
                    self.planned.remove(plan)
                    await self._close(plan[2], plan[1], line)
                    break
                if self.how == "hangs":
                    await self.open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
        self.writers.discard(sink)


@contextmanager
def gate(target: str, *, partner: Gate | None = None) -> Iterator[Gate]:
    """A gate before the server at an address; it is open at first, and closes another with it."""
    made = Gate(target, partner)
    thread = threading.Thread(target=made.loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(made._listen(), made.loop).result(10)
    try:
        yield made
    finally:
        asyncio.run_coroutine_threadsafe(made.end(), made.loop).result(10)
        made.loop.call_soon_threadsafe(made.loop.stop)
        thread.join(10)
