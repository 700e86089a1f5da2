"""How the hidden states of a text become one vector: what a user may ask for."""

from dataclasses import dataclass

from tokenmill import config
from tokenmill.errors import UsageError

POOLINGS = tuple(name for name in config.POOLINGS if name != "auto")


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """`pooling` takes the state of the last token, the mean of all, or that of the first (cls).

    Or the greatest value of each feature (max), the sum divided by the root of the length, or the
    mean in which the state at position p counts p + 1 times.
    Of the vector the first `dimensions` are kept (None: all), and it is brought to length 1 if it
    is to `normalize`. Raises UsageError.
    """

    pooling: str = "last"
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise UsageError(f"pooling is {self.pooling!r}, but must be one of {known}")
        size = self.dimensions
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UsageError(f"dimensions is {size!r}, but must be a whole number of at least 1")

    def span(self, prompt_len: int) -> tuple[int, int]:
        """The positions [start, stop) whose states are wanted."""
        match self.pooling:
            case "last":
                return prompt_len - 1, prompt_len
            case "cls":
                return 0, 1
            case _:
                return 0, prompt_len
