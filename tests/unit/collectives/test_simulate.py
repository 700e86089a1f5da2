"""Simulated times are those of the formulas where these are exact, and orderings hold elsewhere."""

import pytest

from tests.unit.collectives.programs import make_task
from tokenmill.collectives import simulate as simulation
from tokenmill.collectives.catalog import ALGORITHMS
from tokenmill.collectives.cost import predict
from tokenmill.collectives.program import Plan
from tokenmill.collectives.simulate import simulate
from tokenmill.collectives.topology import PRESETS, Link, Links, Topology
from tokenmill.errors import CapacityError

A, B, G = 1e-6, 1e-9, 1e-10
UNIFORM = Links(
    local=Link(alpha_s=A, beta_s_per_byte=B),
    remote=Link(alpha_s=A, beta_s_per_byte=B),
    gamma_s_per_byte=G,
)
A1, B1, A2, B2 = 1e-6, 1e-10, 20e-6, 1e-8
TWO_LEVELS = Links(
    local=Link(alpha_s=A1, beta_s_per_byte=B1), remote=Link(alpha_s=A2, beta_s_per_byte=B2)
)
GIGABIT = Links(
    local=Link(alpha_s=20e-6, beta_s_per_byte=1 / 5e9),
    remote=Link(alpha_s=60e-6, beta_s_per_byte=1 / 125e6),
    uplinks=1,
)
"""Two hosts with an adapter of 1 Gbit/s each."""


def run(algorithm, p, n, *, h=1, links=UNIFORM, op="all_reduce", is_interleaved=False, **plan):
    topology = Topology(ranks=p, hosts=h, links=links, is_interleaved=is_interleaved)
    plan = Plan(algorithm=algorithm, **{"hosts": h, **plan})
    return simulate(make_task(op, p, 0), plan, topology, n)


@pytest.mark.parametrize("n", [1 << 10, 1 << 20])
@pytest.mark.parametrize("p", [4, 16, 64])
def test_the_formulas_of_the_table(p, n):
    share, h = (p - 1) / p, p.bit_length() - 1
    expected = {
        "ring": 2 * (p - 1) * A + 2 * share * n * B + share * n * G,
        "recursive_doubling": h * (A + n * B + n * G),
        "rabenseifner": 2 * h * A + 2 * share * n * B + share * n * G,
    }
    for algorithm, seconds in expected.items():
        assert run(algorithm, p, n).time_s == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("k", [1, 7, 32])
def test_chains_are_pipelines(k):
    p, n = 9, 1 << 20
    step = A + n * B / k
    for op, sum_s in (("broadcast", 0.0), ("reduce", n * G / k)):
        done = run("ring", p, n, op=op, slices=k)
        assert done.num_steps == p + k - 2
        # A sum overlaps the next message, so only those on the way of one slice show.
        expected = (p + k - 2) * step + (p - 1) * sum_s
        assert done.time_s == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("h", "m"), [(4, 4), (8, 2), (3, 5)])
def test_hierarchical_ring(h, m):
    n = 1 << 20
    done = run("hierarchical", h * m, n, h=h, links=TWO_LEVELS)
    inner = 2 * (m - 1) * A1 + 2 * (m - 1) / m * n * B1
    outer = 2 * (h - 1) * A2 + 2 * (h - 1) / h * (n / m) * B2
    assert done.time_s == pytest.approx(inner + outer, rel=1e-9)
    assert done.uplink_bytes == pytest.approx(2 * (h - 1) / h * n)


def test_torus_of_32_by_32():
    n = 1 << 20
    done = run("torus", 1024, n, h=32)
    assert done.num_steps == 2 * (32 + 32 - 2) == 124
    assert done.bytes_sent == pytest.approx(2 * 1023 * n / 1024)
    formula = 124 * A + 2 * 1023 / 1024 * n * B + 1023 / 1024 * n * G
    # While one of the four lanes waits or adds, the others send.
    assert 0.9 * formula < done.time_s <= formula


@pytest.mark.parametrize(
    ("algorithm", "p", "h", "steps"),
    [
        ("ring", 1024, 128, 2046),
        ("tree", 1024, 128, 20),
        ("ring", 24_576, 4096, 49_150),
        ("hierarchical", 24_576, 4096, 8_200),
        pytest.param("tree", 24_576, 4096, 30, marks=pytest.mark.slow),
    ],
)
def test_steps_of_large_cases(algorithm, p, h, steps):
    assert run(algorithm, p, 1 << 16, h=h, links=PRESETS["gpu"]).num_steps == steps


def test_a_tree_answers_sooner_than_a_ring():
    links = PRESETS["gpu"]
    times = [run(a, 1536, 256, h=256, links=links).time_s for a in ("tree", "hierarchical", "ring")]
    assert times == sorted(times)
    assert times[2] > 20 * times[0]


