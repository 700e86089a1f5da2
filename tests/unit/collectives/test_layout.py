"""Who is on which host, and what follows for topology and order."""

import pytest

from tokenmill.collectives import layout as module
from tokenmill.collectives.layout import default_host_id, make_layout
from tokenmill.collectives.topology import PRESETS


def test_ranks_in_the_order_of_their_hosts():
    layout = make_layout(["a", "a", "b", "b"])
    assert (layout.topology.ranks, layout.topology.hosts) == (4, 2)
    assert layout.order == ()
    assert layout.local_ranks(0) == (0, 1)
    assert layout.local_ranks(3) == (2, 3)


def test_ranks_dealt_out_to_hosts_are_put_in_order():
    layout = make_layout(["a", "b", "a", "b"])
    assert layout.topology.hosts == 2
    assert layout.order == (0, 2, 1, 3)
    assert layout.local_ranks(2) == (0, 2)


def test_hosts_of_different_sizes_are_one_level_of_far_links():
    links = PRESETS["cpu"]
    layout = make_layout(["a", "b", "a"], links)
    assert (layout.topology.ranks, layout.topology.hosts) == (3, 1)
    assert layout.topology.links.local == links.remote
    assert layout.topology.links.gamma_s_per_byte == links.gamma_s_per_byte
    assert layout.order == (0, 2, 1)


def test_the_host_id_of_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("TOKENMILL_HOST_ID", "rack 7")
    assert default_host_id() == "rack 7"


def test_a_host_has_another_id_after_a_boot(monkeypatch, tmp_path):
    monkeypatch.delenv("TOKENMILL_HOST_ID", raising=False)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "node")
    monkeypatch.setattr(module, "_BOOT_ID", tmp_path / "boot_id")
    assert default_host_id() == "node/"  # no Linux
    ids = []
    for text in ("1-2\n", "3-4\n"):
        (tmp_path / "boot_id").write_text(text)
        ids.append(default_host_id())
    assert ids == ["node/1-2", "node/3-4"]


@pytest.mark.parametrize("size", [1, 5])
def test_one_host(size):
    layout = make_layout(["a"] * size)
    assert layout.topology.hosts == 1
    assert layout.local_ranks(size - 1) == tuple(range(size))
