"""The order of every summation, stated once. Kernels and the reference both follow it.

What a sequence says may depend on nothing but the weights, the formats and the instruction-set
row. So each sum below is defined by the operands alone: never by how many rows are computed
together, how a prompt was cut, or how many threads there are.

Linear.       Per output: groups of GROUP along k, ascending. One dot a group, from zero, k
              ascending (in pairs for bf16, the later of a pair first, each by an fma; Arm's dot
              instruction sums a pair in its own way; in quads for int8, where nothing is rounded).
              Then acc = fma(scale, dot, acc), then acc = fma(minimum, sum of x in the group, acc).
              A format without scale adds the dot. The bias is added after the last group.
Group sums.   Lane l of LANES takes x[l] + x[l + LANES]; then the tree.
Norm.         Lane l takes x[l], x[l + LANES], ... squared, by fma, ascending; then the tree.
              A head_norm counts l from its head's start. A layer_norm adds x in the same way for
              the mean, and then the squares of what is left.
Attention.    Positions are split at multiples of KV_CHUNK, counted from the sequence's start;
              those outside a window have no weight and are not read.
              In a chunk: q.k over the head's dimensions in stored order, the maximum, exp; lane l
              sums the weights of positions l, l + LANES, ..., then the tree; p.v ascending by
              position. Chunks are merged ascending by the online softmax. A token reads back the
              stored (rounded) keys and values, those of its own step included.
Experts.      Chances are summed like a norm, experts ascending. An expert's linear is a linear;
              what a token's experts made is added by fma from zero, the one of most weight first.
Adapters.     A x is summed like a norm: lane l takes a[l] x[l], a[l + LANES] x[l + LANES], ... by
              fma, ascending; then the tree. Where both are bf16, lane l takes the pair 2l, 2l + 1
              of each GROUP, as a linear's dot does. B (A x) is added up by fma from zero, ranks
              ascending up to the adapter's own (in pairs for bf16, again as in a linear), and
              then added to the linear's result, the bias included.
Int8 cache.   Each run of GROUP stored dimensions of a head has one scale, max|x| / 127.
Sampling.     Probabilities are summed like a norm, ids ascending.
Tree.         Lanes are halved: lane l takes l + 8, then l + 4, l + 2, l + 1.
"""

import numpy as np
import numpy.typing as npt

GROUP = 32
LANES = 16
KV_CHUNK = 256

F32Array = npt.NDArray[np.float32]


def tree_sum(lanes: F32Array) -> F32Array:
    """Sum the last axis (LANES wide) by halving."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def lane_sum(values: F32Array) -> F32Array:
    """Sum the last axis: lane by lane ascending, then the tree. Short ends count as zero."""
    count = -(-values.shape[-1] // LANES)
    short = count * LANES - values.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, short)])
    vectors = padded.reshape(*values.shape[:-1], count, LANES)
    lanes = np.zeros((*values.shape[:-1], LANES), np.float32)
    for i in range(count):
        lanes = lanes + vectors[..., i, :]
    return tree_sum(lanes)


def padded_head(head_dim: int) -> int:
    """Stored dimensions of a head: each half filled up to whole vectors."""
    half = (head_dim + 1) // 2
    return 2 * LANES * -(-half // LANES)


def stored_dims(head_dim: int, *, is_turned: bool) -> npt.NDArray[np.intp]:
    """Which dimension lies where in a stored head; -1 is filling.

    Queries and keys are turned in pairs (d, d + D/2), so vectors of the two halves alternate:
    both ends of a pair lie in the same lane of neighbouring vectors. Values lie as they are.
    """
    size = padded_head(head_dim)
    dims = np.full(size, -1, np.intp)
    if not is_turned:
        dims[:head_dim] = np.arange(head_dim)
        return dims
    half = head_dim // 2
    halves = np.full((2, size // 2), -1, np.intp)
    halves[0, :half], halves[1, : head_dim - half] = np.arange(half), np.arange(half, head_dim)
    return halves.reshape(2, -1, LANES).swapaxes(0, 1).reshape(-1)
