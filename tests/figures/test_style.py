"""A failed plot leaves no half-written file."""

import errno
import os
import re

import pytest

from cifar10_resnet.errors import UserError
from cifar10_resnet.figures import style


def test_a_plot_that_cannot_be_written_is_a_one_line_error(tmp_path):
    file = tmp_path / "missing" / "picture.png"
    told = re.escape(f"{file} cannot be written: No such file or directory.")
    with pytest.raises(UserError, match=told), style.picture(file, height=100, title=""):
        pass


def test_a_picture_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fill_the_disk(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "picture.png"
    file.write_bytes(b"the old one")
    monkeypatch.setattr(os, "fsync", fill_the_disk)
    with (
        pytest.raises(UserError, match="No space left"),
        style.picture(file, height=100, title=""),
    ):
        pass
    assert file.read_bytes() == b"the old one"
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
