"""Pages in a real browser without a window: the Chromium that is installed, steered by playwright."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Page, Playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it has none for root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Whatever else it wants to look up: there is no such address.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)
_MINUTE = 60_000  # in playwright's milliseconds


class Browser:
    """`with browser.open(address, profile) as page:`, page being playwright's own."""

    def __init__(self, playwright: Playwright, chromium: str):
        self._playwright, self._chromium = playwright, chromium

    @contextmanager
    def open(self, address: str | Path, profile: Path, size: tuple[int, int] = (1300, 1000)) -> Iterator[Page]:
        """A page in a window of `size` pixels, closed at the end; what it stores stays in the folder `profile`.

        A path is a page that carries all it needs: the test fails where a script of the page does, and where the page
        asks for anything else.
        """
        context = self._playwright.chromium.launch_persistent_context(
            profile,
            executable_path=self._chromium,
            args=_FLAGS,
            viewport={"width": size[0], "height": size[1]},
            timeout=2 * _MINUTE,
        )
        context.set_default_timeout(_MINUTE)
        complaints: list[str] = []
        try:
            page = context.pages[0]
            if isinstance(address, Path):
                address = address.resolve().as_uri()
                own = (address, "data:", "blob:")
                page.on("request", lambda request: request.url.startswith(own) or complaints.append(request.url))
                # What the page's own policy has kept it from is written down there.
                page.on("console", lambda said: said.type == "error" and complaints.append(said.text))
                page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(address)
            yield page
        finally:
            context.close()
        assert not complaints, complaints


@contextmanager
def open_browser() -> Iterator[Browser]:
    """The Browser; the test that asks for it is skipped where there is none."""
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if chromium is None:
        pytest.skip(f"no browser: none of {', '.join(_NAMES)} is here (apt-get install chromium), nor is $CHROMIUM set")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to steer a browser: pip install playwright")
    with api.sync_playwright() as playwright:
        yield Browser(playwright, chromium)


def screenshot(page: Page) -> Image.Image:
    """What the window shows, RGB."""
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")
