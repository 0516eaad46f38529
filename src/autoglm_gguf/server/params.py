"""`ServerParams`: where the server listens, whom it trusts, and how much it takes.

Values only. Checks that nobody opens a server to a network by accident.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, fields
from typing import Literal, TypeAlias

from autoglm_gguf.units import format_bytes

ConstrainActions: TypeAlias = Literal["auto", "on", "off"]
CONSTRAIN_ACTIONS: tuple[ConstrainActions, ...] = ("auto", "on", "off")
KEY_VARIABLE = "AUTOGLM_GGUF_API_KEY"
PORTS = {"http": 80, "https": 443}
"""Of an address that names none."""
_KEY = re.compile(r"[\x21-\x7e]{1,512}")  # what fits into a header, without spaces
_ORIGIN = re.compile(r"https?://[^/\s@]+")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}")


@dataclass(frozen=True, slots=True)
class ServerParams:
    """How a model is served.

    Raises:
        ValueError: A value outside its range, or a network without an API key.
    """

    host: str = "127.0.0.1"
    """Address to listen on. One that other machines reach needs ``api_key`` or ``allow_no_key``."""
    port: int = 8000
    """0 takes a free one."""
    api_key: str | None = field(default=None, repr=False)
    """What clients must send as a bearer token; None asks for none."""
    allow_no_key: bool = False
    """Listen on a network without a key: whoever reaches the port uses the model."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which clients may call this server, beside addresses and localhost."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of other origins that may use it, as ``https://name[:port]``."""
    constrain_actions: ConstrainActions = "auto"
    """Hold chat answers to the action language: where a system prompt speaks it, always, never."""
    max_queue: int = 32
    """Requests that may wait for their turn; one client takes at most half of the places."""
    max_body_bytes: int = 32 * 2**20
    """Of one request; all that are held at a time may take twice that."""
    max_messages: int = 1000
    max_images: int = 8
    """Of one request."""
    max_image_pixels: int = 20_000_000
    """Width times height; larger images are refused before they are decoded."""
    max_tokens: int | None = None
    """Generated tokens of one answer at most; None: what n_ctx leaves."""
    fetch_images: bool = False
    """Take http and https image addresses, public ones only; see `fetch_image`."""
    keep_alive_s: float = 3.0
    """A stream that has nothing to say says so this often, seconds."""
    stall_s: float = 30.0
    """A client that takes nothing for so long is dropped, seconds."""
    shutdown_s: float = 10.0
    """How long the running answer may go on after a signal, seconds."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port {self.port}: not in 0..65535")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ValueError("api_key: 1 to 512 visible ASCII characters, without spaces")
        if self.constrain_actions not in CONSTRAIN_ACTIONS:
            raise ValueError(
                f"constrain_actions {self.constrain_actions!r}: not one of "
                f"{', '.join(CONSTRAIN_ACTIONS)}"
            )
        for name, least in (("max_queue", 1), ("max_messages", 1), ("max_images", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: at least {least}")
        if self.max_body_bytes < 1024:
            raise ValueError(f"max_body_bytes {self.max_body_bytes}: at least {format_bytes(1024)}")
        if self.max_image_pixels < 1:
            raise ValueError(f"max_image_pixels {self.max_image_pixels}: at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens {self.max_tokens}: at least 1")
        for item in fields(self):
            if item.name.endswith("_s") and not 0 < getattr(self, item.name) < math.inf:
                raise ValueError(f"{item.name} {getattr(self, item.name)}: not a positive number")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"allowed_origins {origin!r}: not as https://name or http://name")
        for name in self.allowed_hosts:
            if not _NAME.fullmatch(name):
                raise ValueError(f"allowed_hosts {name!r}: not a host's name")
        if not (is_loopback(self.host) or self.api_key or self.allow_no_key):
            raise ValueError(
                f"host {self.host}: other machines may reach it, and no API key is set "
                f"(set {KEY_VARIABLE} or --api-key, or say --allow-no-key)"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address; names other than localhost count as no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
