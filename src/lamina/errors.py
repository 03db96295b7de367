"""Every error that Lamina raises on purpose.

LaminaError
├── ConfigError            a setting is wrong: names field, value and remedy
├── RequestError           a request is wrong: names the field; the server answers 400
├── CheckpointError        a model folder or weight file cannot be read
├── ConversionError        a model cannot be cut: names the layer and the reason
├── CapacityError          not enough memory, pages or queue places
│   └── QueueFull          the waiting queue is at its bound; the server answers 429
├── EngineDead             the engine process is gone or no longer serves
└── TransportError         a peer cannot be reached or does not speak our protocol
    ├── PeerLost           the peer died, closed its connection or stopped its heartbeat
    ├── DeadlineExceeded   a wait ran past its deadline
    └── ProtocolMismatch   wrong secret, version, fingerprint, message or length
"""

from __future__ import annotations


class LaminaError(Exception):
    """Base of all errors that Lamina raises on purpose."""


class ConfigError(LaminaError):
    """A setting is wrong. The message names the field, the value and what to do."""


class RequestError(LaminaError):
    """A request is wrong. `field` names the offending field; None: the whole body."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(LaminaError):
    """A model folder or one of its files is missing, truncated or unreadable."""


class ConversionError(LaminaError):
    """A model cannot be cut at its attention ops. `layer` is None when the reason is model-wide."""

    def __init__(self, reason: str, *, model: str, layer: int | None = None) -> None:
        where = f"{model}, layer {layer}" if layer is not None else model
        super().__init__(f"cannot convert {where}: {reason}")
        self.reason = reason
        self.model = model
        self.layer = layer


class CapacityError(LaminaError):
    """Not enough memory, pages or places for what was asked."""


class QueueFull(CapacityError):
    """The waiting queue is at its bound; the caller should retry later."""


class EngineDead(LaminaError):
    """The engine is gone or cannot serve any more; the message says why."""


class TransportError(LaminaError):
    """Something went wrong between two processes.

    `peer` is the other side's name, `reason` the message without it.
    """

    def __init__(self, reason: str, *, peer: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.reason = reason
        self.peer = peer


class PeerLost(TransportError):
    """The peer died, closed its connection or stopped sending heartbeats."""


class DeadlineExceeded(TransportError):
    """A wait for the peer ran past its deadline; the peer may still be alive."""


class ProtocolMismatch(TransportError):
    """The peer sent a wrong secret, version, fingerprint, message or length."""
