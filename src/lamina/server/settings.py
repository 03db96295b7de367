"""Settings of the HTTP server, frozen and validated on construction."""

from __future__ import annotations

from typing import Literal

import msgspec

from lamina.errors import ConfigError

MAX_BODY_BYTES = 4 * 2**20
"""Default bound of a request body: about 700 thousand prompt tokens sent as ids."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how the front end listens. Flag names follow vLLM where the meaning is the same."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: the system chooses; the ready line names it."""
    served_model_name: str | None = None
    """The name that clients send as `model`. None: the last part of the model's path."""
    api_key: str | None = None
    """None: everybody may ask. Health, metrics and version never need a key."""
    max_body_bytes: int = MAX_BODY_BYTES
    vllm_metrics: bool = False
    """Also export the metrics that have a counterpart in vLLM under vLLM's names."""
    shutdown_grace_s: float = 3.0
    """How long requests in progress may go on after SIGINT or SIGTERM."""
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "warning"
    """Of the HTTP server's own log lines; there is no access log."""

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, want: str) -> None:
            if not ok:
                raise ConfigError(f"{field} must be {want}, got {getattr(self, field)!r}")

        need(bool(self.host), "host", "a name or address such as 127.0.0.1 or 0.0.0.0")
        need(0 <= self.port <= 65535, "port", "between 0 and 65535")
        need(self.max_body_bytes >= 1, "max_body_bytes", "at least 1")
        need(self.shutdown_grace_s >= 0, "shutdown_grace_s", "at least 0")
        need(self.served_model_name != "", "served_model_name", "a name, or left out")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key must not be empty; leave it out to serve without a key")
