"""A hook of MkDocs: pages that lie outside docs/, and links that lead out of it.

A page of the repository links to files by relative path, which is what a code host and an editor follow.
The site has only docs/, so this hook adds what is missing, from the files themselves:

- the README as the home page, and CONTRIBUTING, the patch ledger, the changelog and the model card;
- the notebook, as it was committed, its pictures included;
- a page with the text of every source file that a page links to.

No address of a code host is needed, and a link to a file that is not there fails the strict build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
log = get_plugin_logger("links")

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "patches/README.md": "patch_ledger.md",
    "vllm_flow/demo_model/MODEL_CARD.md": "model_card.md",
    "docs/first_steps.ipynb": "first_steps.md",
}
"""Files of the repository that are pages of the site: path -> page, in docs/."""

SOURCES = "source"
"""Folder of the pages that show a source file's text."""

OUTSIDE = re.compile(r"^(?:[a-z]+:|//|#)")
CODE = r"^```.*?^```|^~~~.*?^~~~|(?P<ticks>`+)(?!`).+?(?<!`)(?P=ticks)(?!`)"
TEXT = r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]"
LINK = re.compile(
    rf"{CODE}|(?P<open>{TEXT}\()(?P<target>[^)#\s]+)(?P<rest>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)
"""A link, whose text may hold code; or code, which may hold what looks like a link (no `target` then)."""
ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):(<code>)~?(?:[\w.]+\.)?(\w+)(</code>)")
SHORT = re.compile(r"<code>([^<\n]{1,28})</code>")
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)
LONG_NAME = re.compile(r"<[^>]*>|\b\w{12,}\b")
"""A name that may be wider than its column; or a tag, whose attributes hold names, too."""
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
LANGUAGES = {
    ".py": "python",
    ".json": "json",
    ".toml": "toml",
    ".yml": "yaml",
    ".cff": "yaml",
    ".j2": "jinja",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/, then the source files that any page links to."""
    texts = {}
    for path, page in PAGES.items():
        if path.endswith(".ipynb"):
            text, pictures = notebook(ROOT / path)
            for name, data in pictures.items():
                files.append(File.generated(config, name, content=data))
        else:
            text = (ROOT / path).read_text(encoding="utf-8")
        texts[path] = text
        files.append(File.generated(config, page, content=for_site(text, path)))
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            path = Path(file.abs_src_path).resolve().relative_to(ROOT).as_posix()
            texts[path] = file.content_string
    wanted = {target for path, text in texts.items() for target in targets(text, path)}
    for path in sorted(wanted):
        if is_source(path):
            page = File.generated(
                config,
                source_page(path),
                content=source(path),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of the pages in docs/; those of generated pages are rewritten already."""
    if page.file.abs_src_path is None:
        return markdown
    path = Path(page.file.abs_src_path).resolve().relative_to(ROOT).as_posix()
    return for_site(markdown, path)


def on_page_content(html: str, **_: Any) -> str:
    """References of docstrings, ``:func:`name```, as the name alone; short code, which no line end cuts, marked; and
    where a line may end in the long names of a table."""
    html = SHORT.sub(r'<code class="short">\1</code>', ROLE.sub(r"\1\2\3", html))
    return CELL.sub(lambda cell: LONG_NAME.sub(_breakable, cell[0]), html)


def _breakable(name: re.Match[str]) -> str:
    """A class's name that may be divided before its capitals."""
    return name[0] if name[0].startswith("<") else HUMP.sub("<wbr>", name[0])


def notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the path they have in docs/."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    folder = f"{path.stem}_files"
    pictures = {f"{folder}/{name}": data for name, data in resources["outputs"].items()}
    for name in resources["outputs"]:
        text = text.replace(f"]({name})", f"]({folder}/{name})")
    return text, pictures


def place(target: str, path: str) -> str:
    """The file that a link of the file `path` leads to; both relative to the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), target))


def page_of(path: str) -> str | None:
    """Where a file of the repository is on the site, relative to docs/; None where it is not."""
    if path in PAGES:
        return PAGES[path]
    if is_source(path):
        return source_page(path)
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def is_source(path: str) -> bool:
    """Whether a file of the repository is shown as text on a page of its own."""
    inside = path.startswith("docs/") and not path.endswith(".py")
    return path not in PAGES and not inside and (ROOT / path).is_file()


def source_page(path: str) -> str:
    return f"{SOURCES}/{path}.md"


def source(path: str) -> str:
    """The page that shows a source file."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n{fence}{language}\n{text}\n{fence}\n"


def targets(text: str, path: str) -> set[str]:
    """Files of the repository that a page links to."""
    found = (match["target"] for match in LINK.finditer(text))
    return {place(target, path) for target in found if target and not OUTSIDE.match(target)}


def for_site(text: str, path: str) -> str:
    """The text of the file `path` with its links as the site has them."""
    here = posixpath.dirname(page_of(path) or "")

    def rewritten(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or OUTSIDE.match(target):
            return match[0]
        page = page_of(place(target, path))
        if page is None or not (ROOT / place(target, path)).exists():
            log.warning("%s links to %s, which is not on the site", path, target)
            return match[0]
        return f"{match['open']}{posixpath.relpath(page, here or '.')}{match['rest'] or ''})"

    return LINK.sub(rewritten, text)
