"""The page as Chromium lays it out."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_recipes.reports.page import write_report
from mixtral_recipes.system.files import write_json

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")

# How far the page sticks out of the window; words of names, titles and columns that are broken into lines; cards and
# tables that touch what is above them.
MEASURE = """
<script>
const lines = (node, from, to) => {
  const range = document.createRange();
  range.setStart(node, from);
  range.setEnd(node, to);
  return range.getClientRects().length;
};
const broken = [];
for (const cell of document.querySelectorAll("th, summary, h2, .tile, .columns td")) {
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  while (walker.nextNode())
    for (const word of walker.currentNode.data.matchAll(/[^\\s-]+/g))
      if (lines(walker.currentNode, word.index, word.index + word[0].length) > 1) broken.push(word[0]);
}
const touching = [];
for (const block of document.querySelectorAll(".card, .card > table")) {
  const before = block.previousElementSibling?.getBoundingClientRect();
  const here = block.getBoundingClientRect();
  if (before && before.right > here.left && here.top - before.bottom < 8) touching.push(block.innerText.slice(0, 30));
}
document.body.dataset.found = JSON.stringify({
  broken, touching, overflow: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
});
</script>
"""


def laid_out(page: str, folder: Path, width: int) -> dict[str, Any]:
    file = folder / "measured.html"
    file.write_text(page + MEASURE)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    home = os.environ | {"HOME": str(folder)}
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, env=home, check=True).stdout
    found = re.search(r'data-found="(.*?)"', dom)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1200, 500])
def test_names_are_whole_and_nothing_sticks_out(write_run: Callable[..., Path], tmp_path: Path, width: int) -> None:
    run = write_run(tmp_path / "run", end={"checkpoint": "/somewhere" * 12, "topology": "TP1 PP1", "world_size": 1})
    link = {"link": "adapter", "what": "run lo, step 0", "weights": "a09b2a4abba9", "data": "SQuAD a4a90667d300"}
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"kind": "start", "lineage": [link]}) + "\n")
    score = {"squad": {"data": "squad", "exact_match": 1.0, "f1": 2.0, "exact_match_of_first_line": 3.0, "count": 100}}
    sample = {"question": "Who was there? " * 30, "expected": "Mary", "before": "x" * 300, "after": "Mary"}
    evaluation = {"scores": {"before": score, "after": score}, "samples": [sample, sample]}
    write_json(run / "result.json", {"checkpoint": "/somewhere" * 12, "evaluation": evaluation})
    page = write_report(run).read_text()
    assert "Held-out questions" in page
    assert "exact match of the first line" in page
    assert laid_out(page, tmp_path, width) == {"broken": [], "touching": [], "overflow": 0}
