"""Lets mkdocs show files that lie outside docs/: README, CONTRIBUTING and what pages link to under benchmarks/.

Each gets the place in the site that it has in the repository, those of docs/ one level higher. Links between Markdown
files are written as they lead on GitHub and are turned into the places of the site when a page is read.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def outside() -> list[str]:
    """The files of the repository that are not under docs/ and belong to the site."""
    results = (ROOT / "benchmarks").rglob("*")
    wanted = [path for path in results if path.suffix in {".md", ".json", ".svg", ".py"}]
    return [*PAGES, *sorted(path.relative_to(ROOT).as_posix() for path in wanted)]


def on_files(files: Files, config: Any) -> Files:
    for name in outside():
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its links leading to where files are in the site."""
    here = page.file.src_uri
    home = posixpath.dirname(here if Path(page.file.src_dir) == ROOT else f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(home, link[1]))
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(here) or ".")

    return LINK.sub(moved, markdown)
