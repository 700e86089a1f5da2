"""Over MPI, by mpi4py: a communicator of ours beside the caller's, and requests that are tested.

mpi4py is imported by whoever makes the communicators, since that starts MPI.
"""

import os
from typing import TYPE_CHECKING

from tokenmill.collectives.transports.channel import Bytes
from tokenmill.collectives.transports.messages import MessageTransport, PeerLostError
from tokenmill.collectives.transports.pause import Pauses

if TYPE_CHECKING:
    from mpi4py import MPI

_SPIN = 300
"""A test takes some 300 ns, as it moves MPI's own messages on."""

_abandoned: list[object] = []
"""Requests that MPI may still serve when their channel is closed, since a send cannot be taken
back: their buffers must outlive it."""


class _Request:
    """A message under way, as MPI knows it."""

    __slots__ = ("_lost", "request")

    def __init__(self, request: "MPI.Request", lost: type[Exception]) -> None:
        self.request, self._lost = request, lost

    def is_done(self) -> bool:
        try:
            return bool(self.request.Test())
        except self._lost as error:
            raise PeerLostError(str(error)) from None


class MpiLink:
    """Messages to and from a rank of a communicator, all with one tag."""

    def __init__(self, comm: "MPI.Comm", peer: int, tag: int) -> None:
        from mpi4py import MPI

        self._comm, self._peer, self._tag, self._lost = comm, peer, tag, MPI.Exception
        self._sends: list[_Request] = []
        self._receive: _Request | None = None

    def isend(self, message: Bytes) -> _Request:
        self._sends = [one for one in self._sends if one.request]
        try:
            made = _Request(self._comm.Isend(message, self._peer, self._tag), self._lost)
        except self._lost as error:
            raise PeerLostError(str(error)) from None
        self._sends.append(made)
        return made

    def irecv(self, message: Bytes) -> _Request:
        try:
            made = _Request(self._comm.Irecv(message, self._peer, self._tag), self._lost)
        except self._lost as error:
            raise PeerLostError(str(error)) from None
        self._receive = made
        return made

    def close(self) -> None:
        _abandoned.extend(one.request for one in self._sends if one.request)
        if self._receive and self._receive.request:
            self._receive.request.Cancel()
            self._receive.request.Wait()


def make_mpi_transport(comm: "MPI.Comm", tag: int) -> MessageTransport:
    """Between all ranks of a communicator that nobody else uses with this tag."""
    rank, size = comm.Get_rank(), comm.Get_size()
    pauses = Pauses(_SPIN if size <= (os.cpu_count() or 1) else _SPIN // 10)
    links = {peer: MpiLink(comm, peer, tag) for peer in range(size) if peer != rank}
    return MessageTransport("MPI", links, pauses.wait)
