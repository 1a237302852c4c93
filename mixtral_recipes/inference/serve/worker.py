"""The loop that continues what clients asked: rows join and leave the batch between two steps.

It runs in a process's main thread; the web server's thread hands requests in and gets text back. With several ranks
rank 0 says before each step what is new and who is gone, and all take the step.
"""

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mixtral_recipes.errors import RecipeError
from mixtral_recipes.inference.batch import Batch, Continuation, Row, fit
from mixtral_recipes.inference.model import InferenceModel
from mixtral_recipes.inference.sampling import Likelihood, Sampling
from mixtral_recipes.inference.serve.metrics import Metrics
from mixtral_recipes.inference.serve.requests import Refused, refusal
from mixtral_recipes.system.ranks import first, joined, rank_and_size

_HEARTBEAT_S = 10.0  # so long the other ranks wait for rank 0 at most


@dataclass(frozen=True)
class Grown:
    """What a continuation grew by.

    Attributes:
        text: New text that may be shown.
        likelihoods: Of its new tokens, if they were asked for.
        done: All of it, at its end.
    """

    text: str
    likelihoods: list[Likelihood]
    done: Continuation | None


OnText = Callable[[int, Grown], None]  # with a prompt's number


@dataclass(frozen=True)
class Ask:
    """One prompt of a request.

    Attributes:
        prompt: Its tokens.
        sampling: How it is continued.
        number: Which of the seed's streams is drawn from.
        watched: Whether text is wanted as it comes.
    """

    prompt: Sequence[int]
    sampling: Sampling
    number: int = 0
    watched: bool = False


@dataclass
class Ticket:
    """A request that was taken.

    Attributes:
        asks: Its prompts, by the numbers that all ranks know them by.
        on_text: Gets what comes of them.
        on_failure: Is told why nothing more will come.
        left: How many prompts have not ended.
        since: When it was taken.
        started: When its first token came; None before.
    """

    asks: dict[int, Ask]
    on_text: OnText
    on_failure: Callable[[Refused], None]
    left: int
    since: float = field(default_factory=time.monotonic)
    started: float | None = None


@dataclass
class _Plan:
    """What all ranks do before the next step."""

    new: dict[int, Ask] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    ends: bool = False


