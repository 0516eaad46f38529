"""Chromium for tests: a visit to a page, with everything noted that must not happen on it.

Chromium is the system's (``AUTOGLM_GGUF_CHROMIUM`` names another), Playwright drives it, and
axe-core lies where ``npm install --prefix`` puts it beside this Python (``AUTOGLM_GGUF_AXE``).
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import PacedEngine, fake_app, listening, png

from autoglm_gguf.server.params import ServerParams

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

KEY = "a-key-of-this-test"
TAP = '<think>It is there.</think>\n<answer>do(action="Tap", element=[250,600])'
ROOM = 60_000  # cells: a letter is a token here, and so is an image's square
PATIENCE_MS = 60_000  # nothing here takes that long, even on a busy machine
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_DROP = """([name, type, data]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  return transfer;
}"""
# Where a mark lies on the screenshot, in thousandths of it, as the browser has laid it out.
PLACES = """() => {
  const image = document.querySelector(".shot img").getBoundingClientRect();
  return [...document.querySelectorAll(".marks .ring")].map((ring) => {
    const box = ring.getBoundingClientRect();
    const x = 1000 * (box.x + box.width / 2 - image.x) / image.width;
    const y = 1000 * (box.y + box.height / 2 - image.y) / image.height;
    return [x, y];
  });
}"""
_AXE = """async () => {
  const found = await axe.run(document, { resultTypes: ["violations"] });
  return found.violations
    .filter((violation) => ["serious", "critical"].includes(violation.impact))
    .map((v) => `${v.id}: ${v.help}: ${v.nodes.map((node) => node.html).join(" | ")}`);
}"""


@contextlib.contextmanager
def open_chromium() -> Iterator[Browser]:
    """The browser, or a skip that says what is missing.

    While it is open, Playwright's event loop belongs to this thread: no other can be run in it.
    """
    from playwright.sync_api import sync_playwright

    named = os.environ.get("AUTOGLM_GGUF_CHROMIUM")
    path = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium, or AUTOGLM_GGUF_CHROMIUM")
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox"] if is_root else [],  # Chromium has no sandbox for root
            timeout=PATIENCE_MS,
        )
        try:
            yield browser
        finally:
            browser.close()


def axe_source() -> str:
    """axe-core, or a skip."""
    beside = Path(sys.prefix) / "node_modules" / "axe-core" / "axe.min.js"
    path = Path(os.environ.get("AUTOGLM_GGUF_AXE", beside))
    if not path.is_file():
        pytest.skip("needs axe-core: npm install --prefix VENV axe-core, or AUTOGLM_GGUF_AXE")
    return path.read_text("utf-8")


class Visit:
    """One tab on one server.

    Args:
        page: The tab.
        url: Of the server; nothing else may be asked for.
    """

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.complaints: list[str] = []
        """Errors of the console, uncaught exceptions, requests to other hosts."""
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: self._note_address(request.url))
        page.on("websocket", lambda socket: self._note_address(socket.url))

    def _note_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"console: {message.text}")

    def _note_address(self, address: str) -> None:
        own = (f"{self.url}/", self.url.replace("http", "ws", 1) + "/", "data:")
        if not address.startswith(own):
            self.complaints.append(f"another host: {address}")

    def open(self, state: str = "ready") -> None:
        """Load the page and wait until the server's state is shown."""
        self.page.goto(f"{self.url}/")
        self.wait(f"#state[data-state={state}]")

    def wait(self, selector: str, **options: Any) -> Locator:
        """Wait for an element."""
        found = self.page.locator(selector)
        found.first.wait_for(**options)
        return found

    def until(self, expression: str, value: Any = None) -> None:
        """Wait for an expression in the page to become true."""
        self.page.wait_for_function(expression, arg=value, polling=50)

    def carry(self, event: str, data: bytes, name: str = "screen.png", kind: str = "") -> None:
        """Drop (``drop``) or paste (``paste``) a file."""
        kind = kind or "image/png"
        given = [name, kind, base64.b64encode(data).decode()]
        transfer = self.page.evaluate_handle(_DROP, given)
        if event == "drop":
            for step in ("dragenter", "dragover", "drop"):
                self.page.dispatch_event("body", step, {"dataTransfer": transfer})
            return
        self.page.evaluate(
            "(d) => document.dispatchEvent(new ClipboardEvent('paste',"
            " {clipboardData: d, bubbles: true, cancelable: true}))",
            transfer,
        )

    def say(self, text: str) -> None:
        """Write a message and send it."""
        self.page.fill("#input", text)
        self.page.press("#input", "Enter")

    def answer(self, n: int = 1) -> Locator:
        """The n-th answer, once it has ended."""
        self.until("(n) => document.querySelectorAll('.answer[aria-busy=false]').length >= n", n)
        return self.page.locator(".answer").nth(n - 1)

    def findings(self, axe: str) -> list[str]:
        """What axe-core holds to be serious or critical."""
        self.page.evaluate(axe)
        found: list[str] = self.page.evaluate(_AXE)
        return found


@contextlib.contextmanager
def visiting(
    browser: Browser,
    url: str,
    *,
    width: int = 1280,
    theme: str = "light",
    language: str = "en-US",
    excuse: str | None = None,
    ready: bool = True,
) -> Iterator[Visit]:
    """A visit that must end without complaints.

    Args:
        browser: See `open_chromium`.
        url: Of the server.
        width: Of the window, pixels.
        theme: That the system prefers, ``light`` or ``dark``.
        language: That the browser asks for.
        excuse: A pattern of complaints that belong to what is tested.
        ready: Open the page, and wait until the server is ready.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 844 if width < 720 else 800},
        color_scheme=theme,
        locale=language,
        reduced_motion="reduce",
    )
    try:
        visit = Visit(context.new_page(), url)
        if ready:
            visit.open()
        yield visit
        found = [c for c in visit.complaints if not (excuse and re.search(excuse, c))]
        assert found == []
    finally:
        context.close()


def saying(answer: str | bytes | Callable[[str], bytes], **more: Any) -> Any:
    """A server whose model says this, at once unless told otherwise."""
    params = more.pop("params", ServerParams())
    text = answer.encode() if isinstance(answer, str) else answer
    return listening(fake_app(PacedEngine(text, n_ctx=ROOM, **more), params))


def ask_with_screen(
    visit: Visit, text: str = "Tap Bluetooth", size: tuple[int, int] = (280, 560)
) -> None:
    """Drop a screenshot, say something, and wait for the answer."""
    visit.carry("drop", png(*size))
    visit.wait("#tray img")
    visit.say(text)
    visit.answer()
