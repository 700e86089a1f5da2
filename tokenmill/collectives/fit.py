"""Constants of a link from measured times: a straight line, seconds over bytes.

Errors count relative to the time, as small messages matter as much as large ones:
the sum of ((alpha + beta n - t) / t)^2 is least, with neither constant below 0.
"""

from collections.abc import Sequence

from tokenmill.collectives.topology import Link
from tokenmill.errors import UsageError


def fit_link(samples: Sequence[tuple[float, float]]) -> Link:
    """The link on which a message of so many bytes takes so many seconds one way (half of a
    ping-pong's). Raises UsageError for fewer than two sizes, or times that are not above 0."""
    if len({num_bytes for num_bytes, _ in samples}) < 2:
        raise UsageError("constants of a link need times of at least two sizes")
    if any(not seconds > 0 for _, seconds in samples):
        raise UsageError("constants of a link need times above 0")
    # In x = 1/t and y = n/t the line is alpha x + beta y = 1.
    xs = [1 / seconds for _, seconds in samples]
    ys = [num_bytes / seconds for num_bytes, seconds in samples]
    xx, yy = _dot(xs, xs), _dot(ys, ys)
    xy, x, y = _dot(xs, ys), sum(xs), sum(ys)
    determinant = xx * yy - xy * xy
    alpha = (x * yy - y * xy) / determinant
    beta = (y * xx - x * xy) / determinant
    if alpha < 0:
        alpha, beta = 0.0, y / yy
    if beta < 0:
        alpha, beta = x / xx, 0.0
    return Link(alpha_s=alpha, beta_s_per_byte=beta)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
