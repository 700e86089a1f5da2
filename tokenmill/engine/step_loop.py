"""The loop that keeps the model busy: Python stays one step ahead of it and one behind."""

from typing import TYPE_CHECKING

from tokenmill.backends.base import CompiledModel, StepInput, StepOutput
from tokenmill.engine.prompt_budget import PromptBudget
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.speculation import Speculator
from tokenmill.engine.step import Step
from tokenmill.engine.step_input import StepBuilder

if TYPE_CHECKING:
    from tokenmill.models.adapters import Adapter


class StalledError(RuntimeError):
    """Work is there and nothing can be done: a bug of the scheduler's."""


class StepLoop:
    """Schedules, posts and commits steps of one compiled model, in one thread.

        model    | step n             | step n+1           |
        Python     schedule n+1 . wait, post . commit n, deliver, schedule n+2 . wait

    The next step is planned before the tokens of this one are seen: the native slots hold them.
    A sequence that turns out to have ended leaves a row in the next step whose token is dropped.
    Where a sequence cannot go on before its token is seen (penalties, guesses), step n is
    committed before n+1 is planned; the model then waits for Python, but nobody misses a step.
    """

    def __init__(
        self,
        compiled: CompiledModel,
        *,
        has_prefix_cache: bool = True,
        speculator: Speculator | None = None,
        prompt_budget: PromptBudget | None = None,
    ) -> None:
        self.scheduler = Scheduler(compiled.limits, has_prefix_cache=has_prefix_cache)
        self._compiled = compiled
        self._builder = StepBuilder(compiled.limits)
        self._speculator = speculator
        self._prompt_budget = prompt_budget
        self._in_flight: Step | None = None
        self._placed: dict[int, Adapter] = {}  # what lies in the model's slots for adapters
        self.is_idle = False  # the last turn neither posted a step nor committed one

    @property
    def has_work(self) -> bool:
        return self._in_flight is not None or self.scheduler.has_unfinished

    def turn(self) -> list[Sequence]:
        """Post the next step and commit the one in flight; returns the sequences that got tokens.

        The caller delivers these tokens while the model already runs the next step. Raises
        StalledError where sequences wait, no step is in flight, and none can be planned.
        """
        ended, advanced = self._in_flight, []
        had_step = ended is not None
        running = self.scheduler.running
        if self._speculator:
            self._speculator.decide(running)
        if ended and ended.needs_tokens:
            advanced = self.scheduler.commit(ended, self._wait())
            ended = None
        if self._speculator:
            self._speculator.propose(running)
        step = self.scheduler.schedule(
            self._prompt_budget.tokens() if self._prompt_budget else None
        )
        step_input = self._builder.build(step) if step else None
        output = self._wait() if ended else None
        if step and step_input:
            self._post(step, step_input)
        self._in_flight = step
        if ended and output:
            advanced = self.scheduler.commit(ended, output)
        self._note_progress(had_step or step is not None)
        return advanced

    def _note_progress(self, has_progressed: bool) -> None:
        """One turn without progress is allowed: who was preempted in it may run in the next."""
        was_idle, self.is_idle = self.is_idle, not has_progressed
        if was_idle and self.is_idle and self.scheduler.has_unfinished:
            num_running, num_waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            raise StalledError(
                f"{num_running} sequences run and {num_waiting} wait, but no step can be planned"
            )

    def drain(self) -> None:
        """Wait for the step in flight and drop its tokens."""
        if self._in_flight:
            self._wait()
            self._in_flight = None

    def close(self) -> None:
        """Free what the loop owns beside the model."""
        if self._speculator:
            self._speculator.close()

    def _post(self, step: Step, step_input: StepInput) -> None:
        if self._speculator:
            self._speculator.note_posted()
        if self._prompt_budget:
            self._prompt_budget.note_posted(step)
        self._place_adapters(step)
        self._compiled.post(step_input)

    def _place_adapters(self, step: Step) -> None:
        """Bring in the adapters of a step that are not there yet; none is in flight."""
        for sequence in (chunk.sequence for chunk in step.chunks):
            adapter, slot = sequence.adapter, sequence.adapter_slot
            if adapter is not None and self._placed.get(slot) is not adapter:
                self._compiled.set_adapter(slot, adapter.changes)
                self._placed[slot] = adapter

    def _wait(self) -> StepOutput:
        output = self._compiled.wait()
        if self._speculator:
            self._speculator.note_ended()
        if self._prompt_budget:
            self._prompt_budget.note_ended()
        return output
