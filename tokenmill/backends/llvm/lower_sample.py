"""Sampling: one row of logits becomes a token, as `ir/sampling.py` defines it.

Rows are shared out to threads. A greedy row without penalties is a plain argmax over the logits;
any other is worked on in a scratch row, so that the logits stay as the model gave them. Thresholds
are found by bisecting on the bits of a weight, which order like integers.
"""

from tokenmill.backends.llvm.emit import Function, Value, vector
from tokenmill.backends.llvm.lanes import F32, I32, Lanes
from tokenmill.backends.llvm.scope import Scope
from tokenmill.ir.graph import Node
from tokenmill.ir.order import LANES

_LOWEST = float("-inf")
_ONE_BITS = 0x3F800000
_I1 = vector("i1", LANES)


def lower_sample(scope: Scope, node: Node) -> None:
    f = scope.f
    sample, score = _sample_function(scope), _score_function(scope)
    with scope.share(scope.load("R")) as row:
        logits = scope.row_address(node.operands[0], row)
        arguments = (scope.context, f.widen(f.parameters[1]), row, logits)
        with f.when(scope.load("is_sampling").compare("ne", 0)):
            f.invoke(sample, *arguments)
        with f.when(scope.load("is_logprobs").compare("ne", 0)):
            f.invoke(score, *arguments)


_PARAMETERS = (("context", "ptr"), ("thread", "i64"), ("row", "i64"), ("logits", "ptr"))


def _sample_function(scope: Scope) -> Function:
    """`sample(context, thread, row, logits)`."""
    f = scope.module.function("sample_row", "void", _PARAMETERS)
    context, thread, row, logits = f.parameters
    inside = scope.within(f, context, scope.weights, scope.layer)
    _Sampler(inside, thread, row, logits).emit()
    f.ret()
    return f


def _score_function(scope: Scope) -> Function:
    """`score(context, thread, row, logits)`: what log probabilities are made of."""
    f = scope.module.function("score_row", "void", _PARAMETERS)
    context, thread, row, logits = f.parameters
    inside = scope.within(f, context, scope.weights, scope.layer)
    _Scorer(inside, thread, row, logits).emit()
    f.ret()
    return f


class _RowOfLogits:
    """One row of logits, and a scratch row to work on."""

    def __init__(self, scope: Scope, thread: Value, row: Value, logits: Value) -> None:
        self.scope = scope
        self.f = scope.f
        self.lanes = Lanes(scope.f, scope.row)
        self.row = row
        self.logits = logits
        self.vocab = scope.load("vocab")
        self.vectors = (self.vocab + (LANES - 1)) // LANES
        stride = scope.load("sample_stride")
        self.scratch = scope.load("sample_scratch", "ptr").at(thread * stride)

    def parameter(self, field: str, kind: str = "float") -> Value:
        return self.scope.element(field, self.row, kind)

    def inside(self, index: Value) -> Value:
        """Which lanes of a vector of ids are below `vocab`."""
        f = self.f
        left = self.lanes.splat(f.cast("trunc", self.vocab - index * LANES, "i32"))
        return f.lanes(I32, range(LANES)).compare("slt", left)

    def masked(self, row: Value, index: Value) -> Value:
        loaded = self.f.load(F32, row.at(index * 64))
        return self.f.select(self.inside(index), loaded, self.f.const(F32, _LOWEST))

    def copy_logits(self) -> None:
        with self.f.loop(0, self.vectors) as index:
            self.f.store(self.masked(self.logits, index), self.scratch.at(index * 64))

    def argmax(self, row: Value) -> Value:
        """The lowest id among the largest; each lane keeps its own best, then lanes compare."""
        f = self.f
        best = f.variable(F32, _LOWEST)
        places = f.variable(I32, 0)
        ids = f.lanes(I32, range(LANES))
        with f.loop(0, self.vectors) as index:
            values = self.masked(row, index)
            is_better = values.compare("ogt", best.get())
            here = ids + self.lanes.splat(f.cast("trunc", index * LANES, "i32"))
            places.set(f.select(is_better, here, places.get()))
            best.set(f.select(is_better, values, best.get()))
        top = self.lanes.splat(self.lanes.tree(best.get(), "max"))
        far = f.const(I32, 0x7FFFFFFF)
        candidates = f.select(best.get().compare("oeq", top), places.get(), far)
        found = self.lanes.tree(candidates, "min")
        return f.widen(f.select(found.compare("eq", 0x7FFFFFFF), f.const("i32", 0), found))


