"""The texts are plain English: none of the phrases in banned_phrases.txt is in them.

A line with "plain: ok" is exempt.
"""

import ast
import importlib
import re
import tokenize
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path

import pytest
from pages import PAGES, sentences
from programs import PROGRAMS, PROJECT

from cifar10_resnet.__main__ import first_line
from cifar10_resnet.cli.flags import explanation, groups_of

RULES = [
    (re.compile(rule, re.I | re.M), better)
    for line in Path(__file__).with_name("banned_phrases.txt").read_text("utf-8").splitlines()
    if "\t" in line
    for rule, better in [line.split("\t")]
]
PYTHON = sorted([*PROJECT.glob("*.py"), *(PROJECT / "cifar10_resnet").rglob("*.py")])
HTML = sorted((PROJECT / "cifar10_resnet").rglob("*.html"))


def assert_plain(texts: Iterator[str] | list[str]) -> None:
    """Checks that no text has a banned phrase."""
    found = [
        f"{match[0]!r} -> {better}: …{text[max(0, match.start() - 40) : match.end() + 40]}…"
        for text in texts
        for rule, better in RULES
        for match in rule.finditer(text)
    ]
    assert not found, "\n".join(found)


def paragraphs(page: str) -> Iterator[str]:
    """Returns the paragraphs of a page in Markdown, without code."""
    page = re.sub(r"```.*?```", "", page, flags=re.S)
    page = "\n".join(line for line in page.splitlines() if "plain: ok" not in line)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", page))
    for paragraph in re.split(r"\n\s*\n", page):
        yield " ".join(paragraph.split())


def messages(file: Path) -> Iterator[str]:
    """Returns the strings of two or more words in a module, except docstrings."""
    source = file.read_text("utf-8")
    tree, skipped = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= {id(node.body[0].value)} if ast.get_docstring(node) else set()
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            parts = [p.value if isinstance(p, ast.Constant) else "VALUE" for p in node.values]
            yield "".join(parts)
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        is_exempt = is_text and "plain: ok" in source.splitlines()[node.end_lineno - 1]
        if is_text and not is_exempt and id(node) not in skipped and len(node.value.split()) > 1:
            yield node.value


def errors(file: Path) -> Iterator[str]:
    """Returns the texts of a module's user errors that are not about an argument."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        is_error = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"
        if is_error and len(node.args) == 1:
            yield ast.unparse(node.args[0]).lstrip("rf").strip("'\"")


def docstrings_and_comments(file: Path) -> Iterator[str]:
    """Returns the paragraphs of a module's docstrings, and its comments."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from paragraphs(ast.get_docstring(node) or "")
    with open(file, "rb") as lines:
        for token in tokenize.tokenize(lines.readline):
            if token.type == tokenize.COMMENT and "plain: ok" not in token.string:
                yield re.sub(r"`[^`]*`", "CODE", token.string.lstrip("# "))


@pytest.mark.parametrize("name", sorted(PAGES))
def test_pages_are_plain(name):
    assert_plain(paragraphs(PAGES[name]))


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.stem)
def test_messages_are_plain(file):
    assert_plain(messages(file))


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.stem)
def test_errors_begin_with_what_was_typed_or_with_the_file(file):
    assert [text for text in errors(file) if re.match(r"(cannot|there|name|give) ", text)] == []


@pytest.mark.parametrize("folder", ["cifar10_resnet", "tests", "benchmarks", "docs"])
def test_docstrings_and_comments_are_plain(folder):
    files = [*PROJECT.glob("*.py"), *(PROJECT / folder).rglob("*.py")]
    assert_plain(text for file in files for text in docstrings_and_comments(file))


def without_choices(item: Field) -> str:
    """Returns a flag's help without the list of its choices, because these are not prose."""
    return re.sub("^<.*?>", "", explanation(item))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_plain_and_short(program):
    module = PROGRAMS[program]
    groups = groups_of(importlib.import_module(module).Settings)
    items = [item for group in groups.values() for item in group]
    assert_plain([first_line(module), *groups, *map(without_choices, items)])
    for item in items:
        assert len(item.metadata["help"].split()) <= 12, item.name
        assert explanation(item)[-1] != "."


@pytest.mark.parametrize("file", HTML, ids=lambda file: file.stem)
def test_web_pages_are_plain(file):
    page = re.sub(r"<style.*?</style>", "", file.read_text("utf-8"), flags=re.S)
    shown, script = (
        re.findall(r">([^<>]{8,})<", page),
        re.findall(r"[\"`]([^\"`\n]{12,})[\"`]", page),
    )
    assert_plain([" ".join(text.split()) for text in shown + script if " " in text.strip()])


@pytest.mark.parametrize("name", sorted(PAGES))
def test_no_sentence_is_longer_than_25_words(name):
    assert [each for each in sentences(PAGES[name]) if len(each.split()) > 25] == []
