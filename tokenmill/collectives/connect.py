"""Making communicators: ranks meet, learn who is where, and open channels to each other."""

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenmill.collectives.calls import Choose
from tokenmill.collectives.choice import choose_plan
from tokenmill.collectives.communicator import Communicator
from tokenmill.collectives.control import Control, Hub, LocalControl, get_all, meet, put_own
from tokenmill.collectives.control_tcp import ControlServer, TcpControl, parse_address
from tokenmill.collectives.layout import Layout, default_host_id, make_layout
from tokenmill.collectives.topology import PRESETS, Links
from tokenmill.collectives.transports import shared_memory
from tokenmill.collectives.transports.channel import Transport
from tokenmill.collectives.transports.mixed import MixedTransport
from tokenmill.collectives.transports.shared_memory import SharedMemoryTransport
from tokenmill.collectives.transports.sockets import (
    Listener,
    SocketChannel,
    SocketTransport,
)
from tokenmill.collectives.transports.sockets import connect as connect_socket
from tokenmill.collectives.transports.threads import ThreadHub, ThreadTransport
from tokenmill.errors import CollectiveError, UsageError

TRANSPORTS = ("auto", "shared_memory", "sockets")
TIMEOUT_S = 300.0
SHARED_FOLDER = Path("/dev/shm")


def connect(
    address: str,
    *,
    rank: int,
    size: int,
    timeout_s: float = TIMEOUT_S,
    host_id: str | None = None,
    transport: str = "auto",
    links: Links = PRESETS["cpu"],
    choose: Choose = choose_plan,
) -> Communicator:
    """Join a group at `host:port`, where rank 0 listens.

    Ranks with the same `host_id` (default: `default_host_id()`) are taken to share memory.
    `transport` is `auto` (shared memory in a host, sockets between hosts), `shared_memory`, or
    `sockets`. `timeout_s` is how long to wait for the others, now and in any call in which nothing
    moves. Raises UsageError, and CollectiveError where the group does not come together.
    """
    if size < 1 or not 0 <= rank < size:
        raise UsageError(f"the rank is {rank} and the world size {size}: ranks count from 0")
    if not timeout_s > 0:
        raise UsageError(f"the timeout is {timeout_s:g} s, but must be above 0")
    control = make_tcp_control(address, rank=rank, size=size, timeout_s=timeout_s)
    return connect_over(
        control,
        timeout_s=timeout_s,
        host_id=host_id,
        transport=transport,
        links=links,
        choose=choose,
    )


def make_tcp_control(
    address: str,
    *,
    rank: int,
    size: int,
    timeout_s: float,
    on_listen: Callable[[tuple[str, int]], object] | None = None,
) -> TcpControl:
    """The control of a rank; rank 0 starts the server, and tells where it listens.

    Raises CollectiveError."""
    place = parse_address(address)
    server = ControlServer(place, size, timeout_s) if rank == 0 else None
    if server is not None:
        host = "127.0.0.1" if place[0] in ("", "0.0.0.0") else place[0]
        place = host, server.address[1]
        if on_listen:
            on_listen(place)
    return TcpControl(place, rank=rank, size=size, timeout_s=timeout_s, server=server)


def make_introduced_control(
    tell: Callable[[str], object],
    hear: Callable[[], str],
    *,
    rank: int,
    size: int,
    timeout_s: float,
    address: str,
) -> TcpControl:
    """The control of ranks that another library has brought together: rank 0 listens at `address`
    and tells the others where; they hear it.

    Raises UsageError and CollectiveError; whatever rank 0 raises before it listens, all do."""
    if rank != 0:
        said = json.loads(hear())
        if "failure" in said:
            raise CollectiveError(f"rank {rank}: {said['failure']}")
        return make_tcp_control(said["address"], rank=rank, size=size, timeout_s=timeout_s)
    try:
        return make_tcp_control(
            address,
            rank=0,
            size=size,
            timeout_s=timeout_s,
            on_listen=lambda place: tell(json.dumps({"address": f"{place[0]}:{place[1]}"})),
        )
    except (UsageError, CollectiveError) as error:
        tell(json.dumps({"failure": str(error)}))
        raise


def connect_over(
    control: TcpControl,
    *,
    timeout_s: float,
    host_id: str | None = None,
    transport: str = "auto",
    links: Links = PRESETS["cpu"],
    choose: Choose = choose_plan,
) -> Communicator:
    """A communicator among the ranks of a control. Closes the control if that fails."""
    return _guarded(
        control,
        lambda: _connect_over(control, timeout_s, host_id, transport, links, choose),
    )


def connect_with(
    control: Control,
    make_transport: Callable[[Layout], Transport],
    *,
    timeout_s: float,
    host_id: str | None = None,
    links: Links = PRESETS["cpu"],
    choose: Choose = choose_plan,
) -> Communicator:
    """A communicator over a transport of the caller's."""

    def make() -> Communicator:
        layout = _exchange_layout(control, timeout_s, host_id, "given", links)
        transport = make_transport(layout)
        meet(control, "ready", timeout_s)
        return Communicator(control, transport, layout, timeout_s=timeout_s, choose=choose)

    return _guarded(control, make)


