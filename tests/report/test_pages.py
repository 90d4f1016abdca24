"""Pages in a browser, at a phone's, a laptop's and a wide screen's width: nothing sticks out, is
cut off or has to be scrolled sideways.
"""

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.results import RUNS
from evlm_jax.ablate import collect, page
from evlm_jax.evals import results
from evlm_jax.report import page as report
from tests.evals.test_report import saved as saved  # the report's results

WIDTHS = (390, 768, 1024, 1280, 1920)
# Of every element of every frame: its right edge, and whether it hides a part of what it holds.
MEASURE = """
onload = () => {
  document.body.textContent = JSON.stringify(Array.from(frames, frame => {
    const page = frame.document, at = frame.innerWidth, wrong = [], top = page.scrollingElement;
    for (const hidden of page.querySelectorAll("details")) hidden.open = true;
    if (top.scrollWidth > at) wrong.push(`the page: ${top.scrollWidth}`);
    for (const one of page.body.querySelectorAll("*")) {
      const kind = `${one.tagName}.${one.getAttribute("class") ?? ""}`;
      const name = `${kind} '${one.textContent.trim().slice(0, 30)}'`;
      const right = one.getBoundingClientRect().right;
      if (right > at + 0.5) wrong.push(`${name} ends at ${right}`);
      const figure = one.closest("svg");
      if (one.tagName == "text" && right > figure.getBoundingClientRect().right + 0.5)
        wrong.push(`${name} is cut by its figure`);
      // not an empty one: a picture
      const hides = one.textContent && frame.getComputedStyle(one).overflowX != "visible";
      if (hides && one.scrollWidth > one.clientWidth)
        wrong.push(`${name} shows ${one.clientWidth} of ${one.scrollWidth}`);
    }
    return [at, wrong];
  }));
};
"""


def measured(text: str, work: Path) -> dict[int, list[str]]:
    """{width: what is wrong with the page at it}, by Chromium, which has a frame of each width."""
    if not (browser := shutil.which("chromium")):
        pytest.skip("needs Chromium: apt-get install chromium")
    frames = "".join(
        f'<iframe style="width:{w}px;height:900px;border:0" srcdoc="{html.escape(text)}"></iframe>'
        for w in WIDTHS
    )
    (work / "frames.html").write_text(
        f"<!doctype html><meta charset=utf-8><script>{MEASURE}</script><body>{frames}", "utf-8"
    )
    flags = (
        "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
        " disable-component-update disable-sync"
    )
    command = [
        browser,
        *(f"--{flag}" for flag in flags.split()),
        f"--user-data-dir={work / 'profile'}",
        "--dump-dom",
    ]
    found = subprocess.run(
        [*command, (work / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout
    return {
        width: wrong
        for width, wrong in json.loads(
            html.unescape(found.partition("<body>")[2].partition("</body>")[0])
        )
    }


@pytest.mark.slow
def test_the_ablation_page_fits(tmp_path):
    found = collect.collect(sorted(RUNS.glob("*/*/result.json")))
    text = page.render(found, tmp_path / "page.html").read_text("utf-8")
    assert measured(text, tmp_path) == {width: [] for width in WIDTHS}


@pytest.mark.slow
def test_the_report_fits(saved, tmp_path):
    made, long = results.load(saved), "a word of uncommon" + "ly" * 60
    (row,) = made["attention"]
    made |= {
        "attention": [row | {"words": 7 * row["words"] + [row["words"][0] | {"word": long}]}],
        "tagline": long,
        "setup": [["vision", long]],
    }
    made["losses"] |= {
        f"/some/where/{'far/' * n}rows.jsonl": curve
        for n in (1, 30)
        for curve in made["losses"].values()
    }
    for example in (
        made["emoji"]
        + made["sources"]
        + [asked for picture in made["vqa"] for asked in picture["questions"]]
    ):
        example |= {"question": long, "prediction": long}
    text = report.render(made, tmp_path / "report.html").read_text("utf-8")
    assert measured(text, tmp_path) == {width: [] for width in WIDTHS}


@pytest.mark.slow
def test_the_page_of_what_the_model_sees_fits(tmp_path):
    assert measured(Path("docs/mixture.html").read_text("utf-8"), tmp_path) == {
        width: [] for width in WIDTHS
    }
