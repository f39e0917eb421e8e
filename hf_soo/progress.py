"""Where a long job stands: a bar on a terminal; in the log of a batch job, where nobody looks on, a line a minute."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

_SECONDS = 60.0  # between two lines
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):  # type: ignore[misc]
    """tqdm's bar on stderr, or its line; with ``TQDM_DISABLE=1`` neither. A job of less than a minute has no line."""

    monitor_interval = 0  # no thread beside what is measured

    def __init__(self, **settings: Any) -> None:
        """As tqdm's, by name."""
        self._said = None if sys.stderr.isatty() else time.monotonic()
        if self._said is not None:
            settings |= {"bar_format": _LINE, "leave": False}
        super().__init__(**{"dynamic_ncols": True, "miniters": 1, **settings})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Show the bar, or write a line when it is time for one."""
        if self._said is None:
            return bool(super().display(msg, pos))
        if msg is None and time.monotonic() - self._said >= _SECONDS:
            self._said = time.monotonic()
            self.fp.write(f"{self}\n")
        return False

    def clear(self, nolock: bool = False) -> None:
        """Take the bar off the terminal; lines stay."""
        if self._said is None:
            super().clear(nolock)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """Print beside the bars, at once."""
        super().write(s, file, end, nolock)
        (file or sys.stdout).flush()

    def say(self, **values: float | None) -> None:
        """Put numbers beside it: ``say(loss=2.1)``; None: not known yet."""
        known = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items() if value is not None)
        self.set_postfix_str(", ".join(known), refresh=False)
