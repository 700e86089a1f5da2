"""What the double tree asks of the network: hops, and half vectors on ports and uplinks."""

from dataclasses import dataclass, replace
from functools import lru_cache

from tokenmill.collectives.algorithms import tree


@dataclass(frozen=True, kw_only=True)
class TreeShape:
    """The double tree as the network sees it."""

    hops: int
    local_hops: int
    remote_hops: int
    """On the path with most remote hops."""
    port_messages: int
    """Half vectors that the busiest rank sends, up and down both trees."""
    uplink_messages: int
    """Half vectors that leave the busiest host, up and down both trees."""

    def below_a_root(self, *, is_far: bool) -> "TreeShape":
        """With one more place above the roots of both trees."""
        return replace(
            self,
            hops=self.hops + 1,
            local_hops=self.local_hops + (not is_far),
            remote_hops=self.remote_hops + is_far,
        )


@lru_cache(maxsize=64)
def tree_shape(p: int, m: int, h: int) -> TreeShape:
    """Count the links of both trees, with m neighbours to a host."""
    hops = remote_hops = 0
    sent = [0] * p
    leaving = [0] * max(h, -(-p // m))
    for which in tree.TREES:
        nodes = [tree.node(place, p, which) for place in range(p)]
        order = [place for place in range(p) if nodes[place].parent < 0]
        depth, far = [0] * p, [0] * p
        for place in order:
            for child in nodes[place].children:
                is_far = h > 1 and child // m != place // m
                depth[child] = depth[place] + 1
                far[child] = far[place] + is_far
                sent[place] += 1
                sent[child] += 1
                leaving[place // m] += is_far
                leaving[child // m] += is_far
                order.append(child)
        hops = max(hops, *depth)
        remote_hops = max(remote_hops, *far)
    return TreeShape(
        hops=hops,
        local_hops=hops - remote_hops,
        remote_hops=remote_hops,
        port_messages=max(sent),
        uplink_messages=max(leaving),
    )
