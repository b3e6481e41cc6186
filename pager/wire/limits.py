"""Numbers of the protocol that both sides know: versions, features, limits, and what the bytes in replies mean.

docs/protocol.md says the same for people.
"""

from __future__ import annotations

VERSION = 2  # spoken by this side; see docs/protocol.md for what each version brought
OLDEST_VERSION = 1
SLAB, BYTES = "slab", "bytes"  # features: blocks through shared memory; blocks over the socket
HINTS = "hints"  # feature: HINT, and `released` in DROP_SESSION
MARKS = "marks"  # feature: the hints `pin` and `demote`
USAGE = "usage"  # feature: USED, and `counts` in LOOKUP
IPC = "ipc"  # feature: the daemon copies into the client's pages and out of them; for clients with the slab, asked for
FEATURES = (SLAB, BYTES, HINTS, USAGE, MARKS)  # what a client asks for unless it is told otherwise
ALL_FEATURES = (*FEATURES, IPC)
RELEASE, PREFETCH, DEMOTE, PIN = "release", "prefetch", "demote", "pin"  # hints
KEY_BYTES = 32
MAX_KEYS = 1 << 16  # in one request
MAX_READ_BYTES = 1 << 20  # of blocks in one reply to READ, or one block
MAX_COPY_BYTES = 32 << 20  # of blocks in one COPY, or one block
MAX_COPIES = 8  # COPY requests of one client under way
MAX_HANDLE_BYTES = 256  # of a pool
REPLY = 0x80  # a reply has its request's number and this bit
ERROR = 0xFF
STORED, IS_HELD = 3, 4  # masks of the bytes in replies: result or place; held for this client
ABSENT, IN_MEMORY, ON_DISK = 0, 1, 2  # places, in Found
REFUSED, TAKEN, HELD_ALREADY = 0, 1, 2  # results, in Committed
NOT_THERE, HOLDS, OVER_LIMIT = 0, 1, 2  # flags, in Held
