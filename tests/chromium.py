"""A headless Chromium, driven through a pipe: what a page shows, what it logs, and what it asks the network for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["CHROMIUM", "Page", "opened"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
CHROMIUM = os.environ.get("REVHOOKS_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
_PATIENCE = 120  # seconds
# It reads from 3 and writes to 4
_AS_IT_EXPECTS = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab.

    Attributes:
        logged: what its console said, errors that nobody caught among it.
        requested: addresses that it asked for.
    """

    def __init__(self, write: Any, read: Any) -> None:
        self.logged: list[str] = []
        self.requested: list[str] = []
        self._write, self._read, self._sent = write, read, 0
        self._session: str | None = None
        self._loaded: set[str] = set()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.send(f"{domain}.enable")
        self.send("Page.setLifecycleEventsEnabled", enabled=True)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the browser's protocol, and note what happens until it answers."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while (answer := self._next()).get("id") != self._sent:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]  # type: ignore[no-any-return]

    def goto(self, path: Path) -> None:
        """Open a file, and wait until it has loaded."""
        document = self.send("Page.navigate", url=path.as_uri())["loaderId"]
        while document not in self._loaded:
            self._next()

    def evaluate(self, expression: str) -> Any:
        """What an expression of the page's language gives."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def _next(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has gone")
            text += byte
        message: dict[str, Any] = json.loads(text)
        match message.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.logged.append(json.dumps(message["params"]))
            case "Page.lifecycleEvent" if message["params"]["name"] == "load":
                self._loaded.add(message["params"]["loaderId"])
            case "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
        return message


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own.

    Args:
        profile: an empty folder, for what it writes.
    """
    to_browser, from_us = os.pipe()
    to_us, from_browser = os.pipe()
    command = [
        sys.executable, "-c", _AS_IT_EXPECTS, str(to_browser), str(from_browser), str(CHROMIUM), "--headless", "--no-sandbox",
        "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-pipe",
    ]  # fmt: skip
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, pass_fds=(to_browser, from_browser), stdout=quiet, stderr=quiet) as browser:
        os.close(to_browser)
        os.close(from_browser)
        watchdog = threading.Timer(_PATIENCE, browser.kill)  # a browser that hangs must not keep the suite waiting
        watchdog.start()
        with open(from_us, "wb") as write, open(to_us, "rb") as read:
            try:
                yield Page(write, read)
            finally:
                watchdog.cancel()
                browser.terminate()
