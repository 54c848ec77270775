"""Look at the built site in headless Chromium: nothing overflows, no picture is missing, the search finds its words.

``make browser`` runs it on what ``make docs`` has built; it needs Chromium.

One page loads the others in frames of 1280 and 390 pixels, measures them, and is dumped; then screenshots are taken.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

PAGES = [
    "index.html",
    "tutorials/first-posterior.html",
    "gallery/index.html",
    "gallery/01_eight_schools.html",
    "reference/api.html",
    "reference/api/implicitvi.inference.svi.html",
    "results/conjugate.html",
]
MEASURE = """
<body><pre id="out"></pre><script>
const pages = %s, out = [];
const wait = ms => new Promise(done => setTimeout(done, ms));
async function open(url, width) {
  const frame = document.createElement("iframe");
  frame.width = width; frame.height = 900; frame.src = url; document.body.append(frame);
  await new Promise(done => frame.onload = done); await wait(300);
  return frame;
}
(async () => {
  for (const page of pages) for (const width of [1280, 390]) {
    const frame = await open("/" + page, width), doc = frame.contentDocument;
    out.push({page, width, overflow: doc.documentElement.scrollWidth - width,
              missing: [...doc.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)});
    frame.remove();
  }
  const frame = await open("/search.html?q=adaptive+contrast", 1280);
  for (let i = 0; i < 50 && !frame.contentDocument.querySelector("#search-results li"); i++) await wait(100);
  out.push({page: "search", found: frame.contentDocument.querySelectorAll("#search-results li").length});
  document.getElementById("out").textContent = JSON.stringify(out);
})();
</script></body>
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *args: object) -> None:
        pass


def main(site: Path, pictures: Path) -> None:
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        sys.exit("no Chromium found")
    pictures.mkdir(parents=True, exist_ok=True)
    measure = site / "_measure.html"
    measure.write_text(MEASURE % json.dumps(PAGES))
    handler = partial(Quiet, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    run = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    try:
        dumped = subprocess.run(
            [*run, "--virtual-time-budget=60000", "--dump-dom", f"{base}/_measure.html"],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout
        measured = re.search(r'<pre id="out">(.*?)</pre>', dumped, re.S)
        assert measured is not None
        found = json.loads(html.unescape(measured[1]))
        for page in PAGES:
            for width in (1280, 390):
                name = f"{page.replace('/', '_').removesuffix('.html')}_{width}.png"
                subprocess.run(
                    [*run, f"--window-size={width},2000", f"--screenshot={pictures / name}", f"{base}/{page}"],
                    check=True,
                    capture_output=True,
                    timeout=120,
                )
    finally:
        measure.unlink()
        server.shutdown()
    bad = [each for each in found if each.get("overflow", 0) > 0 or each.get("missing") or each.get("found") == 0]
    print(json.dumps(found, indent=1))  # noqa: T201
    sys.exit(f"{len(bad)} pages are not as they should be: {bad}" if bad else 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
