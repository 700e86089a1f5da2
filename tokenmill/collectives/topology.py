"""What a collective runs on, as the cost models see it: hosts, links and their constants.

A message of n bytes takes alpha + n * beta on its way, and n * gamma more where it is reduced. Each
rank has a port out and a port in, which work at the same time (full duplex) and pass one message
after the other, overhead + n * beta each. Between hosts a message also passes the uplink of its
host and the downlink of the other one, which the ranks of a host share. Between two ranks a message
leaves at the earliest gap + n * beta after the one before.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path

from tokenmill.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Link:
    """Constants of a kind of link. `gap_s` is the part of alpha in which nothing else may leave."""

    alpha_s: float
    beta_s_per_byte: float
    gap_s: float | None = None
    """None: all of alpha, as in the formulas of textbooks."""
    overhead_s: float = 0.0
    """Seconds for which a message keeps a port, besides those of its bytes."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise UsageError(f"{f.name} of a link is {value}, but must be 0 or more")

    @property
    def busy_s(self) -> float:
        """Seconds that a message of no bytes keeps the link."""
        return self.alpha_s if self.gap_s is None else self.gap_s


@dataclass(frozen=True, kw_only=True)
class Links:
    """Fitted constants of a machine or of a cluster."""

    local: Link
    """Between ranks of a host."""
    remote: Link
    """Between hosts."""
    gamma_s_per_byte: float = 0.0
    uplinks: int = 0
    """Ways out of a host, each with the bandwidth of `remote`; rank i of a host uses number i
    modulo so many. 0: one for each rank."""

    def __post_init__(self) -> None:
        if not (isfinite(self.gamma_s_per_byte) and self.gamma_s_per_byte >= 0):
            raise UsageError(f"gamma is {self.gamma_s_per_byte}, but must be 0 or more")
        if self.uplinks < 0:
            raise UsageError(f"uplinks is {self.uplinks}, but must be 0 or more")


PRESETS = {
    # NVLink and a 200 Gbit/s adapter for each rank; alpha as in NCCL's model of the LL protocol.
    "gpu": Links(
        local=Link(alpha_s=0.6e-6, beta_s_per_byte=1 / 200e9, overhead_s=0.05e-6),
        remote=Link(alpha_s=2.7e-6, beta_s_per_byte=1 / 25e9, gap_s=1e-6, overhead_s=0.25e-6),
        gamma_s_per_byte=1 / 1000e9,
    ),
    # Shared memory, and one 10 Gbit/s adapter for all ranks of a host.
    "cpu": Links(
        local=Link(alpha_s=5e-6, beta_s_per_byte=1 / 8e9, overhead_s=1e-6),
        remote=Link(alpha_s=40e-6, beta_s_per_byte=1 / 1.25e9, overhead_s=8e-6),
        gamma_s_per_byte=1 / 10e9,
        uplinks=1,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Where the ranks are. Raises UsageError where they do not spread evenly."""

    ranks: int
    hosts: int = 1
    links: Links = field(default_factory=lambda: PRESETS["gpu"])
    is_interleaved: bool = False
    """Rank r is on host r % hosts, not on host r // (ranks / hosts)."""

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.hosts < 1:
            raise UsageError(f"{self.ranks} ranks on {self.hosts} hosts: there must be at least 1")
        if self.ranks % self.hosts:
            raise UsageError(
                f"{self.ranks} ranks cannot be spread evenly over {self.hosts} hosts: "
                f"give a number of hosts that divides {self.ranks}"
            )

    @property
    def ranks_per_host(self) -> int:
        return self.ranks // self.hosts

    @property
    def uplinks(self) -> int:
        """Ways out of a host."""
        return min(self.links.uplinks or self.ranks_per_host, self.ranks_per_host)

    @property
    def flows_per_uplink(self) -> int:
        """Messages that share a way out when every rank of a host sends one."""
        return -(-self.ranks_per_host // self.uplinks)

    def host(self, rank: int) -> int:
        return rank % self.hosts if self.is_interleaved else rank // self.ranks_per_host

    def local_rank(self, rank: int) -> int:
        """The rank's number among those of its host."""
        return rank // self.hosts if self.is_interleaved else rank % self.ranks_per_host

    def members(self, host: int) -> range:
        """The ranks of a host."""
        if self.is_interleaved:
            return range(host, self.ranks, self.hosts)
        return range(host * self.ranks_per_host, (host + 1) * self.ranks_per_host)


def read_links(path: Path) -> Links:
    """Fitted constants from a JSON file such as `write_links` writes. Raises UsageError."""
    try:
        values = json.loads(path.read_text())
        return _make_links(values)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} holds no constants of links: {error}") from None


def links_text(links: Links) -> str:
    """Constants as JSON that `read_links` takes."""
    return json.dumps(asdict(links), indent=2) + "\n"


def _make_links(values: Mapping[str, object]) -> Links:
    given = dict(values)
    made = {name: Link(**given.pop(name)) for name in ("local", "remote")}  # type: ignore[arg-type]
    return Links(**made, **given)  # type: ignore[arg-type]  # unknown names raise TypeError
