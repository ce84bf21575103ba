"""Reads the pages and returns their parts: blocks of code, links, sentences."""

import re

from programs import PROJECT

FILES = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "files/README.md"),
    "files/pretrained/MODEL_CARD.md",
    *("benchmarks/README.md", "benchmarks/accuracy/README.md"),
    *sorted(str(file.relative_to(PROJECT)) for file in (PROJECT / "docs").glob("*.md")),
)
PAGES = {name: (PROJECT / name).read_text("utf-8") for name in FILES}


def blocks(page: str, language: str, marked: bool = False) -> list[str]:
    """Returns a page's blocks in a language, or only the blocks that are marked to be run."""
    mark = "<!-- run -->\n" if marked else ""
    return re.findall(rf"^{mark}```{language}\n(.*?)^```", page, flags=re.M | re.S)


def prose(page: str) -> str:
    """Returns a page without its blocks of code and its comments."""
    return re.sub(r"^```.*?^```|<!--.*?-->", "", page, flags=re.M | re.S)


def sentences(page: str) -> list[str]:
    """Returns the sentences of a page's text, without headings and tables."""
    text = re.sub(r"^(#|\|).*$", "", prose(page), flags=re.M)
    text = re.sub(r"<img.*?>|!\[.*?\]\(.*?\)", "", text, flags=re.S)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|^- ", text, flags=re.M)
    found = (re.split(r"(?<=[.!?:])\s+(?=[^a-z])", " ".join(part.split())) for part in paragraphs)
    return [sentence for part in found for sentence in part if sentence]


def anchors(page: str) -> set[str]:
    """Returns the anchors that a page's headings have, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    """Returns where a page's links and images lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'src="(.*?)"', page)
