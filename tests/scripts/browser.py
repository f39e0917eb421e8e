"""A headless Chromium that tests look at pages with, by the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip


def found() -> str | None:
    """The browser of HF_SOO_BROWSER, or the first on the PATH."""
    return os.environ.get("HF_SOO_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser: messages are JSON, each ended by a zero byte."""

    def __init__(self, reads: int, writes: int) -> None:
        self.reads, self.writes, self.rest, self.count = reads, writes, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **self.session}
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while (answer := self.next()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.reads, 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def happened(self, event: str) -> list[dict[str, Any]]:
        """What was told of all events of a kind since the page was opened."""
        return [each["params"] for each in self.events if each["method"] == event]

    def open(self, file: Path, width: int, *, dark: bool = False) -> None:
        """Show a file at a width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.events = []
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not self.happened("Page.loadEventFired"):
            self.events.append(self.next())

    def value(self, expression: str) -> Any:
        """Of an expression in JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page, as a PNG."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Started, and ended with the block."""
    (out, to_browser), (from_browser, back) = os.pipe(), os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (out, back)]  # out of the way of 3 and 4, which it wants
    command = [str(found()), *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    shell = ["bash", "-c", 'exec "$@" 3<&{} 4>&{}'.format(*high), "bash", *command]
    process = subprocess.Popen(shell, pass_fds=high, stderr=subprocess.DEVNULL)
    for end in (out, back, *high):
        os.close(end)
    try:
        yield Browser(from_browser, to_browser)
    finally:
        os.close(to_browser)  # it ends when nobody can speak to it
        os.close(from_browser)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() - began < 10:
            time.sleep(0.05)
        process.kill()
        process.wait()
