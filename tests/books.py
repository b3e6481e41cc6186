"""The books of every pager agree, whichever test opens it: after each test while it is open, and when it was closed.

`watched` and `agree` are imported by the conftest of each folder that wants them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import pytest

from kvtier.pager.pager import Pager
from kvtier.tiers.errors import InvariantError

_OPEN: weakref.WeakSet[Pager] = weakref.WeakSet()


def check(pager: Pager) -> None:
    """Every reference, page, slot and pin has a holder. A closed pager has nothing in flight that could hold a pin."""
    pager.check_integrity()
    if pager._is_closed:
        pinned = [int(group.pages.pins.sum()) for group in pager._core.groups]
        if any(pinned):
            raise InvariantError(f"pins of pages are left over, by layer group: {pinned}")


def check_open() -> None:
    for pager in list(_OPEN):
        check(pager)


@pytest.fixture(scope="session", autouse=True)
def watched() -> Iterator[None]:
    """From before the first pager of any fixture until after the last one."""
    begin, end = Pager.__init__, Pager.close

    def opened(self: Pager, *arguments, **options) -> None:
        begin(self, *arguments, **options)
        _OPEN.add(self)

    def closed(self: Pager, *arguments, **options) -> None:
        end(self, *arguments, **options)
        if self in _OPEN:
            _OPEN.discard(self)
            check(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pager, "__init__", opened)
        patched.setattr(Pager, "close", closed)
        yield


@pytest.fixture(autouse=True)
def agree(watched: None) -> Iterator[None]:
    yield
    check_open()