@pytest.mark.parametrize(
    ("algorithm", "op"),
    [(a.name, a.op) for a in ALGORITHMS.values() if a.name not in ("tree", "two_shot", "torus")],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_one_host_can_stand_for_all(algorithm, op, preset):
    topology = Topology(ranks=32, hosts=8, links=PRESETS[preset])
    plan = Plan(algorithm=algorithm, hosts=8)
    every, one = (
        simulate(make_task(op, 32, 0), plan, topology, 1 << 20, is_exact=is_exact)
        for is_exact in (True, False)
    )
    assert one.time_s == pytest.approx(every.time_s, rel=1e-9)
    assert one.num_steps == every.num_steps
    assert one.num_messages == every.num_messages
    assert one.bytes_sent == every.bytes_sent
    assert one.uplink_bytes == every.uplink_bytes


def test_one_host_can_stand_for_all_of_a_torus():
    """Nearly: of messages that come to a port at the same time, another may go first."""
    topology = Topology(ranks=32, hosts=8)
    plan = Plan(algorithm="torus", hosts=8)
    every, one = (
        simulate(make_task("all_reduce", 32, 0), plan, topology, 1 << 20, is_exact=is_exact)
        for is_exact in (True, False)
    )
    assert one.time_s == pytest.approx(every.time_s, rel=0.05)
    assert (one.num_steps, one.num_messages) == (every.num_steps, every.num_messages)


@pytest.mark.parametrize("op", ["all_reduce", "all_gather"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_long_ring_is_as_long_as_it_is(monkeypatch, op, preset):
    topology = Topology(ranks=900, hosts=300, links=PRESETS[preset])

    def time(hosts):
        monkeypatch.setattr(simulation, "_RING_HOSTS", hosts)
        plan = Plan(algorithm="ring")
        return simulate(make_task(op, 900, 0), plan, topology, 1 << 18, is_exact=False)

    extended, whole = time(32), time(300)
    assert extended.time_s == pytest.approx(whole.time_s, rel=1e-9)
    assert extended.bytes_sent == pytest.approx(whole.bytes_sent)
    assert (extended.num_steps, extended.num_messages) == (whole.num_steps, whole.num_messages)


def test_uplinks_are_shared():
    """One gigabit for two ranks: theory 201 ms flat, 403 ms badly ordered, 134 ms in two levels."""
    n, seconds = 16 << 20, 8 * (16 << 20) / 1e9
    flat = run("ring", 4, n, h=2, links=GIGABIT)
    mixed = run("ring", 4, n, h=2, links=GIGABIT, is_interleaved=True)
    two_level = run("hierarchical", 4, n, h=2, links=GIGABIT)
    assert flat.time_s == pytest.approx(1.5 * seconds, rel=0.06)
    assert mixed.time_s == pytest.approx(3 * seconds, rel=0.06)
    assert two_level.time_s == pytest.approx(seconds, rel=0.06)
    assert flat.uplink_bytes == pytest.approx(1.5 * n)
    assert mixed.uplink_bytes == pytest.approx(2 * 1.5 * n)
    assert two_level.uplink_bytes == pytest.approx(n)


def test_latency_between_hosts():
    """64 bytes, 1 ms between hosts: the two-level form crosses it twice."""
    links = Links(local=GIGABIT.local, remote=Link(alpha_s=1e-3, beta_s_per_byte=8e-9), uplinks=1)
    two_level = run("hierarchical", 4, 64, h=2, links=links).time_s
    flat = run("ring", 4, 64, h=2, links=links).time_s
    mixed = run("ring", 4, 64, h=2, links=links, is_interleaved=True).time_s
    assert two_level < flat <= mixed
    assert 2 < flat / two_level < 3.5


def test_links_work_both_ways_at_the_same_time():
    """Two ranks that swap take no longer than one that sends."""
    one_way = run("one_shot", 2, 1 << 20, op="send_recv").time_s
    assert run("one_shot", 2, 1 << 21, op="all_to_all").time_s == pytest.approx(one_way)


def test_a_gap_shorter_than_alpha_lets_messages_follow():
    quick = Link(alpha_s=1e-3, beta_s_per_byte=0.0, gap_s=1e-5)
    done = run("ring", 3, 8, op="broadcast", slices=5, links=Links(local=quick, remote=quick))
    assert done.time_s == pytest.approx(2 * 1e-3 + 4 * 1e-5)


def test_transfers_can_be_watched():
    seen = []
    topology = Topology(ranks=4, links=UNIFORM)
    task, plan = make_task("all_reduce", 4, 0), Plan(algorithm="ring")
    done = simulate(task, plan, topology, 1024, on_transfer=seen.append)
    assert len(seen) == done.num_messages == 24
    assert {t.num_bytes for t in seen} == {256}
    assert max(t.stop_s for t in seen) == pytest.approx(done.time_s)


def test_too_large_a_case_is_refused():
    with pytest.raises(CapacityError, match="too many to simulate: take fewer ranks"):
        run("one_shot", 24_576, 64)


@pytest.mark.parametrize("key", list(ALGORITHMS), ids="-".join)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("n", [256, 1 << 22])
def test_formulas_are_near_the_simulation(key, preset, n):
    op, name = key
    for h, m in ((1, 8), (4, 4), (3, 3)):
        topology = Topology(ranks=h * m, hosts=h, links=PRESETS[preset])
        plan, task = Plan(algorithm=name, hosts=h), make_task(op, h * m, 0)
        simulated = simulate(task, plan, topology, n).time_s
        assert 0.4 < predict(task, plan, topology, n).time_s / simulated < 2.5


@pytest.mark.parametrize("p", [3, 5, 6, 7, 11, 12, 13, 24, 28])
@pytest.mark.parametrize("algorithm", ["recursive_doubling", "rabenseifner"])
def test_formulas_know_the_steps_where_p_is_no_power_of_two(algorithm, p):
    task, plan = make_task("all_reduce", p, p), Plan(algorithm=algorithm)
    topology = Topology(ranks=p)
    done = simulate(task, plan, topology, 64)
    cost = predict(task, plan, topology, 64)
    assert cost.num_steps == done.num_steps
    assert cost.time_s == pytest.approx(done.time_s, rel=0.1)
