"""Pages of a folder in Debian's chromium, without a window: what is wider than its place, and what comes from elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue

CHROMIUM = shutil.which("chromium")

# Loads every page in frames of each width, four at a time, and sends what it finds. A table may scroll in its own box where the
# screen is narrow, code nowhere.
LOOK = """<!doctype html><script type="module">
const MARGIN = 16;  // into which the theme lets tables and code reach
const WIDE = 1280;  // where no table scrolls
const sleep = ms => new Promise(done => setTimeout(done, ms));
function faults(frame, width) {
  const view = frame.contentWindow, doc = view.document, found = [];
  if (doc.scrollingElement.scrollWidth > width) found.push(`the page is ${doc.scrollingElement.scrollWidth} pixels wide`);
  const name = element => `<${element.tagName.toLowerCase()}> ${element.textContent.trim().replace(/\\s+/g, " ").slice(0, 50)}`;
  for (const code of doc.querySelectorAll("pre, pre > code"))
    if (code.scrollWidth > code.clientWidth) found.push(`${name(code)} is ${code.scrollWidth} in ${code.clientWidth} pixels`);
  const column = doc.querySelector("article") ?? doc.body, right = column.getBoundingClientRect().right + MARGIN;
  for (const element of column.querySelectorAll("*")) {
    const box = element.closest(".md-typeset__scrollwrap"), beyond = element.getBoundingClientRect().right - right;
    const seen = !box || box === element || width >= WIDE;
    if (seen && beyond > 0) found.push(`${name(element)} is ${Math.ceil(beyond)} pixels beyond its column`);
  }
  for (const {name: url} of view.performance.getEntriesByType("resource"))
    if (!url.startsWith(location.origin) && !url.startsWith("data:")) found.push(`loads ${url}`);
  return found;
}
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  const bare = ".md-content :not(.md-typeset__table) > table:not([class])";  // until the theme has put tables into boxes
  for (let i = 0; i < 100 && frame.contentWindow.document.querySelector(bare); i++) await sleep(20);
  const found = faults(frame, width);
  frame.remove();
  return found;
}
const todo = PAGES.flatMap(page => WIDTHS.map(width => [page, width])), all = [];
await Promise.all([0, 1, 2, 3].map(async () => {
  for (let next; next = todo.shift();) all.push([...next, await look(...next)]);
}));
fetch("/found", {method: "POST", body: JSON.stringify(all)});
</script><body></body>"""


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder, the page that looks at them, and a place to send what it found."""

    def __init__(self, *args, look: bytes, found: Queue, **kwargs):
        self.look, self.found = look, found
        super().__init__(*args, **kwargs)

    def do_GET(self):
        if self.path != "/look":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        return self.wfile.write(self.look)

    def do_POST(self):
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args):
        pass


def faults(folder: Path, widths: tuple[int, ...] = (1280, 390), seconds: float = 120) -> dict[tuple[str, int], list[str]]:
    """For every HTML page of ``folder`` and width in pixels, what does not fit."""
    pages = sorted(f"/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.html"))
    script = LOOK.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(widths))
    found: Queue = Queue()
    handler = partial(Handler, directory=str(folder), look=script.encode(), found=found)
    profiles = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # into which a browser that ends may still write
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, profiles as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # what comes from elsewhere fails at once
        command += [f"--user-data-dir={profile}", "--window-size=1400,1000", f"http://127.0.0.1:{server.server_port}/look"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            rows = found.get(timeout=seconds)
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    return {(page, width): what for page, width, what in sorted(rows)}
