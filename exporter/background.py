"""Work beside the main thread that nobody has to wait for: after an error or Ctrl-C the process ends without it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Background(Generic[T]):
    """`function(*arguments)`, begun at once in a daemon thread (an executor's threads would be waited for)."""

    def __init__(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> None:
        self._outcome: list[T] = []
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._outcome.append(function(*arguments, **named))
            except BaseException as error:  # result() raises it where it is waited for
                self._error = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def result(self) -> T:
        """What the function returned, once it has; what it raised is raised here."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._outcome[0]
