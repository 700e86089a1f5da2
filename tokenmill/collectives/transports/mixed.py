"""Shared memory to the ranks of the same host, sockets to the others."""

from collections.abc import Collection

from tokenmill.collectives.transports.channel import Channel
from tokenmill.collectives.transports.shared_memory import SharedMemoryTransport
from tokenmill.collectives.transports.sockets import SocketTransport

_NO_SPIN = 1


class MixedTransport:
    """Both, by peer."""

    name = "shared memory and sockets"

    def __init__(
        self, near: SharedMemoryTransport, far: SocketTransport, near_ranks: Collection[int]
    ) -> None:
        self._near, self._far, self._near_ranks = near, far, frozenset(near_ranks)

    def channel(self, peer: int) -> Channel:
        return (self._near if peer in self._near_ranks else self._far).channel(peer)

    def wait(self, incoming: Collection[int], outgoing: Collection[int], attempt: int) -> None:
        near = self._near_ranks
        if not near.isdisjoint(incoming) or not near.isdisjoint(outgoing):
            far_peers = [peer for peer in (*incoming, *outgoing) if peer not in near]
            near_in = [peer for peer in incoming if peer in near]
            near_out = [peer for peer in outgoing if peer in near]
            self._near.wait(near_in, near_out, max(attempt, _NO_SPIN) if far_peers else attempt)
        else:
            self._far.wait(incoming, outgoing, attempt)

    def close(self) -> None:
        self._near.close()
        self._far.close()
