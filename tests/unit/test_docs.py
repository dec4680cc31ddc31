"""The documentation holds together: links and anchors lead somewhere, and the navigation has every page once."""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

from zeroinf import errors

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("*/README.md")]


def without_code(text: str) -> str:
    """Markdown without its blocks and spans of code, in which brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def links(page: Path) -> Iterator[str]:
    """What the page links to and shows, in Markdown and in HTML, but for other sites."""
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"]+)\"", text):
        if not re.match(r"[a-z]+:", "".join(target)):
            yield unescape("".join(target))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that MkDocs gives to the headings of a page."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading)
        plain = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())
        found.add(slug if slug not in found else f"{slug}_{sum(one.startswith(slug) for one in found)}")
    return found


@pytest.mark.parametrize("page", [*PAGES, *OUTSIDE], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert page in OUTSIDE or target.is_relative_to(DOCS), f"{link} is not part of the site"
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def navigation(entry: Any) -> Iterator[str]:
    """The pages of `nav` in mkdocs.yml."""
    if isinstance(entry, str):
        yield entry
    else:
        for each in entry if isinstance(entry, list) else entry.values():
            yield from navigation(each)


def test_the_navigation_has_every_page_once() -> None:
    listed = sorted(navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert listed == [str(page.relative_to(DOCS)) for page in PAGES], "list the pages in `nav` of mkdocs.yml"


def test_every_decision_is_in_the_list_of_decisions() -> None:
    records = sorted(page.name for page in (DOCS / "decisions").glob("0*.md"))
    assert [link for link in links(DOCS / "decisions" / "index.md") if link in records] == records


def test_a_link_that_leads_nowhere_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# A `b` c\n\n[x](absent.md) `[y](z.md)` <img src="w.svg">\n\n```md\n[v](u.md)\n```\n\n## A b c\n')
    assert list(links(page)) == ["absent.md", "w.svg"]
    assert anchors(page) == {"a-b-c", "a-b-c_1"}


def test_the_benchmarks_are_what_the_stored_figures_say() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make-benchmarks"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["render"](), "run scripts/make-benchmarks"
    assert made["CHART"].read_text(encoding="utf-8") == made["chart"](), "run scripts/make-benchmarks"


def test_figures_in_running_text_are_stored_ones() -> None:
    found = runpy.run_path(str(ROOT / "scripts" / "make-benchmarks"))["figures"]()
    rate = {name: row["tokens_per_s"] for name, row in found.items() if "tokens_per_s" in row}
    told = {
        "README.md": [
            f"gives {rate['llama-2-13b']} tokens/s",
            f"{rate['llama-2-13b'] / rate['llama-2-13b-zero']:.2f} times DeepSpeed's",
        ],
        "CHANGELOG.md": [
            f"{rate['llama-2-13b'] / rate['llama-2-13b-zero']:.1f} times DeepSpeed's",
            f"{rate['4-gpus'] / rate['4-gpus-zero']:.1f} times on",
        ],
        "docs/guide/70b-on-24gb.md": [f"gives {rate['llama-2-70b-24']} new tokens a second"],
        "docs/guide/gpus.md": [f"| 4, partitioned | {rate['4-gpus']} |"],
        "docs/guide/moe.md": [
            f"gives {rate['qwen3-30b-a3b']} new tokens a second",
            f"in 16 bit {rate['qwen3-30b-a3b-16-bit']}",
        ],
    }
    for page, texts in told.items():
        text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
        assert [each for each in texts if each not in text] == [], page


def test_the_tables_of_what_fits_and_the_terminal_are_what_is_stored() -> None:
    fits = runpy.run_path(str(ROOT / "scripts" / "make-fits"))
    for page, text in fits["pages"](json.loads(fits["STORED"].read_text(encoding="utf-8"))).items():
        assert page.read_text(encoding="utf-8") == text, "run scripts/make-fits"
    terminal = runpy.run_path(str(ROOT / "scripts" / "make-terminal"))
    recorded = json.loads(terminal["RECORDING"].read_text(encoding="utf-8"))
    assert [run["command"] for run in recorded] == list(terminal["COMMANDS"]), "run scripts/make-terminal --record"
    assert terminal["PICTURE"].read_text(encoding="utf-8") == terminal["picture"](recorded), "run scripts/make-terminal"


@pytest.mark.full
@pytest.mark.parametrize("flags", ["", "--wire int4"])
def test_the_tables_of_what_fits_are_what_plans_say(flags: str) -> None:
    fits = runpy.run_path(str(ROOT / "scripts" / "make-fits"))
    stored = json.loads(fits["STORED"].read_text(encoding="utf-8"))[fits["command"](fits["LARGE"], flags)]
    planned = fits["planned"](fits["LARGE"], flags)
    assert planned["offload"] == stored["offload"], "run scripts/make-fits --plan"
    assert planned["tokens_per_s"] == pytest.approx(stored["tokens_per_s"], rel=0.15), "run scripts/make-fits --plan"


def test_every_figure_has_its_command_its_date_and_its_machine() -> None:
    machines = json.loads((DOCS / "data" / "machines.json").read_text(encoding="utf-8"))
    for file in (DOCS / "data").glob("[0-9]*.json"):
        for table in json.loads(file.read_text(encoding="utf-8"))["tables"]:
            for row in table["rows"]:
                assert row["values"].keys() <= table["columns"].keys(), (file.name, row)
                assert row["command"], (file.name, row)
                assert re.match(r"\d{4}-\d\d", row["date"]), (file.name, row)
                assert row["machine"] in machines, (file.name, row)


def strings(tree: ast.AST) -> Iterator[str]:
    """Strings of a module, and the constant parts of those that are formatted."""
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def test_the_errors_that_are_explained_are_those_that_are_raised() -> None:
    modules = (file.read_text(encoding="utf-8") for file in (ROOT / "zeroinf").rglob("*.py"))
    said = "\n".join(text for module in modules for text in strings(ast.parse(module)))
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [
        message for line in re.findall(r"^### (.+)$", page, re.MULTILINE) for message in re.findall("`(.+?)`", line)
    ]
    assert len(messages) > 20
    parts = [part for message in messages for part in message.split("…") if len(part.strip(" ,:")) > 3]
    assert [part for part in parts if part not in said] == []


def test_every_error_in_words_of_its_own_is_listed() -> None:
    hook = runpy.run_path(str(ROOT / "scripts" / "docs_errors.py"))
    source = """
raise UsageError(f"{a} {b}", hint="not listed: no words")
raise error(1)
raise UsageError(f"no {what} of {1 + 1}" + " here", hint="drop it" if a else "keep it")
raise HintedError("two" " parts", f"did you mean {b}?", ctx)
raise ModelError(str(error))
"""
    assert [tuple(one) for one in hook["errors_of"](source)] == [
        (2, "no … of … here", "drop it"),
        (2, "two parts", "did you mean …?"),
    ]
    page = (DOCS / "reference" / "errors.md").read_text(encoding="utf-8")
    made = hook["on_page_markdown"](page)
    assert "| --offload nvme needs --nvme-path | name a folder on a fast local disk | 2 |" in made
    own = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and name in hook["_KINDS"]}
    assert {name: kind.exit_code for name, kind in own.items()} | {"HintedError": 2} == hook["_KINDS"]


@pytest.mark.full
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="scripts/setup docs installs MkDocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "pipeline" in (tmp_path / "reference" / "python.html").read_text(encoding="utf-8")