class _Sampler(_RowOfLogits):
    """The pieces of the sampler of one row while it is emitted."""

    def emit(self) -> None:
        f = self.f
        token = f.variable("i64", 0)
        is_greedy = self.parameter("temperature").compare("oeq", 0.0)
        is_plain = is_greedy & self.is_bare()
        with f.when(is_plain):
            token.set(self.argmax(self.logits))
        with f.when(is_plain ^ f.const("i1", 1)):
            self.copy_logits()
            self.forbid()
            self.add_biases()
            self.penalize()
            with f.when(is_greedy):
                token.set(self.argmax(self.scratch))
            with f.when(is_greedy ^ f.const("i1", 1)):
                token.set(self.draw_token())
        self.deliver(token.get())

    def is_bare(self) -> Value:
        """Whether nothing changes this row's logits."""
        ranges = [self.entries(field) for field in ("history_starts", "bias_starts")]
        is_free = self.parameter("mask_rows", "i32").compare("slt", 0)
        for start, stop in ranges:
            is_free = is_free & start.compare("eq", stop)
        return is_free

    def entries(self, field: str) -> tuple[Value, Value]:
        """This row's range of a ragged array."""
        starts = self.scope.load(field, "ptr").at(self.row * 4)
        f = self.f
        return f.widen(f.load("i32", starts)), f.widen(f.load("i32", starts.at(4)))

    def forbid(self) -> None:
        """Tokens whose bit in the row's mask is 0 are never sampled."""
        f = self.f
        mask_row = self.parameter("mask_rows", "i32")
        with f.when(mask_row.compare("sge", 0)):
            words = self.scope.load("masks", "ptr")
            mask = words.at(f.widen(mask_row) * self.scope.load("mask_words") * 4)
            lane_bits = f.lanes(I32, [1 << lane for lane in range(LANES)])
            with f.loop(0, self.vectors) as index:
                half = f.cast("zext", f.load("i16", mask.at(index * 2)), "i32")
                is_set = (self.lanes.splat(half) & lane_bits).compare("ne", 0)
                place = self.scratch.at(index * 64)
                f.store(f.select(is_set, f.load(F32, place), f.const(F32, _LOWEST)), place)

    def add_biases(self) -> None:
        f = self.f
        ids, values = (self.scope.load(n, "ptr") for n in ("bias_ids", "bias_values"))
        with f.loop(*self.entries("bias_starts")) as entry:
            place = self.scratch.at(f.widen(f.load("i32", ids.at(entry * 4))) * 4)
            f.store(f.load("float", place) + f.load("float", values.at(entry * 4)), place)

    def deliver(self, token: Value) -> None:
        f, scope = self.f, self.scope
        narrow = f.cast("trunc", token, "i32")
        slot = f.widen(scope.element("sample_slots", self.row))
        with f.when(slot.compare("sge", 0)):
            f.store(narrow, scope.load("slots", "ptr").at(slot * 4))
        f.store(narrow, scope.load("sampled", "ptr").at(self.row * 4))

    def penalize(self) -> None:
        f = self.f
        ids, counts = (self.scope.load(n, "ptr") for n in ("history_ids", "history_counts"))
        repetition = self.parameter("repetition_penalty")
        frequency, presence = (
            self.parameter("frequency_penalty"),
            self.parameter("presence_penalty"),
        )
        with f.loop(*self.entries("history_starts")) as entry:
            place = self.scratch.at(f.widen(f.load("i32", ids.at(entry * 4))) * 4)
            count = f.cast("sitofp", f.load("i32", counts.at(entry * 4)), "float")
            value = f.load("float", place)
            is_positive = value.compare("ogt", 0.0)
            value = f.select(is_positive, value / repetition, value * repetition)
            value = value - frequency * count
            seen = f.select(count.compare("ogt", 0.0), f.const("float", 1.0), 0.0)
            f.store(value - presence * seen, place)

    # -- drawing

    def draw_token(self) -> Value:
        f = self.f
        self.weigh()
        least = f.variable("float", self.parameter("min_p"))
        top_k = f.widen(self.parameter("top_k", "i32"))
        with f.when(top_k.compare("sgt", 0) & top_k.compare("slt", self.vocab)):
            wanted = f.cast("sitofp", top_k, "float")
            least.set(self.bisect(least.get(), wanted, counts=True))
        top_p = self.parameter("top_p")
        with f.when(top_p.compare("olt", 1.0)):
            wanted = top_p * self.mass(least.get(), counts=False)
            least.set(self.bisect(least.get(), wanted, counts=False))
        return self.draw(least.get())

    def weigh(self) -> None:
        """Scores become weights exp((score - top) / temperature); the largest is 1."""
        f, lanes = self.f, self.lanes
        rate = lanes.splat(f.const("float", 1.0) / self.parameter("temperature"))
        top = f.variable(F32, _LOWEST)
        with f.loop(0, self.vectors) as index:
            place = self.scratch.at(index * 64)
            scores = f.load(F32, place) * rate
            f.store(scores, place)
            top.set(lanes.maximum(scores, top.get()))
        highest = lanes.splat(lanes.tree(top.get(), "max"))
        with f.loop(0, self.vectors) as index:
            place = self.scratch.at(index * 64)
            f.store(lanes.exp(f.load(F32, place) - highest), place)

    def kept(self, index: Value, least: Value) -> Value:
        """A vector of weights, those below the threshold zero."""
        f = self.f
        weights = f.load(F32, self.scratch.at(index * 64))
        return f.select(weights.compare("oge", self.lanes.splat(least)), weights, 0.0)

    def mass(self, least: Value, *, counts: bool) -> Value:
        """How many ids reach the threshold, or their weights summed, lane by lane."""
        f = self.f
        total = f.variable(F32, 0.0)
        with f.loop(0, self.vectors) as index:
            weights = self.kept(index, least)
            if counts:
                one = f.const(F32, 1.0)
                loaded = f.load(F32, self.scratch.at(index * 64))
                reached = loaded.compare("oge", self.lanes.splat(least))
                weights = f.select(self.both(reached, self.inside(index)), one, 0.0)
            total.set(total.get() + weights)
        return self.lanes.tree(total.get())

    def both(self, a: Value, b: Value) -> Value:
        return self.f.op(_I1, f"and {_I1} {a.text}, {b.text}")

    def bisect(self, least: Value, wanted: Value, *, counts: bool) -> Value:
        """The largest threshold from `least` up to 1 that still keeps `wanted`."""
        f = self.f
        low = f.variable("i32", f.bitcast(least, "i32"))
        high = f.variable("i32", _ONE_BITS)
        with f.forever() as done:
            f.leave(low.get().compare("sge", high.get()), done)
            middle = low.get() + ((high.get() - low.get() + 1) >> 1)
            is_enough = self.mass(f.bitcast(middle, "float"), counts=counts).compare("oge", wanted)
            low.set(f.select(is_enough, middle, low.get()))
            high.set(f.select(is_enough, high.get(), middle - 1))
        return f.bitcast(low.get(), "float")

    def draw(self, least: Value) -> Value:
        """The first id where the running sum passes number * total (ir/sampling.draw)."""
        f = self.f
        total = f.variable("float", 0.0)
        with f.loop(0, self.vectors) as index:
            total.set(total.get() + self.lanes.tree(self.kept(index, least)))
        target = self.uniform() * total.get()
        running, block = f.variable("float", 0.0), f.variable("i64", 0)
        with f.forever() as found:
            after = running.get() + self.lanes.tree(self.kept(block.get(), least))
            f.leave(after.compare("ogt", target), found)
            f.leave(block.get().compare("sge", self.vectors - 1), found)
            running.set(after)
            block.set(block.get() + 1)
        return self.draw_in_block(block.get(), running.get(), target, least)

    def draw_in_block(self, block: Value, before: Value, target: Value, least: Value) -> Value:
        f = self.f
        running, last = f.variable("float", before), f.variable("i64", 0)
        is_open = f.variable("i1", 1)
        place = self.scratch.at(block * 64)
        with f.loop(0, LANES) as lane:
            weight = f.load("float", place.at(lane * 4))
            counts = weight.compare("oge", least) & weight.compare("ogt", 0.0) & is_open.get()
            with f.when(counts):
                last.set(lane)
                running.set(running.get() + weight)
                is_open.set(running.get().compare("ole", target))
        return block * LANES + last.get()

    def uniform(self) -> Value:
        """ir/sampling.uniform: SplitMix64 of (seed, position), top 24 bits."""
        f = self.f
        seed = self.scope.element("seeds", self.row, "i64")
        position = f.widen(self.parameter("sample_positions", "i32"))
        x = seed + (position + 1) * _signed(0x9E3779B97F4A7C15)
        x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
        x = (x ^ (x >> 31)) >> 40
        return f.cast("uitofp", x, "float") * 2.0**-24


