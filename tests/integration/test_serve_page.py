"""The page of `zeroinf serve` in Chromium, at two widths: prompts stream, batches begin, end and are cancelled."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_serving import MODEL, server

CHROMIUM = shutil.which("chromium")
PICTURES = os.environ.get("TEST_PICTURES")
"""A folder for pictures of the page, if they are wanted."""


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_is_used(small_checkpoint: Callable[[str], Path], tmp_path: Path, width: int, scheme: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    body = {"model": MODEL, "max_tokens": 12, "ignore_eos": True}
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {**body, "prompt": f"say {n}"}}
        for n in range(400)
    ]
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    for file, count in ((few, 5), (many, 400)):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines[:count]))
    key = {"api_key": "s3cret"} if width < 1000 else {}
    with (
        server(small_checkpoint("llama"), slow_s=0.01, state=tmp_path / "state", **key) as (http, _),
        playwright.sync_playwright() as browsers,
    ):
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        troubles = list[str]()
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(str(http.base_url))
        if key:
            page.get_by_label("The server asks for its key").fill("s3cret")
            page.get_by_role("button", name="Use key").press("Enter")
        page.get_by_text("ready", exact=True).wait_for()
        page.get_by_label("As", exact=True).select_option("text")
        page.get_by_role("textbox", name="Prompt").fill("in the beginning")
        page.get_by_label("Most tokens").fill("8")
        page.get_by_label("Most tokens").press("Enter")
        playwright.expect(page.locator("#answer")).to_have_text(re.compile(".{8}", re.DOTALL))
        page.get_by_label("Endpoint").select_option("/v1/completions")
        page.get_by_label("A file of requests").set_input_files(str(few))
        page.get_by_role("button", name="Start batch").click()
        page.get_by_role("cell", name="completed", exact=True).wait_for(timeout=30_000)
        with page.expect_download() as download:
            page.get_by_role("button", name="download output").click()
        assert len(Path(download.value.path()).read_text(encoding="utf-8").splitlines()) == 5
        page.get_by_label("A file of requests").set_input_files({"name": "x", "mimeType": "", "buffer": b"no request"})
        page.get_by_role("button", name="Start batch").click()
        page.get_by_role("cell", name="failed: not JSON").wait_for(timeout=30_000)
        output = page.get_by_role("button", name="download output").bounding_box()
        assert output["x"] + output["width"] <= width, "what one batch failed of hides no other's files"
        page.get_by_label("A file of requests").set_input_files(str(many))
        page.get_by_role("button", name="Start batch").click()
        page.get_by_role("cell", name="in_progress", exact=True).wait_for(timeout=30_000)
        if PICTURES:
            page.wait_for_timeout(2500)
            page.screenshot(path=f"{PICTURES}/serve-page-{width}.png", full_page=True)
        page.get_by_role("button", name="cancel batch").click()
        page.get_by_role("cell", name="cancelled", exact=True).wait_for(timeout=30_000)
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways"
        browser.close()
        assert [one for one in troubles if "401" not in one] == []


NAMELESS = """() => {
  const name = (one) => one.getAttribute("aria-label") || [...(one.labels || [])].map((l) => l.textContent).join(" ")
    || document.getElementById(one.getAttribute("aria-labelledby"))?.textContent
    || (["BUTTON", "A", "TH"].includes(one.tagName) ? one.textContent : "");
  const all = "button, input, select, textarea, progress, a, section, [tabindex], [role=region]";
  return [...document.querySelectorAll(all)].filter((one) => !name(one).trim()).map((one) => one.outerHTML);
}"""
CONTRASTS = """() => {
  const probe = document.body.appendChild(document.createElement("i"));
  const light = (name) => {
    probe.style.color = `var(${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const text of ["--text", "--soft", "--mark", "--bad"]) for (const back of ["--back", "--card"]) {
    const [low, high] = [light(text), light(back)].sort((a, b) => a - b);
    found[`${text} on ${back}`] = (high + 0.05) / (low + 0.05);
  }
  probe.remove();
  return found;
}"""


def tab_to(page: Any, selector: str) -> None:
    """Press Tab until the focus is on what `selector` finds."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"the keyboard does not reach {selector}")


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_used_by_keyboard_and_read_aloud(
    small_checkpoint: Callable[[str], Path], tmp_path: Path, scheme: str
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    body = {"model": MODEL, "max_tokens": 12, "ignore_eos": True, "prompt": "say"}
    line = {"method": "POST", "url": "/v1/completions", "body": body}
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({**line, "custom_id": str(number)}) + "\n" for number in range(600)))
    with (
        server(small_checkpoint("llama"), slow_s=0.02, state=tmp_path / "state") as (http, _),
        playwright.sync_playwright() as browsers,
    ):
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme)
        page.goto(str(http.base_url))
        page.get_by_text("ready", exact=True).wait_for()
        assert min(page.evaluate(CONTRASTS).values()) >= 4.5, page.evaluate(CONTRASTS)
        tab_to(page, "#kind")
        page.keyboard.type("text")
        tab_to(page, "#prompt")
        page.keyboard.type("in the beginning")
        tab_to(page, "#tokens")
        page.keyboard.press("Control+a")
        page.keyboard.type("8")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#answer")).to_have_text(re.compile(".{8}", re.DOTALL))
        playwright.expect(page.locator("#answer[aria-busy=false]")).to_be_attached()
        page.get_by_label("A file of requests").set_input_files(str(many))  # the system's own dialog is not ours
        page.locator("#prompt").focus()
        tab_to(page, "#endpoint")
        page.keyboard.type("/v1/comp")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.get_by_role("cell", name="in_progress", exact=True).wait_for(timeout=30_000)
        playwright.expect(page.get_by_role("status").filter(has_text="has begun")).to_be_visible()
        assert page.evaluate(NAMELESS) == []
        tab_to(page, "[aria-label^=cancel]")
        page.wait_for_timeout(4500)
        assert page.evaluate("document.activeElement.ariaLabel.startsWith('cancel')"), "the focus outlives refreshes"
        page.keyboard.press("Enter")
        page.get_by_role("cell", name="cancelled", exact=True).wait_for(timeout=30_000)
        tab_to(page, "[aria-label^='download errors']")
        browser.close()
