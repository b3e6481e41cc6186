"""The cold tier: a real Zarr v3 hierarchy on a local disk. Import `store`; this file loads nothing."""

CRC_BYTES = 4
SEGMENT_BYTES = 32 << 20  # of a segment in a store that has room for many
