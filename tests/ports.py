"""Ports for processes that find one another."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports that are free, and that no connection is given in the meantime: below the range that these are taken from."""
    ports: list[int] = []
    for port in range(random.randrange(12000, 30000), 32768):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.append(port)
        if len(ports) == count:
            break
    return ports