class _Scorer(_RowOfLogits):
    """What the log probabilities of one row are made of; Python takes the logarithm."""

    def emit(self) -> None:
        f = self.f
        target = f.variable("i64", f.widen(self.parameter("logprob_targets", "i32")))
        with f.when(target.get().compare("slt", 0)):
            target.set(f.widen(self.parameter("sampled", "i32")))
        logit = f.load("float", self.logits.at(target.get() * 4))
        top, total, larger = self.sweep(logit)
        self.put("target_logits", logit)
        self.put("target_ranks", larger + 1)
        self.put("logit_tops", top)
        self.put("logit_sums", total)
        self.most_likely()

    def put(self, field: str, value: Value) -> None:
        self.f.store(value, self.scope.load(field, "ptr").at(self.row * 4))

    def sweep(self, logit: Value) -> tuple[Value, Value, Value]:
        """The largest logit, the sum of exp(logit - largest), and how many pass `logit`."""
        f, lanes = self.f, self.lanes
        top, total, larger = f.variable(F32, _LOWEST), f.variable(F32, 0.0), f.variable(I32, 0)
        with f.loop(0, self.vectors) as index:
            values = self.masked(self.logits, index)
            top.set(lanes.maximum(values, top.get()))
            passes = f.cast("zext", values.compare("ogt", lanes.splat(logit)), "i32")
            larger.set(larger.get() + passes)
        highest = lanes.tree(top.get(), "max")
        with f.loop(0, self.vectors) as index:
            values = self.masked(self.logits, index)
            total.set(total.get() + lanes.exp(values - lanes.splat(highest)))
        return highest, lanes.tree(total.get()), lanes.tree(larger.get())

    def most_likely(self) -> None:
        """The largest logits, one after another."""
        f = self.f
        count = self.scope.load("logprob_top")
        with f.when(count.compare("sgt", 0)):
            self.copy_logits()
        with f.loop(0, count) as rank:
            found = self.argmax(self.scratch)
            place = self.scratch.at(found * 4)
            at = (self.row * count + rank) * 4
            f.store(f.cast("trunc", found, "i32"), self.scope.load("top_ids", "ptr").at(at))
            f.store(f.load("float", place), self.scope.load("top_logits", "ptr").at(at))
            f.store(f.const("float", _LOWEST), place)


def _signed(value: int) -> int:
    """A 64-bit pattern as the signed integer that LLVM writes."""
    return value - (1 << 64) if value >> 63 else value
