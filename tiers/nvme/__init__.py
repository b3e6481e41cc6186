"""The cold tier: a real Zarr v3 hierarchy on a local disk. Import `store`; this file loads nothing."""
