"""Whether a Ray cluster answers at an address, found out in seconds: Ray itself tries for many minutes.

A cluster's two doors, its control service (HOST:PORT) and its client server (ray://HOST:PORT), both
speak gRPC, so whoever listens must greet as HTTP/2 does. Knows nothing else of Ray.
"""

from __future__ import annotations

import os
import socket

from vllm_flow.exits import Refused

PATIENCE = 10.0
"""Seconds for a connection, and again for the greeting."""

DEFAULT_PORTS = {"": 6379, "ray": 10001}
# RFC 9113, 3.4: the client's preface is this and a SETTINGS frame, here an empty one.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
FRAME_HEADER = 9
SETTINGS = 4


class ClusterError(Refused):
    """There is no cluster to join at an address."""

    def __init__(self, address: str, why: str) -> None:
        super().__init__(
            f"no Ray cluster at {address}: {why}. Start one there (ray start --head), name another with "
            "--ray-address or RAY_ADDRESS, or leave both out to use this machine"
        )


def check(address: str, patience: float = PATIENCE) -> None:
    """Return where something at `address` greets as a cluster does, or where Ray must look for itself.

    Raises:
        ClusterError: it does not.
    """
    if address == "auto":
        return  # Ray looks on this machine, and says at once if it finds none
    host, port = split(address)
    hidden = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")  # the greeting, inside TLS
    try:
        with socket.create_connection((host, port), timeout=patience) as connection:
            if not hidden and not greets(connection):
                raise ClusterError(address, "what listens there is no Ray")
    except TimeoutError:
        raise ClusterError(address, f"nothing answers within {patience:g} s") from None
    except OSError as error:  # of names as well
        raise ClusterError(address, error.strerror or str(error)) from None


def split(address: str) -> tuple[str, int]:
    """Host and port; ClusterError where the address has another form."""
    scheme, _, rest = address.rpartition("://")
    host, colon, digits = rest.partition("?")[0].rpartition(":")
    if not colon:
        host, digits = rest, ""
    valid = digits == "" or (digits.isascii() and digits.isdigit() and 0 < int(digits[:6]) < 65536)
    if scheme not in DEFAULT_PORTS or not host or not valid or len(digits) > 5:
        raise ClusterError(address, "an address is HOST:PORT or ray://HOST:PORT")
    return host.strip("[]"), int(digits) if digits else DEFAULT_PORTS[scheme]


def greets(connection: socket.socket) -> bool:
    """Whether the other side answers HTTP/2's preface with its own; TimeoutError if nothing comes."""
    connection.sendall(PREFACE)
    got = b""
    while len(got) < FRAME_HEADER:
        more = connection.recv(FRAME_HEADER - len(got))
        if not more:
            return False
        got += more
    return got[3] == SETTINGS
