"""What ``mkdocs build`` makes beside the pages that stand in docs/.

READMEs beside the code, CONTRIBUTING and the like become pages as they are. A page has a section of README where it says, on a
line of its own, ``[README: Install](../README.md#install)``. Links are written as the repository needs them, relative to their
source. Here each is turned to the page that its target became; else to the repository, if REPOSITORY names it, or to its text.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
import tempfile
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    "patching.md": "i2v_kernels/patching/README.md",
    "video.md": "i2v_kernels/video/README.md",
    "gpu.md": "bench/gpu/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
}
OPS = {f"ops/{path.parent.name}.md": path.relative_to(ROOT).as_posix() for path in ROOT.glob("i2v_kernels/ops/*/README.md")}
SOURCES |= dict(sorted(OPS.items()))
NAMES = tempfile.TemporaryDirectory()
MEMBERS = """

::: i2v_kernels.ops.{}
    options: {{show_root_heading: false, show_root_toc_entry: false}}

"""
SECTION = re.compile(r"^\[README: (.+)\]\([./]*README\.md#[\w-]+\)$", re.M)
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\(([^)\s:#]+)(#[\w-]+)?\)")


def on_startup(command, dirty):
    """mkdocstrings reads and does not import, so it must find models/ by the name that it is imported by."""
    Path(NAMES.name, "i2v_models").symlink_to(ROOT / "models")
    sys.path.append(NAMES.name)


def on_config(config):
    """The navigation's "Ops" goes on with a page for each op; without an address there are no links to edit pages."""
    next(item["Ops"] for item in config.nav if "Ops" in item).extend(sorted(OPS))
    config.edit_uri = config.edit_uri if config.repo_url else None
    return config


def on_files(files, config):
    for page, source in SOURCES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for file in files.documentation_pages():
        file.edit_uri = SOURCES.get(file.src_uri, f"docs/{file.src_uri}")
    return files


def on_page_markdown(markdown, page, config, files):
    uri, source = page.file.src_uri, page.file.edit_uri
    parts = SECTION.split(markdown)  # text, title, text, title, ..., text
    parts[::2] = [relink(text, source, uri, config.repo_url) for text in parts[::2]]
    parts[1::2] = [relink(section(title), "README.md", uri, config.repo_url) for title in parts[1::2]]
    markdown = "".join(parts)
    if uri in OPS:  # the functions first
        markdown = markdown.replace("\n", MEMBERS.format(Path(uri).stem), 1)
    return markdown


def on_post_page(output, page, config):
    """With a repository on GitHub or GitLab the theme would ask their servers for its stars whenever a page is opened."""
    return output.replace('data-md-component="source"', "")


def section(title: str) -> str:
    """What stands under a heading of README, its own headings one level higher."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", (ROOT / "README.md").read_text(), re.M | re.S)
    if found is None:
        raise ValueError(f"README.md has no section {title!r}")
    return re.sub(r"^#(##+ )", r"\1", found[1], flags=re.M)


def relink(text: str, source: str, uri: str, repository: str | None) -> str:
    """Links of ``source`` as the page ``uri`` needs them."""
    pages = {path: page for page, path in SOURCES.items()} | {"README.md": "speed.md"}

    def turned(link: re.Match[str]) -> str:
        words, target, anchor = link.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.startswith("docs/") or path in pages:
            page = pages.get(path, path.removeprefix("docs/"))
            return f"[{words}]({posixpath.relpath(page, posixpath.dirname(uri) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return link[0]  # no link, or a broken one, which mkdocs names
        return f"[{words}]({repository.rstrip('/')}/blob/main/{path}{anchor})" if repository else words

    return LINK.sub(turned, text)


class Settings(griffe.Extension):
    """Classes of models/config.py, whose fields are made by ``opt(default, help)``: with defaults and a list of the helps."""

    def on_class_members(self, *, cls, **kwargs):
        said = ""
        for name, attribute in cls.attributes.items():
            if isinstance(attribute.value, griffe.ExprCall) and str(attribute.value.function) in ("opt", "fixed"):
                attribute.value, words, *_ = attribute.value.arguments
                said += f"\n    {name}: {ast.literal_eval(str(words))}"
        if said:
            cls.docstring.value += f"\n\nAttributes:{said}"
