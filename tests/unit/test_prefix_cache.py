"""The prefix cache: names of blocks, what a sequence finds, tenants, and what is evicted."""

import random
from collections import OrderedDict

from fake_model import FakeModel, expected_output, make_limits
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.backends.base import BLOCK_SIZE, StepLimits
from tokenmill.engine.sequence import Sequence, make_sequence
from tokenmill.engine.step_loop import StepLoop
from tokenmill.kv.block_hash import extend_names, root_name
from tokenmill.kv.block_pool import BlockPool
from tokenmill.sampling.params import SamplingParams


def names_of(tokens: list[int], salt: str = "") -> list[bytes]:
    names: list[bytes] = []
    extend_names(names, root_name(salt), tokens)
    return names


def test_only_full_blocks_have_names() -> None:
    assert [len(names_of([1] * n)) for n in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]


def test_a_name_depends_on_all_tokens_before_and_on_the_salt() -> None:
    names = names_of([1] * 48)
    assert len({*names, *names_of([2] + [1] * 47), *names_of([1] * 48, "tenant")}) == 9
    assert names_of([1] * 47 + [2])[:2] == names[:2]


@given(st.lists(st.integers(0, 2**31 - 1), max_size=80), st.integers(0, 80))
def test_names_that_are_extended_are_those_made_at_once(tokens: list[int], cut: int) -> None:
    names: list[bytes] = []
    extend_names(names, root_name(""), tokens[:cut])
    extend_names(names, root_name(""), tokens)
    assert names == names_of(tokens)


def test_a_named_block_is_found_until_it_is_handed_out_again() -> None:
    pool = BlockPool(2)
    first, second = names_of([1] * 32)
    table = pool.allocate(2)
    pool.name(table[0], first)
    pool.name(table[1], second)
    pool.free(reversed(table))
    assert pool.find([first, second]) == table
    assert pool.num_cached == pool.num_free == 2
    pool.allocate(1)
    assert pool.find([first, second]) == table[:1]
    pool.check([table[1:]])


def test_blocks_without_a_name_are_handed_out_first() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    pool.name(table[0], b"a")
    pool.free(table)
    assert pool.allocate(2) == table[1:]
    assert pool.find([b"a"]) == table[:1]


def test_the_block_used_longest_ago_is_evicted_first() -> None:
    pool = BlockPool(3)
    table = pool.allocate(3)
    for block, name in zip(table, (b"a", b"b", b"c"), strict=True):
        pool.name(block, name)
    pool.free(table)
    pool.share(pool.find([b"a"]))
    pool.free(table[:1])
    pool.touch(table[1])
    pool.allocate(1)
    assert [bool(pool.find([name])) for name in (b"a", b"b", b"c")] == [True, True, False]


def test_a_second_block_with_the_same_content_has_no_name() -> None:
    pool = BlockPool(2)
    table = pool.allocate(2)
    pool.name(table[0], b"a")
    pool.name(table[1], b"a")
    pool.free(table)
    assert pool.find([b"a"]) == table[:1]
    assert pool.num_cached == 1
    pool.check([])


LIMITS = make_limits(tokens=64, blocks=24, blocks_per_sequence=10)


def make(prompt: list[int], limits: StepLimits = LIMITS, salt: str = "", **params) -> Sequence:
    return make_sequence(
        "the prompt",
        prompt,
        SamplingParams(**{"temperature": 0, "max_tokens": 3, **params}),
        seed=0,
        eos_ids=(),
        limits=limits,
        max_model_len=10_000,
        cache_salt=salt,
    )


def run(loop: StepLoop, *sequences: Sequence) -> None:
    for sequence in sequences:
        loop.scheduler.add(sequence)
    while loop.has_work:
        loop.turn()
        loop.scheduler.check()


def computed(model: FakeModel) -> int:
    return sum(len(step.tokens) for step in model.steps)


def test_a_prompt_seen_before_is_computed_from_where_it_differs() -> None:
    model = FakeModel(LIMITS)
    loop = StepLoop(model)
    run(loop, make(list(range(40))))
    before = computed(model)
    second = make([*range(40), 900, 901])
    wanted = expected_output(second)
    run(loop, second)
    assert second.output == wanted
    assert second.num_cached == 32
    assert computed(model) - before == 42 - 32 + 2
    counters = loop.scheduler.counters
    assert (counters.prefix_cache_queries, counters.prefix_cache_hits) == (82, 32)


