"""The pages in docs/ are true: links lead somewhere, commands have flags that exist, code runs."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import PAGES, anchors, blocks, links
from PIL import Image
from programs import PROJECT, run

from cifar10_resnet.data.synthetic import CLASS_NAMES, make_split


def page_commands(name: str) -> list[str]:
    """Returns the lines of a page's shell commands, each in one line."""
    shell = "".join(blocks(PAGES[name], "sh")).replace("\\\n", " ")
    return shell.replace(" -- ", "\npython ").replace(" && ", "\n").splitlines()


def commands() -> list[list[str]]:
    """Returns the words of all commands that start one of the project's programs."""
    words = [shlex.split(line, comments=True) for name in PAGES for line in page_commands(name)]
    words = [line for line in words if line[:1] == ["python"] and line[1] != "-c"]
    return [line[3:] if line[1:3] == ["-m", "cifar10_resnet"] else line[1:] for line in words]


PROGRAMS = sorted({command[0] for command in commands()})


@functools.cache
def flags_in_help(program: str) -> set[str]:
    return set(re.findall(r"--(?:\[no\])?(\w+)", run(program, "--help").stdout))


def test_the_pages_have_commands():
    assert {"run_trainer.py", "run_evaluator.py", "export", "serve", "launch"} <= set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_commands_have_flags_that_exist(program):
    words = [word for command in commands() if command[0] == program for word in command[1:]]
    flags = {re.match(r"--(\w+)", word)[1] for word in words if word.startswith("--")}
    known = flags_in_help(program)
    assert {flag if flag in known else flag.removeprefix("no") for flag in flags} <= known


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(name):
    folder = (PROJECT / name).parent
    for link in links(PAGES[name]):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(folder / path)) if path else PROJECT / name
        assert target.exists(), f"{name} links to {link}"
        if anchor:
            page = str(target.relative_to(PROJECT))
            assert anchor in anchors(PAGES[page]), f"{name} links to {link}"


@pytest.mark.parametrize("name", PAGES)
def test_the_text_for_a_picture_begins_with_its_kind_and_has_25_words_at_most(name):
    page = PAGES[name]
    found = re.findall(r"!\[(.*?)\]\(|<img[^>]*?alt=\"(.*?)\"", page, re.S)
    assert len(found) == len(re.findall(r"!\[|<img", page))
    for text in map("".join, found):
        assert len(text.split()) <= 25, text
        assert re.match(r"(Line charts?|Bar charts?|Diagram|Screenshot|Photo): ", text), text


def test_the_makefiles_commands_have_flags_that_exist():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^\t\$\(RUN\) (?:-m cifar10_resnet )?(\w+(?:\.py)?) (.*)$", makefile, re.M)
    assert {"run_trainer.py", "run_evaluator.py", "export", "draw"} <= {name for name, _ in found}
    for program, words in found:
        assert set(re.findall(r"--(\w+)", words)) <= flags_in_help(program)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Returns a new folder with links to the project's files, and with a user's photos."""
    for path in PROJECT.iterdir():
        if path.suffix == ".py" or path.name in ("cifar10_resnet", "docs", "files"):
            (tmp_path / path.name).symlink_to(path)
    for i, (pixels, label) in enumerate(zip(*make_split("train", 60), strict=True)):
        file = tmp_path / "photos" / CLASS_NAMES[label] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((96, 80)).save(file)
    file.rename(tmp_path / "new-photo.jpg")
    return tmp_path


def test_the_marked_commands_run(checkout):
    script = "\n".join(block for page in PAGES.values() for block in blocks(page, "sh", True))
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=checkout,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for printed in ("runs/look/model.ckpt-157", "wrote report.html", "drew curves.png"):
        assert printed in done.stdout
    assert (checkout / "report.html").stat().st_size > 100_000
    assert re.search(r"^new-photo\.jpg +\w+ +\d+\.\d\d%$", done.stdout, re.M)
    assert (checkout / "exported" / "saved_model.pb").exists()


def test_every_page_begins_with_the_question_that_it_answers():
    for name, page in PAGES.items():
        if name.startswith("docs/"):
            assert re.match(r"# .+\n\n[A-Z].*\?\n", page), name


def test_the_way_from_photos_to_a_classifier_is_in_one_place_and_sets_its_length():
    lines = [line for name in PAGES for line in page_commands(name) if "photos-bin" in line]
    trained = [line for line in lines if "run_trainer.py" in line]
    assert len(trained) == 1
    assert {"--batch_norm_decay=0.9", "--train_epochs=54"} <= set(trained[0].split())


def test_the_marked_code_runs(checkout, write_cifar10):
    from cifar10_resnet import checkpoints
    from cifar10_resnet.serving import export

    write_cifar10()
    shipped = checkpoints.find(str(PROJECT / "files" / "pretrained" / "resnet20"))
    export.export_saved_model(shipped, str(checkout / "savedmodels" / "resnet20"))
    for page in ("README.md", "docs/export_and_serve.md", "docs/python.md"):
        code = "\n".join(blocks(PAGES[page], "python", marked=True))
        assert code, page
        (checkout / "page.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "page.py"], cwd=checkout, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if page == "README.md":
            assert done.stdout == "(1, 10)\n"
        if page == "docs/export_and_serve.md":
            assert re.match(r"\[b'cat'\] \[0\.97\d*\]\n$", done.stdout), done.stdout
    assert done.stdout.startswith("(1, 10)\n")
    assert re.search(r"^loss \d\.\d{3}, accuracy \d+\.\d%$", done.stdout, flags=re.M)
    step = checkpoints.find(str(checkout / "runs" / "ten-steps")).step
    assert step == 10
