"""How a link remembers that it failed: the first error stays and is raised by every later call."""

from __future__ import annotations

import threading

from lamina.errors import TransportError


class Failure:
    """The error that a link failed with. Any thread may set it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._error: TransportError | None = None

    @property
    def is_set(self) -> bool:
        return self._error is not None

    def set(self, error: TransportError) -> bool:
        """Fail with `error` unless the link failed before; True if it was the first."""
        with self._lock:
            if self._error is not None:
                return False
            self._error = error
            return True

    def check(self) -> None:
        """Raise the error, as a new object so that tracebacks of earlier raises do not pile up."""
        error = self._error
        if error is not None:
            raise type(error)(error.reason, peer=error.peer)
