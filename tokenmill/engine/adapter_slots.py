"""Which adapter lies in which of the model's slots: pure bookkeeping."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenmill.ir.low_rank import NO_ADAPTER

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter


class AdapterSlots:
    """Slots are shared by the running sequences of one adapter.

    A slot that nobody uses keeps its adapter until another needs the place; the one that was used
    longest ago goes first. A step in flight may still read it: the next step's adapters are put
    in place when that one has ended.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._holders: dict[int, Adapter] = {}
        self._users: Counter[int] = Counter()
        self._unused: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))

    def fits(self, adapter: "Adapter | None") -> bool:
        """Could a sequence with this adapter run now?"""
        return adapter is None or bool(self._unused) or self._slot_of(adapter) is not None

    def take(self, adapter: "Adapter | None") -> int:
        """The slot in which a sequence finds its adapter, which `fits`."""
        if adapter is None:
            return NO_ADAPTER
        slot = self._slot_of(adapter)
        if slot is None:
            slot = next(iter(self._unused))
            self._holders[slot] = adapter
        self._unused.pop(slot, None)
        self._users[slot] += 1
        return slot

    def give(self, slot: int) -> None:
        """A sequence needs its adapter no more."""
        if slot == NO_ADAPTER:
            return
        self._users[slot] -= 1
        if not self._users[slot]:
            self._unused[slot] = None

    def check(self, users: "Iterable[tuple[Adapter | None, int]]") -> None:
        """Prove that slots and their users, (adapter, slot) each, agree. Raises AssertionError."""
        counts: Counter[int] = Counter()
        for adapter, slot in users:
            assert (adapter is None) == (slot == NO_ADAPTER)
            if adapter is not None:
                assert self._holders[slot] is adapter
                counts[slot] += 1
        assert counts == +self._users
        assert set(self._unused) == set(range(self._num_slots)) - set(counts)

    def _slot_of(self, adapter: "Adapter") -> int | None:
        return next((s for s, held in self._holders.items() if held is adapter), None)
