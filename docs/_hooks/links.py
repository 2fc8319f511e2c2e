"""Links out of the docs folder, which are written for a reader of the repository, work on the site too.

A linked file (a figure, a table of results, an example) is copied to the same path on the site, and a Markdown file
becomes a page. A link to a folder becomes its text, because a site shows no folders. A link to what does not exist is
left alone, and MkDocs then reports it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((\.\.?/[^)\s#]+)(#[^)\s]*)?((?:\s+\"[^\"]*\")?)\)")
_CODE = re.compile(r"(```.*?```|~~~.*?~~~|``.*?``|`[^`\n]*`)", re.S)


def _prose(text: str) -> list[tuple[bool, str]]:
    """The text in pieces, each with whether it is prose, where links count, and not code."""
    # A split by one group gives prose and code in turn.
    return [(i % 2 == 0, piece) for i, piece in enumerate(_CODE.split(text))]


def _outside(link: str, source: Path, config: MkDocsConfig) -> Path | None:
    """The file or folder of the repository, outside of the docs, that a link in ``source`` leads to."""
    target = (source.parent / link).resolve()
    docs, root = Path(config.docs_dir).resolve(), Path(config.config_file_path).resolve().parent
    inside = target.is_relative_to(root) and not target.is_relative_to(docs)
    return target if inside and target.exists() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).resolve().parent
    waiting = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    while waiting:  # a Markdown file that becomes a page has links of its own
        source = waiting.pop()
        for prose, piece in _prose(source.read_text(encoding="utf-8")):
            for link in _LINK.finditer(piece) if prose else ():
                target = _outside(link[3], source, config)
                if target is None or target.is_dir():
                    continue
                uri = target.relative_to(root).as_posix()
                if uri == "README.md" or files.get_file_from_path(uri):
                    continue
                files.append(File.generated(config, uri, abs_src_path=str(target)))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    root = Path(config.config_file_path).resolve().parent
    source = Path(page.file.abs_src_path or "")
    here = posixpath.dirname(page.file.src_uri)

    def written(link: re.Match[str]) -> str:
        picture, text, path, anchor, title = (part or "" for part in link.groups())
        target = _outside(path, source, config)
        if target is None:
            return link[0]
        uri = target.relative_to(root).as_posix()
        if uri == "README.md":
            uri, anchor = "index.md", ""
        if files.get_file_from_path(uri) is None:
            return text
        return f"{picture}[{text}]({posixpath.relpath(uri, here or '.')}{anchor}{title})"

    return "".join(_LINK.sub(written, piece) if prose else piece for prose, piece in _prose(markdown))
