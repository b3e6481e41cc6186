"""The asyncio twins of a prefix cache: the same calls, in threads. Cancelling one does not stop what its thread does."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self


class AsyncTwins:
    """`aload` is `load`, and so on, with the same arguments, results and errors."""

    async def aload(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        return await self._in_thread("load", *args, **kwargs)

    async def aload_chunks(self, *args: Any, **kwargs: Any) -> tuple[int, Any]:
        return await self._in_thread("load_chunks", *args, **kwargs)

    async def astore(self, *args: Any, **kwargs: Any) -> int:
        return await self._in_thread("store", *args, **kwargs)

    async def awarm(self, *args: Any, **kwargs: Any) -> Any:
        return await self._in_thread("warm", *args, **kwargs)

    async def amatch(self, *args: Any, **kwargs: Any) -> int:
        return await self._in_thread("match", *args, **kwargs)

    async def apin(self, *args: Any, **kwargs: Any) -> int:
        return await self._in_thread("pin", *args, **kwargs)

    async def arelease(self, *args: Any, **kwargs: Any) -> int:
        return await self._in_thread("release", *args, **kwargs)

    async def aprefetch(self, *args: Any, **kwargs: Any) -> int:
        return await self._in_thread("prefetch", *args, **kwargs)

    async def aflush(self, *args: Any, **kwargs: Any) -> None:
        await self._in_thread("flush", *args, **kwargs)

    async def aclose(self) -> None:
        await self._in_thread("close")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _in_thread(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return await asyncio.to_thread(getattr(self, name), *args, **kwargs)
