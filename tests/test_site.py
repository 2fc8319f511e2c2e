"""The site's navigation, links and API reference are complete. MkDocs is not needed; its own build checks the rest."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# What other rooms of the package take from a room, and no user: not in the API reference.
INTERNAL = {
    "layers": {
        "Handed",
        "SAY_LAYOUT",
        "LayoutChoice",
        "ResidualFinder",
        "evaluating",
        "first_leaves",
        "has_parameters",
        "is_elementwise",
        "leaves",
        "nesting_hint",
        "observe",
        "probe_input",
        "split_readout",
        "starts_layer",
    },
    "distributed": {
        "Average",
        "Form",
        "Mesh",
        "ParameterEdge",
        "Replicas",
        "Shards",
        "Stage",
        "Stored",
        "agree",
        "balanced_cuts",
        "checked_cuts",
        "crossing_inputs",
        "cut_numbers",
        "everyone",
        "group_like",
        "mesh_groups",
        "shapes_of",
        "together",
        "write",
    },
    "nn": {
        "own_part",
        "Deferred",
        "gathering",
        "give_memory",
        "in_process_group",
        "is_sharded",
        "must_be_eager",
        "refuse_sharding",
        "shard_like",
        "sharded",
        "waiting_for",
    },
}
PACKAGES = (
    "analysis",
    "auxiliary",
    "distributed",
    "layers",
    "memory",
    "models",
    "nn",
    "ops",
    "planning",
    "rules",
    "step",
    "tasks",
    "training",
)


def prose(text: str) -> str:
    """The text without its code, in which a bracket is no link."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def test_every_page_is_in_the_navigation():
    nav = set(re.findall(r"^ +- (?:.+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES}
    assert nav == pages, f"only in mkdocs.yml: {sorted(nav - pages)}; only in docs: {sorted(pages - nav)}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", link) or link.startswith("#"):
            continue
        target = (page.parent / link.split("#")[0]).resolve()
        assert target.exists() and target.is_relative_to(ROOT), f"{page.relative_to(ROOT)} links to {link}"


def documented() -> list[str]:
    return [name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)]


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_public_name_is_in_the_api_reference(package):
    module = importlib.import_module("auglocal_ext" + (f".{package}" if package else ""))
    entries = {name.rsplit(".", 1)[1] for name in documented()}
    missing = set(module.__all__) - {"__version__"} - INTERNAL.get(package, set()) - entries
    assert not missing, f"no page of docs/api has `::: {module.__name__}.NAME` for {sorted(missing)}"


def test_every_entry_of_the_api_reference_exists():
    names = documented()
    assert len(names) == len(set(names))
    for name in names:
        parent, _, attribute = name.rpartition(".")
        found = importlib.import_module(parent)
        assert hasattr(found, attribute), f"{parent} has no {attribute}"
