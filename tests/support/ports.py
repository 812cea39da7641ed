"""A port of this machine on which nothing listens."""

import socket


def free_port() -> int:
    """The system's choice."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
