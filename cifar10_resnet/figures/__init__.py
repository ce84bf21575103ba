"""Plots and diagrams, which Matplotlib draws."""

import os

from cifar10_resnet.errors import UserError

os.environ["MPLBACKEND"] = "agg"  # The user's may need a screen, or be unknown to Matplotlib.
try:
    import matplotlib  # noqa: F401
except OSError as error:
    why = "Matplotlib has no writable folder for its cache. Set MPLCONFIGDIR to one."
    raise UserError(why) from error
