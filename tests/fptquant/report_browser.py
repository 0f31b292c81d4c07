"""A page in a real browser: Debian's Chromium without a window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# The page is shown in a frame: a window can't be narrower than 500 pixels, and the page itself stays as it is.
_FRAMED = """<!DOCTYPE html>
<body style="margin: 0"><iframe srcdoc="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<output id="found"></output>
<script>
addEventListener("load", () => {{
  const frame = document.querySelector("iframe"), view = frame.contentWindow, inside = frame.contentDocument;
  const boxes = [...inside.querySelectorAll("svg, img")].map(picture => picture.getBoundingClientRect());
  const parts = [...inside.querySelectorAll("body *")].filter(part => !part.closest(".scroll, pre"));
  document.getElementById("found").textContent = JSON.stringify({{
    width: view.innerWidth,
    scroll_width: inside.documentElement.scrollWidth,
    beyond: parts.filter(part => part.getBoundingClientRect().right > view.innerWidth + 1).map(part => part.outerHTML),
    pictures: boxes.filter(box => box.width > 50 && box.height > 20).length,
    unloaded: boxes.length - boxes.filter(box => box.width > 50 && box.height > 20).length
      + [...inside.images].filter(image => !image.naturalWidth).length,
    requests: view.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: inside.scripts.length,
    background: view.getComputedStyle(inside.body).backgroundColor,
    text: inside.body.innerText,
    scrolling: [...inside.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
  }});
}});
</script>
"""


def look_at(page: str, width: int, folder: Path, *, dark: bool = False) -> dict[str, Any]:
    """Loads a page, and returns what the browser made of it, with what it complained of (`console`).

    Args:
        page: its HTML.
        width: of the screen, in CSS pixels.
        folder: for the browser's files.
        dark: whether the user likes it dark.
    """
    assert CHROMIUM is not None
    file = folder / f"{width}-{dark}.html"
    file.write_text(_FRAMED.format(page=escape(page), width=width), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--hide-scrollbars", "--enable-logging=stderr",
               f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},900",
               *(["--blink-settings=preferredColorScheme=0"] if dark else []), "--dump-dom", file.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    probe = re.search(r'<output id="found">(.*?)</output>', done.stdout, re.DOTALL)
    assert probe and probe[1], done.stderr[-2000:]
    found: dict[str, Any] = json.loads(unescape(probe[1]))
    return {**found, "console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}
