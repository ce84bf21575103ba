"""Reads the CSV file of a run: its comments, its columns and its pace."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar10_resnet.errors import UserError

COLUMNS = (
    *("step", "epoch", "train_loss", "train_accuracy"),
    *("test_accuracy", "learning_rate", "seconds"),
)


class RunCsv(NamedTuple):
    """A file's `# name: value` comments, and its columns with `nan` for an empty cell."""

    comments: dict[str, str]
    columns: dict[str, np.ndarray]

    @property
    def accuracy(self) -> float:
        """Returns the evaluator's test accuracy at the end, or `nan` if it is missing."""
        return float(self.comments.get("test_accuracy", "nan"))

    @property
    def epochs(self) -> np.ndarray:
        """Returns the epochs at each row. The file lacks them in the rows of evaluations."""
        steps, epochs = self.columns["step"], self.columns["epoch"]
        written = np.isfinite(epochs) & (steps > 0)
        return steps * np.median(epochs[written] / steps[written]) if written.any() else epochs

    @property
    def minutes(self) -> np.ndarray:
        """Returns the minutes of training at each row, at the run's median pace.

        So it matters little whether the machine did other things for a while, or halted the run.
        """
        steps, seconds = (
            np.insert(self.columns[name][np.isfinite(self.columns["train_loss"])], 0, 0)
            for name in ("step", "seconds")
        )
        pace = np.median(np.diff(seconds) / np.diff(steps)) if len(steps) > 1 else np.nan
        return self.columns["step"] * pace / 60


def read(file: Path) -> RunCsv:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}.") from error
    comments = [line[2:].partition(": ") for line in lines if line.startswith("# ")]
    numbered = [(n, line) for n, line in enumerate(lines, 1) if not line.startswith("#")]
    if not numbered or tuple(numbered[0][1].split(",")) != COLUMNS:
        raise UserError(f"{file} does not begin with the columns {','.join(COLUMNS)}.")
    rows = [_read_row(line, f"{file}, line {number},") for number, line in numbered[1:]]
    table = np.array(rows).reshape(-1, len(COLUMNS))
    columns = dict(zip(COLUMNS, table.T, strict=True))
    if not (np.diff(columns["step"]) >= 0).all():
        raise UserError(f"{file} has lines whose steps are not in order.")
    return RunCsv({name: value for name, _, value in comments}, columns)


def _read_row(line: str, where: str) -> list[float]:
    cells = line.split(",")
    if len(cells) != len(COLUMNS):
        raise UserError(f"{where} has {len(cells)} cells where there are {len(COLUMNS)} columns.")
    try:
        row = [float(cell) if cell.strip() else np.nan for cell in cells]
    except ValueError as error:
        raise UserError(f"{where} has a cell that is not a number: {error}.") from error
    for name, value in zip(COLUMNS, row, strict=True):
        if name.endswith("accuracy") and not (np.isnan(value) or 0 <= value <= 1):
            raise UserError(f"{where} has the {name} {value:g}, which is not between 0 and 1.")
    return row
