"""CITATION.cff says of the project what its metadata say, and docs/citing.md names the papers whose rules there are."""

from __future__ import annotations

import re
from pathlib import Path

from auglocal_ext import __version__, rules

ROOT = Path(__file__).resolve().parents[1]


def test_citation_file_agrees_with_the_project():
    text = (ROOT / "CITATION.cff").read_text()
    fields = dict(re.findall(r"^([\w-]+): (.+)$", text, flags=re.M))
    metadata = (ROOT / "pyproject.toml").read_text()
    assert fields["version"] == __version__
    assert fields["title"] == re.search(r'^name = "(.+)"', metadata, flags=re.M)[1]
    assert fields["license"] == re.search(r'^license = "(.+)"', metadata, flags=re.M)[1]
    authors = re.search(r"^authors:\n((?:  - name: .+\n)+)", text, flags=re.M)[1]
    assert re.findall(r"name: (.+)", authors) == re.findall(r'authors = \[\{ name = "(.+)" \}\]', metadata)
    assert fields["cff-version"] and fields["message"]  # which the format asks for


def test_every_rule_has_its_paper():
    text = (ROOT / "docs" / "citing.md").read_text()
    entries = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", text, flags=re.M | re.S)
    assert len(entries) == text.count("```bibtex") and len({key for key, _ in entries}) == len(entries)
    for key, body in entries:
        names = re.findall(r"^  (\w+) += \{.*\},?$", body, flags=re.M)
        assert {"title", "author", "year"} <= set(names) and len(names) == body.count("\n"), key
    for name in {"AugLocal", "ContSup", "InfoPro", "PredSim", "DGL", "MAN"}:
        assert name in {each.__name__ for each in rules.RULES.values()}
        assert re.search(rf"^{name}\b", text, flags=re.M)
