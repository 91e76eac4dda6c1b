"""Pages in a real browser: what they see of themselves, at several widths, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers import PATIENCE

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--dump-dom",
]
LISTEN = """<script>
const faults = [];
addEventListener("error", e => faults.push(String(e.message)));
addEventListener("securitypolicyviolation", e => faults.push(e.violatedDirective));
</script>"""
PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, seen = {};
  const measure = () => ({
    right: root.scrollWidth - root.clientWidth,
    left: Math.min(...[...document.querySelectorAll("main, svg text")]
      .map(e => e.getBoundingClientRect()).filter(b => b.width).map(b => b.left)),
  });
  seen.width = innerWidth;
  seen.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  seen.paper = getComputedStyle(document.body).backgroundColor;
  seen.folded = measure();
  const marks = [...document.querySelectorAll("[data-tip]")];
  const mark = marks.find(e => e.getBoundingClientRect().width);
  if (mark) {
    mark.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: innerWidth - 5}));
    const box = document.getElementById("tip").getBoundingClientRect();
    seen.tip = document.getElementById("tip").textContent === mark.dataset.tip && box.width > 0;
    seen.tipRight = box.right - innerWidth;
  }
  // Where a picture's words collide, nobody can read them.
  seen.overlaps = [];
  for (const picture of document.querySelectorAll("svg")) {
    const words = [...picture.querySelectorAll("text")]
      .map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.width);
    words.forEach(([a, p], i) => words.slice(i + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 2 && high > 4) seen.overlaps.push(`${a} | ${b}`);
    }));
  }
  dispatchEvent(new Event("beforeprint"));
  seen.unfolded = document.querySelectorAll("details:not([open])").length === 0;
  seen.open = measure();
  seen.focus = [...document.querySelectorAll("[tabindex], summary, a[href]")].map(e => {
    e.focus();
    const style = getComputedStyle(e);
    return [document.activeElement === e, style.outlineStyle, parseFloat(style.outlineWidth)];
  });
  seen.faults = faults;
  parent.postMessage([location.hash.slice(1), seen], "*");
});
</script>"""
# A headless window is never narrower than 500 pixels, a frame in it may be.
HARNESS = """<!doctype html><meta name="color-scheme" content="light dark"><pre id="seen"></pre>
<script>
const seen = {};
addEventListener("message", event => {
  seen[event.data[0]] = event.data[1];
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""
WIDTHS = (360, 1280)


def visit(
    pages: Mapping[str, str], folder: Path, dark: bool, widths: Sequence[int] = WIDTHS
) -> tuple[dict[str, Any], str]:
    """What every page saw of itself in a frame of every width ("name-width"), and the console."""
    assert BROWSER
    harness = HARNESS
    for name, page in pages.items():
        page = page.replace("<title>", LISTEN + "<title>", 1)
        page = page.replace("</body>", PROBE + "</body>", 1)
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
        for width in widths:
            harness += (
                f'<iframe src="{name}.html#{name}-{width}" width={width} height=900></iframe>'
            )
    (folder / "all.html").write_text(harness, encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run(
        [BROWSER, *FLAGS, *theme, profile, (folder / "all.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


def check(seen: Mapping[str, Any], console: str, dark: bool, width: int) -> None:
    """A page that is as it should be."""
    assert seen["faults"] == []
    assert "CONSOLE" not in console
    assert seen["width"] == width
    assert seen["dark"] is dark
    assert seen["paper"] == ("rgb(20, 22, 26)" if dark else "rgb(251, 250, 247)")
    for state in ("folded", "open"):
        assert seen[state]["right"] <= 0, f"{state}: the page is wider than the window"
        assert seen[state]["left"] >= 0, f"{state}: something sticks out on the left"
    assert seen.get("tip", True)
    assert seen.get("tipRight", 0) <= 0
    assert seen["unfolded"]
    assert seen["focus"]
    for focused, outline, wide in seen["focus"]:
        assert focused
        assert outline == "solid"
        assert wide >= 2
