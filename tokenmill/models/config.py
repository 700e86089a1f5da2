"""What an architecture needs to know of a model, whatever kind of file it was read from."""

from dataclasses import dataclass, replace

from tokenmill.ir.graph import Attr


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How heads are turned by position: `frequencies` in radians a position, or from `theta`."""

    theta: float = 10_000.0
    frequencies: tuple[float, ...] = ()
    magnitude: float = 1.0  # what cosines and sines are multiplied by
    num_positions: int = 0  # for how many it holds; 0: any number
    beyond: "Rope | None" = None  # what takes its place where texts may be longer

    @property
    def attrs(self) -> dict[str, Attr]:
        """The attributes of the operation."""
        grows: dict[str, Attr] = {} if self.magnitude == 1 else {"magnitude": self.magnitude}
        if self.frequencies:
            return {"frequencies": self.frequencies, **grows}
        return {"theta": self.theta, **grows}


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """In what one layer may differ from another."""

    rope: Rope | None = Rope()  # None: positions are not told
    window: int = 0  # a token attends to what is less than so far from it; 0: all
    is_dense: bool = False  # an MLP where other layers have experts
    is_first: bool = False  # where the first layer is unlike the others


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of each layer that has any."""

    count: int
    per_token: int
    size: int  # inner features of one
    is_renormalized: bool  # the weights of the chosen ones add up to 1


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What only a model has in which tokens see those behind them."""

    num_positions: int = 0  # rows of the table of positions; 0: there is none
    first_position: int = 0  # the row of a sequence's first token
    num_segments: int = 0  # rows of the table of segments; 0: there is none
    num_labels: int = 0  # of a classifier; 0: there is none


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The sizes and options of one model, a decoder or an encoder; all of them checked.

    `vocab_size` is the number of embedding rows: it may exceed the tokenizer's entries.
    """

    architecture: str  # a name in models/registry.py
    name: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerKind, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # dimensions of a head that turn, the first ones in files
    intermediate_size: int
    norm_eps: float
    context_length: int
    long_context_length: int = 0  # with the ropes for longer texts; 0: there are none
    is_tied: bool  # the LM head is the embedding
    has_head: bool = True  # False: it ends in states, and generates no text
    has_attention_bias: bool = False  # on q, k and v
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0  # 0: none
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0  # 0: none
    experts: Experts | None = None
    encoder: Encoder | None = None  # None: a decoder
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def longest_context(self) -> int:
        """Tokens of the longest text that the model can be loaded for."""
        return max(self.context_length, self.long_context_length)

    def stretched_to(self, length: int) -> "ModelConfig":
        """The config for texts of so many tokens, where that takes the ropes for longer ones.

        One cache cannot hold keys turned in two ways, so texts of any length get these ropes then.
        """
        if not self.context_length < length <= self.long_context_length:
            return self
        layers = (
            replace(kind, rope=kind.rope.beyond) if kind.rope and kind.rope.beyond else kind
            for kind in self.layers
        )
        return replace(
            self,
            layers=tuple(layers),
            context_length=self.long_context_length,
            long_context_length=0,
        )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def window(self) -> int:
        """The widest window of a layer that keeps no more than it; 0: none does."""
        return max(kind.window for kind in self.layers) if self.encoder is None else 0

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def score_scale(self) -> float:
        """What q.k is multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
