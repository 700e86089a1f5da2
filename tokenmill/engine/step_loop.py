"""The loop that keeps the model busy: Python stays one step ahead of it and one behind."""

from tokenmill.backends.base import CompiledModel
from tokenmill.engine.scheduler import Scheduler, Step
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.step_input import StepBuilder


class StepLoop:
    """Schedules, posts and commits steps of one compiled model, in one thread.

        model    | step n             | step n+1           |
        Python     schedule n+1 . wait, post . commit n, deliver, schedule n+2 . wait

    The next step is planned before the tokens of this one are seen: the native slots hold them.
    A sequence that turns out to have ended leaves a row in the next step whose token is dropped.
    """

    def __init__(self, compiled: CompiledModel) -> None:
        self.scheduler = Scheduler(compiled.limits)
        self._compiled = compiled
        self._builder = StepBuilder(compiled.limits)
        self._in_flight: Step | None = None

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_unfinished

    def turn(self) -> list[Sequence]:
        """Post the next step and commit the one in flight; returns the sequences that got a token.

        The caller delivers these tokens while the model already runs the next step.
        """
        ended, tokens = self._in_flight, []
        step = self.scheduler.schedule()
        step_input = self._builder.build(step) if step else None
        if ended:
            tokens = self._wait()
        if step_input:
            self._compiled.post(step_input)
        self._in_flight = step
        return self.scheduler.commit(ended, tokens) if ended else []

    def drain(self) -> None:
        """Wait for the step in flight and drop its tokens."""
        if self._in_flight:
            self._wait()
            self._in_flight = None

    def _wait(self) -> list[int]:
        output = self._compiled.wait()
        return [] if output.tokens is None else output.tokens.tolist()
