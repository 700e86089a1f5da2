"""Log probabilities of one position, as users see them."""

from tokenmill.backends.base import Logprobs
from tokenmill.engine.outputs import Logprob, TokenLogprobs


def row_logprobs(logprobs: Logprobs | None, row: int, token: int, num_top: int) -> TokenLogprobs:
    """Those of `token`, which is the row's target, and of the `num_top` most likely tokens."""
    assert logprobs is not None, "a step gave no log probabilities, but a row wants them"
    found = {token: Logprob(float(logprobs.targets[row]), int(logprobs.ranks[row]))}
    ids, values = logprobs.top_ids[row, :num_top].tolist(), logprobs.top[row, :num_top].tolist()
    for rank, (token_id, value) in enumerate(zip(ids, values, strict=True), start=1):
        found.setdefault(token_id, Logprob(value, rank))
    return found
