"""What the fusing passes share: who makes and who uses a value, and putting nodes together."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenmill.ir.graph import Function, Node, fuse


@dataclass(frozen=True)
class Links:
    """Makers and users of the values of one function, by name."""

    makers: dict[str, Node]
    users: dict[str, list[Node]]
    returns: tuple[str, ...]

    @staticmethod
    def of(function: Function) -> "Links":
        makers = {v.name: node for node in function.nodes for v in node.results}
        users: dict[str, list[Node]] = {}
        for node in function.nodes:
            for name in dict.fromkeys(node.operands):
                users.setdefault(name, []).append(node)
        return Links(makers, users, function.returns)

    def maker(self, name: str, op: str) -> Node | None:
        """The plain `op` node that makes a value, if that is what makes it."""
        node = self.makers.get(name)
        return node if node is not None and node.op == op else None

    def only_user(self, node: Node) -> Node | None:
        """The single node that uses a node's value, unless it is returned too."""
        users = self.users.get(node.result.name, [])
        return users[0] if len(users) == 1 and node.result.name not in self.returns else None

    def roundings(self, node: Node) -> list[Node]:
        """The `round` nodes on a node's value, if nothing else uses it."""
        users = self.users.get(node.result.name, [])
        is_private = node.result.name not in self.returns
        return users if is_private and all(u.op == "round" for u in users) else []


def group(function: Function, members: Iterable[Node]) -> Function:
    """Replace nodes by one fused node, which takes the place of the last of them.

    Nobody outside may read what they make before the last of them stands.
    """
    chosen = {id(node) for node in members}
    inside = [n for n in function.nodes if id(n) in chosen]
    outside = [n for n in function.nodes if id(n) not in chosen]
    wanted = {o for n in outside for o in n.operands} | set(function.returns)
    wanted |= {n.result.name for n in inside if n.op == "kv_write"}
    fused = fuse(inside, wanted)
    nodes = [
        fused if node is inside[-1] else node
        for node in function.nodes
        if id(node) not in chosen or node is inside[-1]
    ]
    return function.with_nodes(nodes)
