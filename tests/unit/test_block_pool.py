"""The block pool's bookkeeping."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.kv.block_pool import BlockPool, blocks_for


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_allocated_blocks_are_distinct_and_counted() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(1), pool.allocate(3)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free == 0
    pool.check([first, second])


def test_allocating_more_than_is_free_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        BlockPool(2).allocate(3)


def test_the_block_that_was_freed_first_is_reused_first() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.free([blocks[1]])
    pool.free([blocks[0]])
    assert pool.allocate(2) == [blocks[1], blocks[0]]


def test_a_shared_block_is_free_only_after_its_last_owner() -> None:
    pool = BlockPool(2)
    table = pool.allocate(2)
    pool.share(table[:1])
    pool.check([table, table[:1]])
    pool.free(table)
    pool.check([table[:1]])
    pool.free(table[:1])
    pool.check([])
    assert pool.num_free == 2


def test_a_free_block_can_be_revived() -> None:
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.free(table)
    pool.share(table)
    pool.check([table])
    assert pool.allocate(1) != table


def test_an_eviction_is_the_loss_of_what_could_be_found() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    for block in blocks[:2]:
        pool.name(block, bytes([block]))
    pool.free(blocks)
    pool.share(pool.find([bytes([blocks[0]])]))  # found in time
    pool.free(blocks[:1])
    assert (pool.num_evictions, pool.last_evicted()) == (0, [])
    pool.allocate(4)
    assert (pool.num_evictions, pool.last_evicted()) == (2, [blocks[1], blocks[0]])


def test_freeing_twice_is_a_bug() -> None:
    pool = BlockPool(1)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="once too often"):
        pool.free(table)


def test_check_finds_every_kind_of_disagreement() -> None:
    pool = BlockPool(3)
    table = pool.allocate(2)
    for tables in ([], [table[:1]], [table, table], [[*table, table[0]]], [[*table, 9]]):
        with pytest.raises(AssertionError):
            pool.check(tables)


@given(st.lists(st.integers(0, 5), max_size=60), st.randoms())
def test_random_owners_never_break_the_invariants(sizes: list[int], random) -> None:
    pool, tables = BlockPool(12), []
    for size in sizes:
        if size <= pool.num_free and size:
            tables.append(pool.allocate(size))
        elif tables and random.random() < 0.5:
            shared = list(random.choice(tables))
            pool.share(shared)
            tables.append(shared)
        elif tables:
            pool.free(tables.pop(random.randrange(len(tables))))
        pool.check(tables)
    for table in tables:
        pool.free(table)
    pool.check([])
