"""Chromium without a window, for tests: what it makes of a page after its scripts, and what that looks like."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image


def chromium() -> str:
    """The browser's path; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is here (apt-get install chromium), nor $CHROMIUM set")
    return found


def _call(page: Path, profile: Path, *options: str) -> str:
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    # Whatever it wants to look up: there is no such address.
    quiet = ("--no-first-run", "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND")
    command = [chromium(), *flags, *quiet, f"--user-data-dir={profile}", "--virtual-time-budget=20000", *options]
    done = subprocess.run([*command, page.resolve().as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dump(page: Path, profile: Path) -> str:
    """The document after its scripts have run; what it stores stays in `profile`."""
    return _call(page, profile, "--dump-dom")


def download(page: Path, profile: Path, folder: Path) -> list[Path]:
    """The files that the page's scripts hand out, in `folder`; `profile` is a new one."""
    (profile / "Default").mkdir(parents=True)
    folder.mkdir()
    place = {"default_directory": str(folder)}
    settings = {"download": {**place, "prompt_for_download": False}, "savefile": place}
    (profile / "Default/Preferences").write_text(json.dumps(settings))
    dump(page, profile)
    return sorted(folder.iterdir())


def screenshot(page: Path, profile: Path, width: int, height: int) -> Image.Image:
    """What a window of this size shows."""
    path = profile / "screenshot.png"
    _call(page, profile, f"--window-size={width},{height}", f"--screenshot={path}")
    return Image.open(io.BytesIO(path.read_bytes())).convert("RGB")


def with_script(page: Path, script: str, beside: str = "probe.html", *, policy: str | None = None) -> Path:
    """A copy of the page in the same folder with a script at its end; `policy` replaces its own."""
    text = page.read_text()
    if policy is not None:
        text, count = re.subn(r'content="default-src[^"]*"', f'content="{policy}"', text)
        assert count == 1
    copy = page.with_name(beside)
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    return copy
