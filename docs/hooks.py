"""Steps of the site's build, which mkdocs.yml names: links out of docs/ work in the site as they do on GitHub.

A page may link to any file of the repository by a relative path. For a Python file the site gets a page that shows it,
for CONTRIBUTING.md and CHANGELOG.md a page each, and for anything else, such as a picture, a copy. README.md stands for
the site's own front page.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
TOP_LEVEL = ("CONTRIBUTING.md", "CHANGELOG.md")
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")
"""The path, from the top folder, of a Markdown link or picture that leaves docs/."""


def place(path: str) -> str:
    """Where the site has a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path in TOP_LEVEL:
        return path.lower()
    return f"repository/{path}.md" if path.endswith(".py") else f"repository/{path}"


def as_in_docs(text: str) -> str:
    """A document of the top folder with links as if it lay in docs/."""
    return re.sub(r"(?<=\]\()(?!\w+:|#)(?:docs/)?", lambda match: "" if match[0] else "../", text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    texts = [Path(file.abs_src_path).read_text(encoding="utf-8") for file in files.documentation_pages()]
    for name in TOP_LEVEL:
        texts.append(as_in_docs((ROOT / name).read_text(encoding="utf-8")))
        files.append(File.generated(config, place(name), content=texts[-1]))
    for path in sorted({path for text in texts for path in OUTSIDE.findall(text)} - {"README.md", *TOP_LEVEL}):
        source = ROOT / path
        if not source.is_file():
            continue  # the strict build names the page with the broken link
        if path.endswith(".py"):
            code = f"# {path}\n\n```` python\n{source.read_text(encoding='utf-8')}\n````\n"
            files.append(File.generated(config, place(path), content=code))
        else:
            files.append(File.generated(config, place(path), abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return OUTSIDE.sub(lambda match: place(match[1]), markdown)
