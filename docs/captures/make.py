"""Makes the captures beside this file: `kvtier serve` under load in one process, `pager-inspect` on a terminal in others.

    python docs/captures/make.py

Needs the `serve` extra. Figures are of the machine that it ran on; what is worth reading is which screen answers what.
"""

from __future__ import annotations

import os
import pty
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
SCREENS = {
    "top": ["top", "--once"],
    "status": ["status"],
    "stat": ["stat", "1", "5", "-f", "hbm,host,nvme,miss,ghost,up,down,evict,wait.n>h,age.h>n"],
    "why": ["why", "--slowest", "1"],
    "session": ["session", "chat-0"],
    "thrash": ["thrash"],
    "advise": ["advise"],
    "doctor": ["doctor"],
}
CHATS, LOAD_S = 9, 40.0
OTHERS = re.compile(r"^.*two stores on one disk.*\n(?: .*\n)*", re.M)  # what else runs on this machine is by accident
SIZES = ["--device-bytes", "6MiB", "--host-bytes", "10MiB", "--nvme-bytes", "256MiB", "--block-size", "32"]


def talk(url: str, number: int, until_s: float) -> None:
    """A chat whose turns come at random. The server remembers every third one; the others send all that was said."""
    choose, name, said = random.Random(number), f"chat-{number}", list[dict[str, str]]()
    with httpx.Client(base_url=url, timeout=120) as client:
        if number % 3 == 0:
            client.post("/v1/sessions", json={"id": name})
        while time.monotonic() < until_s:
            words = " ".join(f"f{choose.randrange(1000)}" for _ in range(choose.choice([40, 200, 700])))
            said = (
                [*said, {"role": "user", "content": words}] if len(said) < 12 else [{"role": "user", "content": words}]
            )
            body = {"max_tokens": 8, "temperature": 0}
            if number % 3 == 0:
                client.post(f"/v1/sessions/{name}/messages", json=body | {"messages": said[-1:]})
            else:
                reply = client.post("/v1/chat/completions", json=body | {"model": "needle", "messages": said}).json()
                said.append(reply["choices"][0]["message"])
            time.sleep(choose.expovariate(1.0))


def capture(words: list[str], where: str) -> str:
    """What a terminal of 128 columns shows, without colour."""
    leader, follower = pty.openpty()
    env = os.environ | {"COLUMNS": "128", "LINES": "40", "LANG": "C.UTF-8", "TERM": "xterm"}
    command = [sys.executable, "-m", "kvtier.tools.inspect", "-s", where, "--no-color", *words]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:  # the program has closed its side
            break
        if not part:
            break
        seen += part
    process.wait()
    return seen.decode().replace("\r\n", "\n")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [
            sys.executable,
            "-m",
            "kvtier.tools.cli",
            "serve",
            "--needle",
            "--port",
            "0",
            "--store",
            store,
            *SIZES,
        ]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
            assert server.stderr is not None
            url = next(found[1] for line in server.stderr if (found := re.search(r"on (http://[^ ,]+),", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            until_s = time.monotonic() + LOAD_S + 10.0
            chats = [threading.Thread(target=talk, args=(url, n, until_s)) for n in range(CHATS)]
            for chat in chats:
                chat.start()
            time.sleep(LOAD_S)
            for name, words in SCREENS.items():
                shown = OTHERS.sub("", capture(words, store).replace(folder, "/data"))
                (HERE / f"{name}.txt").write_text(f"$ pager-inspect {' '.join(words)}\n{shown}")
            for chat in chats:
                chat.join()
            server.terminate()


if __name__ == "__main__":
    main()
