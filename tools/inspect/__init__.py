"""`pager-inspect`: looks at a running pager or at a store at rest, and changes nothing."""

from .cli import main

__all__ = ["main"]
