"""What each verb takes: its arguments, one function per verb. Nothing is asked or drawn here."""

from __future__ import annotations

import argparse


def nothing(sub: argparse.ArgumentParser) -> None:
    pass


def status(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("target", nargs="?", metavar="PATH|SOCKET", help="as -s")
    sub.add_argument("--exit-code", action="store_true", help="1 unless the verdict is ok")
    sub.add_argument("--offline", action="store_true", help="what the pager last published; for one that is stuck")


def _pages(sub: argparse.ArgumentParser, limit: int = 50) -> None:
    sub.add_argument("--limit", type=int, default=limit, metavar="N", help=f"rows (default {limit}, at most 1000)")
    sub.add_argument("--offset", type=int, metavar="N", help="skip so many")


def sessions(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--sort", choices=("device", "host", "nvme", "tokens", "idle", "name"), help="default device")
    sub.add_argument("--namespace", metavar="NAME", help="only this one's")
    _pages(sub)


def session(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("session", metavar="ID", help="as `sessions` lists it (seq:N for sequences without a session)")


def blocks(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tier", choices=("device", "host", "nvme"), help="whose fastest copy is there")
    sub.add_argument("--state", choices=("clean", "dirty", "pinned", "moving", "unreferenced"))
    sub.add_argument("--group", type=int, metavar="N", help="one layer group")
    sub.add_argument("--key", metavar="DIGITS", help="the first eight hexadecimal digits")
    sub.add_argument("--sort", choices=("idle", "refs", "depth", "tokens", "block"), help="default idle, longest first")
    sub.add_argument("--reverse", action="store_true", default=None)
    _pages(sub)


def prefix(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "prompt", metavar="FILE|TOKENS", help="a file of token ids (text, JSON list, .npy), - for stdin, or 1,2,3"
    )
    sub.add_argument("--namespace", default="default", metavar="NAME")


def explain(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("about", metavar="BLOCK|SESSION", help="eight digits of a key, or a session")
    sub.add_argument("--limit", type=int, default=50, metavar="N")


def trace(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")
    sub.add_argument(
        "--types", metavar="KIND,..", help="evicted, dropped, promoted, demoted, read, written, pinned, ..."
    )
    sub.add_argument("--interval", type=float, default=0.5, metavar="SEC")
    sub.add_argument("--limit", type=int, default=20, metavar="N", help="how many to begin with")


def thrash(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--since", dest="since_s", type=_seconds, metavar="AGE", help="e.g. 90s, 10m (default), 1h")


def why(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("request", nargs="?", metavar="REQUEST", help="its x-request-id, or req-N")
    sub.add_argument("--last", action="store_true", help="the last one (default)")
    sub.add_argument("--slowest", type=int, metavar="N")


def stat(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("interval", nargs="?", type=float, default=1.0, metavar="SEC")
    sub.add_argument("count", nargs="?", type=int, metavar="COUNT")
    sub.add_argument("-f", "--field", metavar="NAME,..", help="only these columns")
    sub.add_argument("--fields", action="store_true", help="list the columns, their JSON names and what they mean")
    sub.add_argument("-l", "--latency", action="store_true", help="also the mean time of a move, by direction")
    sub.add_argument(
        "-q", "--queues", action="store_true", help="also what is under way and how old it is, by direction"
    )
    sub.add_argument("-H", "--no-heads", action="store_true", help="no line of heads, for programs")


def top(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--once", action="store_true", help="print one screen and end")
    sub.add_argument("--offline", action="store_true", help="never ask the pager, only read what it publishes")
    sub.add_argument("--sort", choices=("device", "host", "nvme", "tokens", "idle", "name"), default="device")
    sub.add_argument("--filter", default="", metavar="TEXT", help="sessions and namespaces that contain it")
    sub.add_argument("--interval", type=float, default=1.0, metavar="SEC")


def advise(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--tier", choices=("device", "host", "nvme"), help="which one to size (default host)")
    sub.add_argument("--factor", type=float, metavar="X", help="also this size (default 2)")


def history(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--hours", type=float, default=24.0, metavar="H", help="how far back (default 24)")


def record(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", metavar="FILE", help="default stdout")
    sub.add_argument("--seconds", type=float, metavar="SEC", help="end then; else at Ctrl-C")


def export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--html", metavar="FILE", required=True, help="one page with everything in it; - is stdout")


def completion(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shell", choices=("bash", "zsh", "fish"))


def _seconds(text: str) -> float:
    factor = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:])
    try:
        return float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; write 90s, 10m or 1h") from None
