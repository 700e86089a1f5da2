"""All-to-all in log2 p steps: Bruck et al., "Efficient algorithms for all-to-all communications in
multiport message-passing systems" (1997).

A block that has to go j places further waits in slot j. In the step of each power of two, those of
which j has that bit go as many places on, to the same slot there. About half of all blocks travel
in each step, so it suits small blocks and many ranks. Every rank must know how large the blocks of
others are, which it does where all are nearly of one size.
"""

from collections.abc import Iterable

from tokenmill.collectives.ranges import Range, Ranges, joined, size
from tokenmill.collectives.writer import Scope, Writer


def all_to_all(scope: Scope, write: Writer) -> None:
    """ceil(log2 p) messages with about p/2 blocks each; no block travels in all of them unless p is
    a power of two."""
    here, num_places = scope.place, scope.size
    sent = [scope.sliced(block) for block in scope.task.sent_ranges(here)]
    received = [scope.sliced(block) for block in scope.task.received_ranges(here)]
    slots = _Slots([size([block]) for block in sent])
    held = write.scratch("held", slots.count if num_places > 1 else 0)
    heard = write.scratch("heard", slots.count if num_places > 1 else 0)
    write.copy("input", joined([sent[here]]), "output", joined([received[here]]))
    for slot in range(1, num_places):
        block = joined([sent[(here + slot) % num_places]])
        write.copy("input", block, held, slots.before(1, here, [slot]))
    distance = 1
    while distance < num_places:
        moved = [slot for slot in range(1, num_places) if slot & distance]
        ahead, behind = (here + distance) % num_places, (here - distance) % num_places
        write.send(ahead, slots.before(distance, here, moved), buffer=held)
        # A slot is both sent from and received into, so what comes must wait beside.
        coming = slots.before(distance, behind, moved)
        write.recv(behind, coming, buffer=heard)
        write.copy(heard, coming, held, coming)
        distance *= 2
    for slot in range(1, num_places):
        block = slots.before(distance, here, [slot])
        write.copy(held, block, "output", joined([received[(here - slot) % num_places]]))


class _Slots:
    """Where blocks wait: as many slots as places, each for the largest block."""

    def __init__(self, widths: list[int]) -> None:
        """`widths` are the sizes of the blocks by where they go."""
        self._widths, self._most = widths, max(widths)
        self.count = len(widths) * self._most

    def before(self, distance: int, place: int, slots: Iterable[int]) -> Ranges:
        """What lies in these slots of a place before the step of a distance."""
        return joined(self._block(distance, place, slot) for slot in slots)

    def _block(self, distance: int, place: int, slot: int) -> Range:
        gone = slot & (distance - 1)  # the lower bits: so many places it has come already
        target = (place - gone + slot) % len(self._widths)
        start = slot * self._most
        return start, start + self._widths[target]
