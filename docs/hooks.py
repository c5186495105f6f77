"""MkDocs' hooks: the site has the repository's own texts, and an API page for each package that mkdocs.yml names.

A file outside docs/ that a page links to has the same path on the site, and docs/ is the site's root: so links need no
more than another beginning. A link to a folder becomes its text.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API's pages, the texts of the repository's root, and all that these and the pages of docs/ link to."""
    for package in re.findall(r"api/(\w+)\.md", str(config.nav)):
        files.append(File.generated(config, f"api/{package}.md", content=f"# pbe.{package}\n\n::: pbe.{package}\n"))
    queue = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    seen = set(queue)
    while queue:
        path = queue.pop()
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else ""
        found = {(path.parent / link).resolve() for _, link, _ in LINK.findall(text)}
        found = {file for file in found if file.is_file() and file.is_relative_to(ROOT)} - seen
        seen |= found
        queue += sorted(found)
        if path.is_relative_to(DOCS):
            continue
        if path.suffix == ".md":
            files.append(File.generated(config, site_path(path), content=with_site_links(text, path)))
        else:
            files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The text of a page of docs/ with the site's links; the others have them."""
    return markdown if page.file.generated_by else with_site_links(markdown, Path(page.file.abs_src_path or ""))


def site_path(path: Path) -> str:
    """Where the site has a file of the repository."""
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


def with_site_links(text: str, path: Path) -> str:
    """The text of a file with links that hold on the site; those that lead nowhere stay, for MkDocs to complain of."""
    up = "../" * site_path(path).count("/")

    def on_site(link: re.Match[str]) -> str:
        label, target, anchor = link[1], (path.parent / link[2]).resolve(), link[3] or ""
        if target.is_dir():
            return label
        return f"[{label}]({up}{site_path(target)}{anchor})" if target.is_relative_to(ROOT) else link[0]

    return LINK.sub(on_site, text)
