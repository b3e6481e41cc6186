"""Eviction policies, one short file each; `registry` makes them by name, `base` says what they promise."""
