"""Network addresses of `infer ui` and `infer serve`: a socket to serve on, and what a Host or Origin header names."""

import contextlib
import ipaddress
import os
import socket
from urllib.parse import urlsplit

from charrnn.errors import ConfigError

_SEND_BUFFER_BYTES = 64 << 10


def is_loopback(host: str) -> bool:
    """Return whether an address, or the name localhost, is reached from this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower() == "localhost"


def netloc_of(url: str) -> str | None:
    """Return the netloc of a URL such as an Origin header; None if it is malformed."""
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def hostname_of(netloc: str) -> str:
    """Return the host that a Host header names, in lower case; "" if it is malformed or has a user name."""
    try:
        parts = urlsplit(f"//{netloc}")
    except ValueError:
        return ""
    return "" if parts.netloc != netloc or "@" in netloc else parts.hostname or ""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises: ConfigError when the address cannot be bound."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        if os.name == "posix":  # where it lets a server follow the one before at once; elsewhere, share its port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: what waits in the kernel for a client that does not read, MBs by default.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        listener.bind(address)
        listener.listen()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot serve on {host}:{port}: {reason}; choose another --port or --host") from None
    listener.setblocking(False)
    return listener
