"""How the programs tell of a mistake: one sentence on stderr, exit status 1, no traceback."""

import functools
import os
import signal
import sys
from collections.abc import Callable

from terminal import RED, emphasised


class UserError(Exception):
    """Something the user can mend. Its text says what is wrong, where, and what to do next."""


def exits_with_a_sentence(main: Callable[..., int | None]) -> Callable[..., int | None]:
    """Wraps a program's `main`: a UserError or Ctrl-C ends it in a sentence, a bug does not."""

    @functools.wraps(main)
    def guarded(*args, **kwargs):
        try:
            return main(*args, **kwargs)
        except UserError as error:
            tell(error)
            return 1
        except KeyboardInterrupt:
            # Who has something to lose by Ctrl-C, as a training in its steps, handles it itself.
            sentence = "interrupted; nothing is lost: start the same command again."
            print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # whoever read the output has gone, as in `… | head`: end as quietly as other programs
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE

    return guarded


def tell(error: UserError) -> None:
    """Writes an error's sentence to stderr."""
    label = emphasised("error:", sys.stderr, RED)
    print(f"{os.path.basename(sys.argv[0])}: {label} {error}", file=sys.stderr)