def test_of_a_prompt_that_is_cached_to_the_end_the_last_token_is_computed() -> None:
    model = FakeModel(LIMITS)
    loop = StepLoop(model)
    first, second = make(list(range(32))), make(list(range(32)))
    run(loop, first)
    before = computed(model)
    run(loop, second)
    assert second.output == first.output
    assert second.num_cached == 31
    assert computed(model) - before == 3


def test_a_conversation_goes_on_from_the_answer_before() -> None:
    loop = StepLoop(FakeModel(LIMITS))
    first = make(list(range(20)), max_tokens=30)
    run(loop, first)
    second = make([*first.tokens, 7])
    wanted = expected_output(second)
    run(loop, second)
    assert second.num_cached == 48
    assert second.output == wanted


def test_tenants_find_nothing_of_each_other() -> None:
    loop = StepLoop(FakeModel(LIMITS))
    one, other, again = (make(list(range(40)), salt=salt) for salt in ("a", "b", "a"))
    for sequence in (one, other, again):
        run(loop, sequence)
    assert [s.num_cached for s in (one, other, again)] == [0, 0, 32]


def test_one_of_several_equal_prompts_is_computed_for_all() -> None:
    model = FakeModel(LIMITS)
    loop = StepLoop(model)
    sequences = [make(list(range(40))) for _ in range(4)]
    wanted = expected_output(sequences[0])
    run(loop, *sequences)
    assert [s.output for s in sequences] == [wanted] * 4
    assert computed(model) == 40 + 3 * 8 + 4 * 2


def test_prompt_logprobs_are_computed_and_not_found() -> None:
    loop = StepLoop(FakeModel(LIMITS))
    run(loop, make(list(range(40))))
    scored = make(list(range(40)), prompt_logprobs=1)
    run(loop, scored)
    assert scored.num_cached == 0
    assert len(scored.prompt_logprobs) == 40


def test_samples_share_the_blocks_of_their_prompt() -> None:
    model = FakeModel(LIMITS)
    loop = StepLoop(model, has_prefix_cache=False)
    first = make(list(range(40)), max_tokens=4)
    others = [make(list(range(40)), max_tokens=4, temperature=1, seed=i) for i in range(3)]
    for other in others:
        other.parent, other.seed = first, id(other)
    wanted = [expected_output(s) for s in (first, *others)]
    run(loop, first, *others)
    assert [s.output for s in (first, *others)] == wanted
    assert computed(model) == 40 + 3 + 3 * 4
    copies = [step.copies for step in model.steps if step.copies is not None]
    assert sum(map(len, copies)) == 3


def lru_hits(prompts: list[list[bytes]], num_blocks: int) -> int:
    """Blocks that an ideal cache of so many blocks finds, the prompts coming one by one."""
    cache: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for names in prompts:
        num_found = next((i for i, name in enumerate(names) if name not in cache), len(names))
        hits += num_found
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
        while len(cache) > num_blocks:
            cache.popitem(last=False)
    return hits


def test_the_hit_rate_is_near_that_of_an_ideal_cache() -> None:
    rng = random.Random(7)
    limits = make_limits(tokens=256, blocks=120, blocks_per_sequence=40, slots=4)
    loop = StepLoop(FakeModel(limits))
    trace: list[list[int]] = []
    for _ in range(300):  # conversations of which some go on, and some begin alike
        begun = rng.random() < 0.6 and trace
        before = rng.choice(trace[-12:]) if begun else [rng.randrange(3)] * 48
        trace.append([*before, *(rng.randrange(1000) for _ in range(rng.randrange(16, 80)))][:400])
    for prompt in trace:
        loop.scheduler.add(make(prompt, limits, max_tokens=1))
        while len(loop.scheduler.waiting) > 3:
            loop.turn()
    run(loop)
    found = loop.scheduler.counters.prefix_cache_hits / BLOCK_SIZE
    ideal = lru_hits([names_of(prompt) for prompt in trace], limits.blocks)
    assert ideal > 500
    assert found >= 0.95 * ideal
