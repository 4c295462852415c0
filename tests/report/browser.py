"""A headless Chromium, driven by the DevTools protocol over a pipe: no port, no driver, no package."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
)
SECONDS = 90  # for an answer
PHONE = 700  # pixels of width below which a screen is a phone's


def starts() -> bool:
    """Whether the browser found is one, and not a distribution's word that it must be had elsewhere."""
    if CHROMIUM is None:
        return False
    done = subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, timeout=SECONDS)
    return done.returncode == 0 and "Chrom" in done.stdout


@dataclass
class Seen:
    """What a page measured of itself, the addresses it asked for, and what went to the console."""

    value: Any
    requests: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)


class Browser:
    def __init__(self, folder: Path) -> None:
        """``folder``: for the profile; new and empty."""
        assert CHROMIUM is not None
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads commands from 3 and writes to 4; high numbers first, so that none of them stands in the way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_browser, from_browser)]
        self._errors = folder / "stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [
                    *("bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "chromium", CHROMIUM, *FLAGS),
                    *(f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"),
                ],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
            )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._sent, self._rest, self._events = 0, b"", list[dict[str, Any]]()

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._call("Browser.close")
            self._process.wait(20)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def look(self, page: Path, width: int, script: str, dark: bool = False, scale: float = 1.0) -> Seen:
        """Opens the page ``width`` CSS pixels wide and evaluates an expression in it."""
        self._events.clear()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable", tab)
        screen = {"width": width, "height": 844, "deviceScaleFactor": scale, "mobile": width < PHONE}
        self._call("Emulation.setDeviceMetricsOverride", tab, **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", tab, features=[scheme])
        self._call("Page.navigate", tab, url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()
        answer = self._call("Runtime.evaluate", tab, expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        self._call("Target.closeTarget", targetId=target)
        seen = Seen(answer["result"].get("value"))
        for event in self._events:
            method, found = event["method"], event.get("params", {})
            if method == "Network.requestWillBeSent":
                seen.requests.append(found["request"]["url"])
            elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                seen.console.append(json.dumps(found))
        return seen

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        os.write(self._write, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._sent:
            pass
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, f"no answer from the browser: {self._errors.read_text(errors='replace')[-500:]}"
            self._rest += part
        text, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
