"""Files that the place where the repository is hosted reads, and links between pages."""

import re
from pathlib import Path

import pytest
import yaml

import i2v_kernels

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PLACES = "*.md", "docs/**/*.md", "i2v_kernels/**/README.md", "bench/**/README.md"
PAGES = [path for place in PLACES for path in sorted(ROOT.glob(place))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_versions_agree():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = dict(re.findall(r'^(name|license) = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M))
    assert cited["version"] == i2v_kernels.__version__  # which pyproject.toml reads
    assert cited["license"] == project["license"] and cited["title"] == project["name"]
    assert f"i2v-kernels ~= {i2v_kernels.__version__}`" in (ROOT / "docs/installation.md").read_text()
    assert f"## {i2v_kernels.__version__} " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    for part in form["body"]:
        assert part["type"] == "textarea" and part["attributes"]["label"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


@pytest.mark.parametrize(("form", "command"), [("bug", ""), ("performance", "python -m bench")])
def test_issue_forms_ask_for_what_tells_most(form, command):
    parts = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]
    asked = " ".join(part["attributes"].get("description", "") for part in parts if part.get("validations", {}).get("required"))
    assert "`python -m i2v_kernels.info`" in asked and command in asked
