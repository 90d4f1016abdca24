"""A hook of mkdocs: pages at the root of the checkout become pages of the site, and links, which
are written for a code host, lead within it. What the site does not have stays as text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LINK = re.compile(r"\[((?:!\[[^\]]*\]\([^)]*\)|[^\[\]])*)\]\(([^)\s]+)\)")


def on_files(files: Files, config) -> Files:
    """Adds the pages of the root."""
    for name, path in ROOT.items():
        text = Path(config.config_file_path).with_name(path).read_text("utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """The page with links that lead within the site."""
    places = {
        ROOT.get(file.src_uri, f"docs/{file.src_uri}"): file.src_uri
        for file in files
        if file.inclusion.is_included()
    }
    here = posixpath.dirname(ROOT.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    back = posixpath.dirname(page.file.src_uri)

    def link(found: re.Match) -> str:
        text, target = LINK.sub(link, found[1]), found[2]
        if re.match(r"\w+:|#", target):
            return f"[{text}]({target})"
        path, mark, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(here, path))
        if (place := places.get(path)) is None:  # mkdocs warns of what is nowhere
            exists = Path(config.config_file_path).parent.joinpath(path).exists()
            return text if exists else found[0]
        return f"[{text}]({posixpath.relpath(place, back or '.')}{mark}{anchor})"

    return "".join(
        part if part.startswith("```") else LINK.sub(link, part) for part in FENCED.split(markdown)
    )
