"""The pages that ``make docs`` builds: all there, linked, from nowhere else, and no wider than a screen or a phone."""

import importlib
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from i2v_kernels.testing import OPINFOS
from tests.docs import browser

pytest.importorskip("material", reason="mkdocs-material is not installed")
ROOT = Path(__file__).resolve().parents[2]
HOOKS = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
SOURCES = HOOKS["SOURCES"] | {
    path.relative_to(ROOT / "docs").as_posix(): path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")
}
HOST = "https://host.invalid/owner/name"
needs_chromium = pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")


def build(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]  # --quiet would count no warning
    variables = {name: value for name, value in os.environ.items() if name != "REPOSITORY"}
    done = subprocess.run(command, cwd=ROOT, env=variables | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build(tmp_path_factory.mktemp("site"))


def url(page: str) -> str:
    return re.sub(r"(index)?\.md$", "/", page).replace("//", "/").removeprefix("/")


def html(site: Path, page: str) -> str:
    return (site / url(page) / "index.html").read_text()


@pytest.mark.parametrize("page", SOURCES)
def test_every_source_is_a_page_and_in_the_navigation(site, page):
    title = re.search("^# (.*)", (ROOT / SOURCES[page]).read_text(), re.M)[1]
    assert "<h1 id=" in html(site, page) and title.replace("`", "") in re.sub("<.*?>", "", html(site, page))
    assert page == "index.md" or f'href="{url(page)}"' in html(site, "index.md")


@pytest.mark.parametrize("page", SOURCES)
def test_lists_and_tables_are_such(site, page):
    """Which they are on the repository's own pages without an empty line before them, but not here."""
    for paragraph in re.findall("<p>(.*?)</p>", html(site, page), re.S):
        assert not re.search(r"^(- |1\. |\||```)", paragraph, re.M), paragraph


@pytest.mark.parametrize("op", [info.name for info in OPINFOS])
def test_every_op_has_a_page_with_its_arguments(site, op):
    assert f'id="i2v_kernels.ops.{op}.{op}"' in html(site, f"ops/{op}.md")
    assert f'href="{op}/"' in html(site, "ops/index.md")


@pytest.mark.parametrize("module", ["i2v_kernels", "i2v_kernels.nn", "i2v_kernels.video", "i2v_models"])
def test_every_public_name_is_in_the_reference(site, module):
    pages = [html(site, page) for page in (*HOOKS["OPS"], f"reference/{module.replace('i2v_kernels.', '')}.md")]
    there = set(re.findall(rf'id="{module.partition(".")[0]}[\w.]*\.(\w+)"', "".join(pages)))
    assert set(importlib.import_module(module).__all__) - {"functional"} <= there


def test_readme_sections_stand_on_their_pages(site):
    for page in ("installation.md", "speed.md", "ops/index.md"):
        (title,) = HOOKS["SECTION"].findall((ROOT / "docs" / page).read_text())
        words = re.findall(r"`(\w{5,})`", HOOKS["section"](title))
        assert words and all(f"<code>{word}</code>" in html(site, page) for word in words)
    with pytest.raises(ValueError, match="no section 'Nothing'"):
        HOOKS["section"]("Nothing")


@pytest.mark.parametrize(
    ("link", "page", "repository", "turned"),
    [
        ("[x](../token_shift/README.md#a)", "ops/st_adapter.md", "", "[x](token_shift.md#a)"),
        ("[x](../../../README.md#patch)", "ops/st_adapter.md", "", "[x](../speed.md#patch)"),
        ("[`x`](op.py)", "ops/st_adapter.md", "", "`x`"),
        ("[`x`](op.py)", "ops/st_adapter.md", HOST, f"[`x`]({HOST}/blob/main/i2v_kernels/ops/st_adapter/op.py)"),
        ("[x](docs/train.md)", "contributing.md", "", "[x](train.md)"),
        ("[x](../i2v_kernels/video/README.md)", "train.md", "", "[x](video.md)"),
        ("[x](#y), [x](https://y), q[0](gone.py)", "train.md", HOST, "[x](#y), [x](https://y), q[0](gone.py)"),
    ],
)
def test_links_end_right(link, page, repository, turned):
    assert HOOKS["relink"](link, SOURCES[page], page, repository) == turned


def test_nothing_comes_from_elsewhere(site):
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=\"?(https?:|//)", path.read_text())
        assert not loaded + re.findall(r"url\([\"']?(https?:|//)|@import", path.read_text()), path


def test_repository_is_linked_where_it_is_known(site, tmp_path):
    assert "md-source" not in html(site, "index.md") and "edit/main" not in html(site, "train.md")
    linked = build(tmp_path, REPOSITORY=HOST)
    assert f'href="{HOST}"' in html(linked, "index.md")
    for page, source in SOURCES.items():
        assert f'href="{HOST}/edit/main/{source}"' in html(linked, page)
    assert 'data-md-component="source"' not in html(linked, "index.md")  # which asks GitHub for its stars


@needs_chromium
def test_pages_fit_a_screen_and_a_phone(site):
    found = browser.faults(site)
    assert len(found) == 2 * len(list(site.rglob("*.html")))
    assert not {place: faults for place, faults in found.items() if faults}


@needs_chromium
def test_what_does_not_fit_is_found(tmp_path):
    code = f"<pre><code style='display: block; overflow: auto'>{'w' * 100}</code></pre>"
    box = "<div class='md-typeset__scrollwrap' style='overflow: auto'>"
    pages = {
        "fits": ("<article><p>fits</p></article>", [], ""),
        "text": (f"<article><p>{'w' * 300}</p></article>", [1280, 390], "the page is"),
        "code": (f"<article>{code}</article>", [390], "<code> www"),
        "table": (f"<article style='width: 50%'><table><tr><td>{'w' * 99}</table></article>", [1280, 390], "beyond its column"),
        "box": (f"<article>{box}<table><tr><td>{'w' * 300}</table></div></article>", [1280], "beyond its column"),
        "elsewhere": ("<img src='http://elsewhere.invalid/x.png'>", [1280, 390], "loads http://elsewhere.invalid"),
    }
    for name, (body, _, _) in pages.items():
        (tmp_path / f"{name}.html").write_text(f"<!doctype html><body>{body}")
    found = browser.faults(tmp_path)
    assert len(found) == 2 * len(pages)
    for (page, width), faults in found.items():
        _, widths, fault = pages[Path(page).stem]
        assert (fault in "".join(faults)) if width in widths else not faults, (page, width, faults)
