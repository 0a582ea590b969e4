"""Looks at a report in headless Chromium: `report_screenshot.py REPORT.html OUTDIR`.

Takes pictures of the whole page, wide in light and dark and on a phone, and fails where the page
asks for anything but itself, scrolls sideways, or reports an error.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LOOKS = {  # name: width, height, scheme
    "wide-light": (1280, 900, "light"),
    "wide-dark": (1280, 900, "dark"),
    "phone": (390, 844, "light"),
    "phone-dark": (390, 844, "dark"),
}
_WIDEST = """
    [...document.querySelectorAll('body *')]
      .filter(e => !e.closest('.scroll, svg') && e.getBoundingClientRect().right > innerWidth + 1)
      .map(e => e.tagName + '.' + e.className).slice(0, 5).join(', ')"""


class Browser:
    """A headless Chromium, spoken to in the DevTools protocol over a pair of pipes."""

    def __init__(self, program: str, profile: str):
        into, self._write = os.pipe()
        self._read, out = os.pipe()

        def join():  # Chromium reads commands from 3 and answers on 4
            spare_into, spare_out = os.dup(into), os.dup(out)
            os.dup2(spare_into, 3)
            os.dup2(spare_out, 4)

        self._process = subprocess.Popen(
            [
                *(program, "--headless", "--remote-debugging-pipe", "--no-first-run"),
                *("--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            preexec_fn=join,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(into)
        os.close(out)
        self._answers = os.fdopen(self._read, "rb")
        self._number = 0
        self._session: str | None = None
        self.events: list[dict] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method: str, **params):
        """Gives a command and returns its result; events on the way are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, method: str) -> None:
        """Waits for an event."""
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait()

    def _next(self) -> dict:
        text = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            text += byte
        return json.loads(text)


def look(browser: Browser, page: str, width: int, height: int, scheme: str) -> tuple[bytes, list]:
    """Returns a PNG of the whole page and what is wrong with it."""
    browser.events.clear()
    for domain in ("Page", "Network", "Runtime", "Log"):
        browser(f"{domain}.enable")
    browser(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=height,
        deviceScaleFactor=1,
        mobile=width < 500,
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser("Emulation.setEmulatedMedia", features=features)
    browser("Page.navigate", url=page)
    browser.wait_for("Page.loadEventFired")
    wrong = []
    for event in browser.events:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != page and not url.startswith("data:"):
                wrong.append(f"it asks for {url}")
        elif event.get("method") == "Runtime.exceptionThrown":
            wrong.append(f"a script fails: {params['exceptionDetails']['text']}")
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            wrong.append(f"the browser says: {params['entry']['text']}")

    def ask(expression: str):
        return browser("Runtime.evaluate", expression=expression)["result"]["value"]

    scrolled = ask("document.documentElement.scrollWidth")
    if scrolled > width:
        wrong.append(f"it is {scrolled} pixels wide, beyond {width}: {ask(_WIDEST)}")
    size = browser("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
    shot = browser("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
    return base64.b64decode(shot["data"]), wrong


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, 1 where something is wrong, 2 for wrong input."""
    if len(argv) != 2 or not Path(argv[0]).is_file():
        print((__doc__ or "").splitlines()[0], file=sys.stderr)
        return 2
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print(f"None of {', '.join(BROWSERS)} is installed or in PATH.", file=sys.stderr)
        return 2
    folder = Path(argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(program, profile)
        try:
            for name, (width, height, scheme) in LOOKS.items():
                picture, wrong = look(
                    browser, Path(argv[0]).resolve().as_uri(), width, height, scheme
                )
                (folder / f"{name}.png").write_bytes(picture)
                failed |= bool(wrong)
                print(f"{folder / name}.png: {'; '.join(wrong) or 'good'}")
        finally:
            browser.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
