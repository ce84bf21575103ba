"""The README is true and short: each command in it runs, and it prints what the README shows."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import PAGES, blocks
from PIL import Image
from programs import PROJECT

from draw_curves import HIGHEST_ACCURACY

README = PAGES["README.md"]
# These flags make a command short, and its data synthetic.
BRIEFLY = ("--max_train_steps=2", "--batch_size=8", "--log_per_iterations=1")
INSTEAD = {
    "run_trainer.py": BRIEFLY,
    "launch": BRIEFLY,
    "cifar10_download_and_extract.py": (
        *("--synthetic", "--synthetic_train_images=100", "--synthetic_test_images=20"),
    ),
}


def commands() -> list[str]:
    """Returns the commands of the README that start one of the project's programs, once each."""
    lines = "\n".join(blocks(README, "sh")).replace("\\\n", " ").replace(" && ", "\n").splitlines()
    in_tables = re.findall(r"^\|.*?\| `(python .*?)`", README, re.M)
    found = [" ".join(line.split()) for line in lines + in_tables]
    return list(dict.fromkeys(line for line in found if line.startswith("python ")))


def lengthened(command: str) -> list[str]:
    """Returns the words of a command, with what makes it short."""
    python, *words = shlex.split(command, comments=True)
    assert python == "python"
    program = words[2] if words[:2] == ["-m", "cifar10_resnet"] else words[0]
    more = () if words[-1] == "--help" else INSTEAD.get(program, ())
    return [sys.executable, *words, *more]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """Returns a copy of the project as it is cloned, with photos for the import command."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    made = shutil.ignore_patterns(".*", "__pycache__", "runs", "savedmodels", "cifar-*")
    shutil.copytree(PROJECT, folder, ignore=made)
    rng = np.random.default_rng(0)
    photos = [f"photos/{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)]
    for file in photos:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / file)
    return folder


def test_the_readme_has_the_commands_that_it_is_about():
    programs = {re.match(r"python (?:-m cifar10_resnet )?(\S+)", line)[1] for line in commands()}
    assert programs == {
        *("cifar10_download_and_extract.py", "run_trainer.py", "run_evaluator.py"),
        *("classify", "import", "plot", "export", "serve", "launch", "draw"),
    }


def test_the_readmes_commands_run_in_their_order(checkout):
    for command in commands():
        words = lengthened(command)
        if "serve" in words:
            assert_serves(words, checkout)
            continue
        done = subprocess.run(words, cwd=checkout, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if "--top=3" in words:
            assert_shown(done.stdout)
    for made in ("photos-bin", "curves.png", "saved/saved_model.pb", "runs/resnet20-fast"):
        assert (checkout / made).exists(), made


def assert_shown(printed: str) -> None:
    """Checks what the first command prints against what the README shows."""
    (shown,) = [block for block in blocks(README, "text") if block.startswith("files/cat.jpg")]
    rows = [re.findall(r"(\w+) +(\d+\.\d\d)%$", text, re.M) for text in (shown, printed)]
    assert [name for name, _ in rows[0]] == [name for name, _ in rows[1]]
    confidences = np.array([[float(value) for _, value in found] for found in rows])
    # Another processor rounds differently.
    np.testing.assert_allclose(confidences[0], confidences[1], atol=0.2)


def assert_serves(words: list[str], checkout: Path) -> None:
    """Checks that a server starts, says where it is, and ends with Ctrl-C."""
    with subprocess.Popen(
        [*words, "--port=0"], cwd=checkout, stdout=subprocess.PIPE, text=True
    ) as server:
        address = next(line for line in server.stdout if "http://" in line)
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 128 + signal.SIGINT, address


def test_the_readme_is_short_and_begins_with_the_two_commands_that_do_all():
    assert 150 <= README.count("\n") <= 220
    assert len(re.sub(r"```.*?```", "", README, flags=re.S).split()) <= 1500
    assert re.findall(r"^make (\w+)", blocks(README, "sh")[0], re.M) == ["demo", "test"]
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(re.findall(r"`?make (\w+)`?", README)) <= {*targets, "on"}


def test_the_readmes_results_are_those_of_the_results_page():
    pages = (README, PAGES["docs/results.md"])
    ours = [dict(re.findall(r"^\| ResNet-(\d+) \| \*\*(\S+?%)\*\*", pages[0], re.M))]
    ours.append(
        dict(re.findall(r"^\| `files/pretrained/resnet(\d+)` \| (\S+%) \|", pages[1], re.M))
    )
    assert len(ours[0]) == 5
    assert ours[0] == ours[1]
    theirs = dict(
        re.findall(r"^\| ResNet-(\d+) \|.*?\|.*?\| (\S+%) \((?:\d+).*?\) \|", pages[0], re.M)
    )
    assert theirs.keys() == ours[0].keys()
    for layers, best in theirs.items():
        documented = re.findall(rf"^\| {layers} \| (?!this).*?\| (\S+?%)[ ,]", pages[1], re.M)
        assert best == max(documented), layers
        assert best == f"{HIGHEST_ACCURACY[int(layers)]:.2f}%"