def connect_threads(
    size: int,
    *,
    host_ids: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
    choose: Choose = choose_plan,
    piece_bytes: int = 1 << 16,
) -> list[Communicator]:
    """Communicators of ranks that are threads of this process, in order of rank."""
    hub, threads = Hub(size), ThreadHub(size, piece_bytes=piece_bytes)
    layout = make_layout(host_ids or ["here"] * size)
    return [
        Communicator(
            LocalControl(hub, rank),
            ThreadTransport(threads, rank),
            layout,
            timeout_s=timeout_s,
            choose=choose,
        )
        for rank in range(size)
    ]


def _guarded(control: Control, make: Callable[[], Communicator]) -> Communicator:
    """Tell the others if this rank fails."""
    try:
        return make()
    except BaseException as error:
        reason = str(error) or type(error).__name__
        start = f"rank {control.rank}"
        control.abort(reason if reason.startswith(start) else f"{start}: {reason}")
        control.close()
        if isinstance(error, CollectiveError) and not reason.startswith(start):
            raise CollectiveError(f"{start}: {reason}") from None
        raise


def _connect_over(
    control: TcpControl,
    timeout_s: float,
    host_id: str | None,
    transport: str,
    links: Links,
    choose: Choose,
) -> Communicator:
    if transport not in TRANSPORTS:
        raise UsageError(f"no transport {transport!r}: give one of {', '.join(TRANSPORTS)}")
    layout = _exchange_layout(control, timeout_s, host_id, transport, links)
    near_ranks = layout.local_ranks(control.rank)
    if transport == "sockets" or not shared_memory.is_supported():
        near_ranks = (control.rank,)
    if transport == "shared_memory" and len(near_ranks) < control.size:
        raise UsageError("not all ranks share memory: they have different host ids")
    if control.rank == 0:
        control.put("job/0", secrets.token_hex(8))
    job = control.get("job/0", timeout_s)
    near = _NearSide(control, job, near_ranks) if len(near_ranks) > 1 else None
    try:
        far_ranks = [r for r in range(control.size) if r not in near_ranks]
        channels = _connect_sockets(control, job, far_ranks, timeout_s)
        # All ranks take part in each meeting, also those without neighbours.
        meet(control, "segment", timeout_s)
        if near:
            near.transport.connect()
        meet(control, "mapped", timeout_s)
    finally:
        if near:
            near.remove_names()
    meet(control, "ready", timeout_s)
    far = SocketTransport(channels)
    made: Transport = far
    if near:
        made = MixedTransport(near.transport, far, near_ranks) if far_ranks else near.transport
    return Communicator(control, made, layout, timeout_s=timeout_s, choose=choose)


class _NearSide:
    """Shared memory while it is set up: names exist, and must go whatever happens."""

    def __init__(self, control: Control, job: str, ranks: Sequence[int]) -> None:
        self._job, self._ranks = job, ranks
        self.transport = SharedMemoryTransport(
            job=job, rank=control.rank, local_ranks=ranks, folder=SHARED_FOLDER
        )

    def remove_names(self) -> None:
        """This rank's; and those of others, who may have died before they could."""
        self.transport.remove_names()
        for rank in self._ranks:
            with contextlib.suppress(FileNotFoundError):
                (SHARED_FOLDER / shared_memory.segment_name(self._job, rank)).unlink()


def _exchange_layout(
    control: Control, timeout_s: float, host_id: str | None, transport: str, links: Links
) -> Layout:
    """Where all ranks are. Raises CollectiveError where they want different transports."""
    own = {"host": host_id or default_host_id(), "transport": transport}
    put_own(control, "place", json.dumps(own))
    places = [json.loads(text) for text in get_all(control, "place", timeout_s)]
    for rank, place in enumerate(places):
        if place["transport"] != transport:
            raise CollectiveError(
                f"rank {control.rank} wants the transport {transport}, but rank {rank} wants "
                f"{place['transport']}"
            )
    return make_layout([place["host"] for place in places], links)


def _connect_sockets(
    control: TcpControl, job: str, peers: Sequence[int], timeout_s: float
) -> dict[int, SocketChannel]:
    """Connections to the ranks of other hosts: to lower ones from here, from higher ones to
    here."""
    deadline_s = time.monotonic() + timeout_s
    listener = Listener(control.own_host)
    try:
        put_own(control, "address", json.dumps(listener.address))
        rank, channels = control.rank, dict[int, SocketChannel]()
        for peer in [p for p in peers if p < rank]:
            host, port = json.loads(control.get(f"address/{peer}", timeout_s))
            channels[peer] = connect_socket(
                (host, port), job=job, rank=rank, peer=peer, deadline_s=deadline_s
            )
        channels |= listener.accept(job, [p for p in peers if p > rank], deadline_s)
        return channels
    finally:
        listener.close()
