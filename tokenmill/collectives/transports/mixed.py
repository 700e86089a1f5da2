"""Shared memory to the ranks of the same host, sockets to the others."""

from collections.abc import Collection

from tokenmill.collectives.transports.channel import Channel
from tokenmill.collectives.transports.shared_memory import SharedMemoryTransport
from tokenmill.collectives.transports.sockets import SocketTransport

_BRIEF_S = 0.0002
"""Sleep in which far peers wake a rank, and near ones do not."""


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
        far_in = [peer for peer in incoming if peer not in near]
        far_out = [peer for peer in outgoing if peer not in near]
        near_in = [peer for peer in incoming if peer in near]
        near_out = [peer for peer in outgoing if peer in near]
        if not (far_in or far_out):
            self._near.wait(near_in, near_out, attempt)
        elif not (near_in or near_out):
            self._far.wait(far_in, far_out, attempt)
        elif attempt and not self._near.is_ready(near_in, near_out):
            self._far.wait_briefly(far_in, far_out, _BRIEF_S)

    def close(self) -> None:
        self._near.close()
        self._far.close()
