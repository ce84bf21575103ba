"""Plots and diagrams, which Matplotlib draws."""

from cifar10_resnet.errors import UserError

try:
    import matplotlib  # noqa: F401
except OSError as error:
    why = "Matplotlib has no writable folder for its cache. Set MPLCONFIGDIR to one."
    raise UserError(why) from error
