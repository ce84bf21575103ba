"""Files that the programs write: whole or not at all, and only files become files."""

import os
import threading

import pytest
from programs import run_code

import output_files
from errors import UserError


def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "scores.json"
    for content in (b"first", b"second"):
        output_files.refuse_unwritable(str(file))
        output_files.write(str(file), content)
        assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "latest.html").symlink_to("there/report.html")
    for content in (b"first", b"second"):
        output_files.refuse_unwritable(str(tmp_path / "latest.html"))
        output_files.write(str(tmp_path / "latest.html"), content)
        assert (tmp_path / "latest.html").is_symlink()
        assert (tmp_path / "there" / "report.html").read_bytes() == content
    assert os.listdir(tmp_path / "there") == ["report.html"]


def test_a_link_into_a_folder_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "latest.html").symlink_to("nowhere/report.html")
    with pytest.raises(UserError, match="nowhere"):
        output_files.refuse_unwritable(str(tmp_path / "latest.html"))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    output_files.refuse_unwritable(str(pipe))
    output_files.write(str(pipe), b"scores")
    reader.join()
    assert read == [b"scores"]
    assert pipe.is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_standard_output_can_be_named_as_a_file(tmp_path):
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    code = "import sys, output_files as o; o.refuse_unwritable(sys.argv[1]); "
    code += "o.write(sys.argv[1], b'scores')"
    assert run_code(code, tmp_path / "stdout").stdout == "scores"
    assert (tmp_path / "stdout").is_symlink()
