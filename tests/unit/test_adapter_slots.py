import pytest
from fake_model import make_adapter

from tokenmill.engine.adapter_slots import AdapterSlots
from tokenmill.kv.block_hash import root_name

A, B, C = (make_adapter(name) for name in "abc")


def test_sequences_of_one_adapter_share_a_slot():
    slots = AdapterSlots(2)
    first = slots.take(A)
    assert slots.take(A) == first
    assert slots.take(None) == -1
    assert slots.take(B) != first
    assert not slots.fits(C)
    assert slots.fits(None)
    slots.give(first)
    assert not slots.fits(C)
    slots.give(first)
    slots.give(-1)
    assert slots.take(C) == first


def test_the_slot_that_was_used_longest_ago_goes_first():
    slots = AdapterSlots(2)
    first, second = slots.take(A), slots.take(B)
    slots.give(second)
    slots.give(first)
    assert slots.take(A) == first  # still there
    slots.give(first)
    assert slots.take(C) == second


def test_the_books_are_checked():
    slots = AdapterSlots(1)
    slot = slots.take(A)
    slots.check([(A, slot), (None, -1)])
    for wrong in ([], [(B, slot)], [(A, slot), (A, slot)], [(A, -1)]):
        with pytest.raises(AssertionError):
            slots.check(wrong)


def test_a_block_is_named_by_salt_and_adapter_together():
    pairs = [("", b""), ("x", b""), ("", A.digest), ("x", A.digest), ("", B.digest)]
    assert len({root_name(salt, adapter) for salt, adapter in pairs}) == len(pairs)
