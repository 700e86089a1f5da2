"""Run the server: sockets, signals, and an end that cuts nobody off before the time is up."""

import asyncio
import errno
import resource
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn

from tokenmill.engine.llm import LLM
from tokenmill.errors import UsageError
from tokenmill.server.app import make_app
from tokenmill.server.bridge import Bridge
from tokenmill.server.config import ServerConfig
from tokenmill.server.life import Life
from tokenmill.server.meters import Meters
from tokenmill.server.prompting import Encoder
from tokenmill.server.protocol import Patience, PatientProtocol, patient_protocol
from tokenmill.server.service import Service

_BACKLOG = 2048
_OTHER_FILES = 256
"""Open files beside connections."""

_LAST_WORDS_S = 2.0
"""Time for what was aborted to be written out; at most a quarter of that for draining."""

# The engine's thread needs the interpreter as soon as a step ends; 5 ms, which is Python's
# default, is as long as a step.
_SWITCH_INTERVAL_S = 0.0005


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything slow is done; UsageError where it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"host is {host!r}, which is no address of a machine") from error
    bound = socket.socket(family, kind, proto)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _unbound(host, port, error) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """Where a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    llm: LLM, config: ServerConfig, bound: socket.socket, *, on_ready: Callable[[], None]
) -> bool:
    """Serve until a signal ends it. `on_ready` is called once requests are taken.

    True: every request had its answer before the time for draining was up.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _allow_files(config.max_connections + _OTHER_FILES)
    return asyncio.run(_serve(llm, config, bound, on_ready))


async def _serve(
    llm: LLM, config: ServerConfig, bound: socket.socket, on_ready: Callable[[], None]
) -> bool:
    server = Server(make_service(llm, config))
    await server.serve_until_told(bound, on_ready)
    return server.is_drained


def make_service(llm: LLM, config: ServerConfig) -> Service:
    """A model with what serves it, on the event loop that runs."""
    meters = Meters(llm.engine, config.model_names[0])
    return Service(
        llm=llm,
        config=config,
        life=Life(),
        meters=meters,
        bridge=Bridge(llm.engine, asyncio.get_running_loop(), meters.observe),
        encoder=Encoder(llm),
    )


class Server(uvicorn.Server):
    """uvicorn, with signals that drain: the first one politely, the second at once."""

    def __init__(self, service: Service) -> None:
        config = service.config
        patience = Patience(
            max_connections=config.max_connections,
            head_timeout_s=config.head_timeout_s,
            write_timeout_s=config.write_timeout_s,
        )
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=patient_protocol(patience),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,  # nothing is left by then
            )
        )
        self.is_drained = True
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._told = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal's handler, between any two bytecodes."""
        self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        if self._told.is_set():
            self._service.life.end()
        self._told.set()

    async def _drain_when_told(self) -> None:
        """After a signal: refuse what comes, wait for what is there, then end uvicorn."""
        await self._told.wait()
        service = self._service
        timeout_s = service.config.drain_timeout_s
        last_words_s = min(_LAST_WORDS_S, timeout_s / 4)
        self.is_drained = await service.life.drain(timeout_s - last_words_s)
        # What still runs is told so, while the event loop can yet write it out.
        await asyncio.to_thread(service.llm.close)
        give_up_s = self._loop.time() + last_words_s
        while self._owed() and self._loop.time() < give_up_s:
            await asyncio.sleep(0.02)
        for connection in self._owed():
            connection.transport.abort()
        self.should_exit = True

    def _owed(self) -> list[PatientProtocol]:
        """The connections whose clients have not read all of their answers."""
        connections = (c for c in self.server_state.connections if isinstance(c, PatientProtocol))
        return [connection for connection in connections if connection.is_owed]

    async def serve_until_told(self, bound: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a bound socket until a signal ends it."""
        host, port = bound.getsockname()[:2]
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            raise _unbound(host, port, error) from error
        drained = asyncio.create_task(self._drain_when_told())
        serving = asyncio.create_task(self.serve(sockets=[bound]))
        try:
            while not (self.started or serving.done()):
                await asyncio.sleep(0.005)
            if self.started:
                on_ready()
            await serving
        finally:
            drained.cancel()
            self._service.encoder.close()


def _allow_files(count: int) -> None:
    """Open files for all connections, as far as the system lets us: the usual 1,024 are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _unbound(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(f"port {port} on {host} is in use: stop who uses it, or take another")
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} may not be opened without rights: take one above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(f"host is {host!r}, which is not an address of this machine")
    return UsageError(f"{host} port {port} cannot be opened: {error.strerror}")