class Worker:
    """Continues requests, in as many ranks as the model has.

    Attributes:
        context: The most tokens of a prompt and its continuation.
        most: The most rows that run and wait.
        draining: Whether no more requests are taken.
        metrics: What is counted.
    """

    def __init__(self, model: InferenceModel, *, rows: int, context: int, most_waiting: int) -> None:
        """Make room.

        Args:
            model: The model.
            rows: The most rows of a data-parallel rank.
            context: The most tokens of a row.
            most_waiting: The most rows that wait for a place in the batch.
        """
        self._model = model
        self._size = rows
        self.context = context
        self.draining = False
        self.most = rows * model.places + most_waiting
        self.metrics = Metrics()
        self._batch = Batch(model, rows, context)
        self._rows: dict[int, Row] = {}
        self._numbers: dict[Row, int] = {}
        self._waiting: deque[Row] = deque()
        # Rank 0's:
        self._mail: queue.SimpleQueue[Ticket | list[int] | None] = queue.SimpleQueue()  # new, gone, or to stop at once
        self._tickets: dict[int, Ticket] = {}
        self._numbered = itertools.count()
        self._open = 0
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Make all room that will be needed; all ranks call it together, before anybody asks.

        On a GPU for the longest prompts too: a pass that finds no memory ends a server of several ranks.

        Raises:
            RecipeError: there is too little memory.
        """
        length = max(1, self.context - 1) if self._model.device.type == "cuda" else 1
        rows = [Row(self._model, [0] * length, Sampling(1)) for _ in range(self._batch.free)]
        try:
            self._batch.add(rows[: max(self._model.places, fit(rows, len(rows)))])
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"--batch-size {self._size} rows of --context-length {self.context} tokens need more memory than the "
                "GPU has free; lower one of them."
            ) from error

    def submit(self, asks: Sequence[Ask], on_text: OnText, on_failure: Callable[[Refused], None]) -> Ticket:
        """Take a request; called in the web server's thread.

        Raises:
            Refused: too many are waiting, or the server ends.
        """
        if self.draining:
            raise Refused("The server is shutting down; try another one.", status=503, kind="server_error")
        with self._lock:
            if self._open + len(asks) > self.most:
                self.metrics.refused.inc()
                raise Refused(
                    "Too many requests are waiting; try again later.",
                    status=429, kind="requests", code="rate_limit_exceeded",
                )  # fmt: skip
            self._open += len(asks)
        ticket = Ticket({next(self._numbered): ask for ask in asks}, on_text, on_failure, len(asks))
        self._mail.put(ticket)
        return ticket

    def give_up(self, ticket: Ticket) -> None:
        """The client of a request has gone; called in the web server's thread, also where all has come."""
        if ticket.left:
            self._mail.put(list(ticket.asks))

    def drain(self) -> None:
        """Take no more requests and end when those taken are answered; may be called in a signal handler."""
        self.draining = True
        self._mail.put([])

    def stop(self) -> None:
        """End after this step, whatever is open; may be called in a signal handler."""
        self.draining = True
        self._mail.put(None)

    def run(self) -> None:
        """Work until the end is asked for; all ranks call it together, and none returns before."""
        try:
            with joined() as group:
                while not (plan := first(self._next_plan, group)).ends:
                    self._follow(plan)
        finally:
            self.draining = True
            self._fail(Refused("The server has shut down.", status=503, kind="server_error"))

    def _next_plan(self) -> _Plan:
        """What came since the last step; waits where there is nothing to do. Rank 0's."""
        plan = _Plan()
        idle = not self._rows
        while True:
            if idle and self.draining and self._mail.empty() and not plan.new:
                plan.ends = True
                return plan
            try:
                message = self._mail.get(timeout=_HEARTBEAT_S) if idle and not plan.new else self._mail.get_nowait()
            except queue.Empty:
                return plan
            if message is None:
                plan.ends = True
                return plan
            if isinstance(message, Ticket):
                plan.new |= message.asks
                self._tickets |= dict.fromkeys(message.asks, message)
            else:
                plan.gone += [number for number in message if number in self._tickets]

    def _follow(self, plan: _Plan) -> None:
        """Change the batch as the plan says, and take a step."""
        for number, ask in plan.new.items():
            row = Row(self._model, ask.prompt, ask.sampling, number=ask.number, watched=ask.watched)
            self._rows[number], self._numbers[row] = row, number
            self._waiting.append(row)
        for number in plan.gone:
            if row := self._rows.get(number):
                self._forget(row)
        grown: list[tuple[Row, str]] = []
        try:
            if count := fit(self._waiting, self._batch.free):
                grown += self._batch.add([self._waiting.popleft() for _ in range(count)])
            if len(self._batch):
                grown += self._batch.step()
        except Exception as error:
            if rank_and_size()[1] > 1:
                raise  # the other ranks wait for this one's part
            told, waiting = refusal(error), set(self._waiting)
            for row in self._rows.values():
                if row not in waiting and not row.done:
                    row.failure = told
                    grown.append((row, ""))
            self._batch = Batch(self._model, self._size, self.context)
        texts: dict[Row, str] = {}  # a row's first two tokens come in one round, and the second may be its last
        for row, text in grown:
            texts[row] = texts.get(row, "") + text
        for row, text in texts.items():
            self._tell(row, text)
        self.metrics.running.set(len(self._batch))
        self.metrics.waiting.set(len(self._waiting))

    def _tell(self, row: Row, text: str) -> None:
        """Hand on what a row grew by; forget it at its end."""
        number = self._numbers.get(row)
        if number is None:
            return
        ticket = self._tickets.get(number)
        if ticket is not None and row.failure:
            ticket.on_failure(refusal(row.failure))  # and who asked gives up what else it asked for
        elif ticket is not None:
            if ticket.started is None:
                ticket.started = time.monotonic()
                self.metrics.first_token.observe(ticket.started - ticket.since)
            if row.done:
                ticket.left -= 1
                self.metrics.ended(row.done)
            if row.done or ticket.asks[number].watched:
                place = list(ticket.asks).index(number)
                ticket.on_text(place, Grown(text, row.untold(), row.done))
        if row.done or row.failure:
            self._close(row, number)

    def _forget(self, row: Row) -> None:
        """Let go of a row whose client has gone."""
        self._batch.remove([row])
        with contextlib.suppress(ValueError):
            self._waiting.remove(row)
        number = self._numbers[row]
        if ticket := self._tickets.get(number):
            ticket.left -= 1
        self.metrics.cancelled.inc()
        self._close(row, number)

    def _close(self, row: Row, number: int) -> None:
        self._rows.pop(number, None)
        self._numbers.pop(row, None)
        if self._tickets.pop(number, None):
            with self._lock:
                self._open -= 1

    def _fail(self, error: Refused) -> None:
        """Tell every open request that nothing more comes."""
        for ticket in {id(ticket): ticket for ticket in self._tickets.values()}.values():
            ticket.left = 0
            ticket.on_failure(error)
        self._waiting.clear()
        for number, row in list(self._rows.items()):
            self._close(row, number)
