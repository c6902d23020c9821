"""A socket, uvicorn, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
import time
from collections.abc import Iterator

import uvicorn

from dsv4.errors import ConfigError
from dsv4.server.app import Service


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before the weights are read: whoever took the port is found out at once.

    Port 0 is any free one. ConfigError if the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        known = isinstance(error, socket.gaierror)
        do = "look at --host" if known else "another program may have the port: choose one with --port"
        raise ConfigError("cannot listen", got=f"{host}:{port}: {error}", do=do) from None
    return bound


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """On SIGTERM or Ctrl-C nothing new is taken and what runs is finished, within `drain` seconds; a second ends it.

    Until then it listens: whoever comes is told 503 (draining), those who ask /ready too.
    """

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            service.app,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
        super().__init__(config)
        self._worker, self._drain = service.worker, service.options.drain

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours do not raise the signal again when all is done: an end that was asked for is exit code 0."""
        loop, wanted = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # only the main thread can have them
            for number in wanted:
                loop.add_signal_handler(number, self.end)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close when the last answer has ended, or its time is over."""
        end = time.monotonic() + self._drain
        while self._worker.live and not self.force_exit and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.config.timeout_graceful_shutdown = max(0, math.ceil(end - time.monotonic()))
        await super().shutdown(sockets)

    def end(self) -> None:
        """Begin to drain; the second time, end."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._worker.drain()


def serve(service: Service, bound: socket.socket) -> None:
    """Serve until a signal comes."""
    asyncio.run(Server(service).serve(sockets=[bound]))
