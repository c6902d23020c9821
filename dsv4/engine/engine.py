"""The loop: schedule, run, draw, accept.

On a device that works beside the host (`ahead`) a step is launched before the tokens of the one before it are read: the
device has them already, and what the host makes of them (text, stop strings, what others may go on from) costs no time.
A request that turns out to be over was then launched once more for nothing, and nobody looks at that.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.cache.pages import Pages
from dsv4.cache.transfer import sent
from dsv4.engine.choose import Chosen, Drawn, Row, choose, draw, trace
from dsv4.engine.request import NONE, Delta, Request, Sampling, TextStream
from dsv4.engine.runner import Ran, Runner
from dsv4.engine.scheduler import Scheduler, Work
from dsv4.engine.speculate import Confirmed, Drafter
from dsv4.engine.stop import StopText, finish_reason
from dsv4.errors import DSV4Error, NumericsError, RequestError
from dsv4.model.batch import Unread
from dsv4.ops.op import PURE, Choices, under


class _Flight(NamedTuple):
    """A step that was launched, and whose tokens were not read."""

    work: list[Work]
    ran: Ran
    drawn: Drawn
    broken: dict[int, DSV4Error]  # by request: what its grammar said in place of a mask


class Engine:
    """Many requests over one model. `step` until `busy` is false; each step returns what it gave to whom."""

    def __init__(
        self,
        runner: Runner,
        chunk: int,
        eos: int,
        roles: Container[int],
        text: Callable[[], TextStream],
        drafter: Drafter | None = None,
        choices: Choices = PURE,
        turn: int = 512,
        ahead: bool = False,
    ) -> None:
        """`choices`: what the model's ops run as, where nobody says otherwise around `step`; `turn`: as in options.

        ahead: launch each step before the tokens of the last are read. Without a drafter, which needs these.
        """
        assert drafter is None or not ahead
        self._runner, self._eos, self._roles, self._text, self._drafter = runner, eos, roles, text, drafter
        self.drafted = self.confirmed = 0  # tokens guessed so far, and how many of them the model chose as well
        store = runner.store
        self._scheduler = Scheduler(len(store.lengths), chunk, Pages(store.page_count, store.page, store.points), turn)
        self._requests: dict[int, Request] = {}
        self._count = 0
        self._choices, self._ahead = choices, ahead
        self._flight: _Flight | None = None

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def stalled(self) -> bool:
        """Whether `step` can do nothing until a request is added, cancelled or released."""
        return self._flight is None and self._scheduler.stalled

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._scheduler.waiting)

    @property
    def preempted(self) -> int:
        """How often a request was put back into the queue so far, because another had waited long enough."""
        return self._scheduler.preempted

    @property
    def reused(self) -> int:
        """Tokens of prompts that did not run so far, because an earlier request had left what they leave."""
        return self._scheduler.reused

    @property
    def pages(self) -> Pages:
        """The books of the cache."""
        return self._scheduler.pages

    @property
    def capacity(self) -> int:
        """Tokens of prompt and answer that one sequence has room for."""
        return self._runner.store.capacity

    def check(self, prompt: Sequence[int], sampling: Sampling | None = None) -> None:
        """RequestError if a prompt is empty, leaves no room for a token, or holds what is no token id.

        Also for a `sampling` that biases a token which does not exist. Reads nothing that `step` changes.
        """
        capacity = self._runner.store.capacity
        if not prompt:
            raise RequestError("the prompt is empty", wanted="at least one token")
        if not all(isinstance(token, int) for token in prompt):
            raise RequestError("the prompt is no list of token ids", got=repr(prompt)[:60])
        if len(prompt) >= capacity:
            raise RequestError(
                "the prompt leaves no room for an answer",
                got=f"{len(prompt)} tokens",
                wanted=f"less than the context of {capacity}",
                do="shorten it or raise --max-context",
            )
        vocabulary = self._runner.model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError(
                "a token id of the prompt does not exist",
                got=f"{min(prompt)} to {max(prompt)}",
                wanted=f"0 to {vocabulary - 1}",
            )
        for id, _ in sampling.logit_bias if sampling else ():
            if id >= vocabulary:
                raise RequestError("logit_bias: no such token", got=id, wanted=f"0 to {vocabulary - 1}")

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Queue a prompt that `check` accepts; returns the request's number."""
        self.check(prompt, sampling)
        limit = min(len(prompt) + sampling.max_tokens, self._runner.store.capacity)
        request = Request(self._count, tuple(prompt), sampling, limit, self._text(), StopText(sampling.stop))
        request.matcher = sampling.grammar.start() if sampling.grammar else None
        self._count += 1
        self._requests[request.number] = request
        self._scheduler.add(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Drop a request. Its slot and its pages are free at once; an unknown number is one that ended already."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._scheduler.remove(request)

    def hold(self, number: int, held: bool) -> None:
        """Let a request take no part in steps, or release it; what it answers stays the same.

        It keeps its slot until somebody waits for one, and then waits behind those who do.
        """
        if number in self._requests:
            self._requests[number].held = held

    def step(self) -> list[Delta]:
        """Run one step of the model over all requests that fit, and accept its tokens, or those of the one before."""
        with under(self._choices):
            return self._step()

    def _step(self) -> list[Delta]:
        deltas = self._admit()
        last, self._flight = self._flight, None
        work = self._scheduler.schedule()
        if not work:
            return deltas + self._land(last)
        ran = self._runner.run(work, _unread(work, last))
        for item in work:
            item.request.done = item.end
            item.request.flying += item.sample
        deltas += self._land(last)
        flight = self._draw(work, ran)
        if not self._ahead:
            return deltas + self._land(flight)
        self._flight = flight
        return deltas

    def _admit(self) -> list[Delta]:
        """Give slots to those whose turn it is, and bring the slots to where their requests can go on from.

        Who has to leave is asked what it came to, if that is in flight.
        """
        store = self._runner.store
        deltas: list[Delta] = []
        leaving = self._scheduler.in_the_way()
        if leaving and self._flight is not None:
            deltas = self._land(self._flight)
            self._flight = None
            leaving = self._scheduler.in_the_way()  # some may be over now
        for request in leaving:
            self._leave(request)
        for request in self._scheduler.admit():
            store.reset(request.slot, request.done)
            store.assign(request.slot, request.pages)
            if request.point is not None:
                store.restore(request.point, request.slot, request.done)
        return deltas

    def _draw(self, work: list[Work], ran: Ran) -> _Flight:
        """Ask for the model's own token behind every row. A draft's later rows are drawn as if nothing held them."""
        rows: list[Row] = []
        broken: dict[int, DSV4Error] = {}
        for item in work:
            request, mask = item.request, None
            if item.sample and request.matcher and request.finish is None:
                try:
                    mask = request.matcher.mask()
                except RequestError as error:
                    broken[request.number] = error
            rows += [Row(request.sampling, item.end + n, None if n else mask) for n in range(item.asked)]
        if self._ahead and any(_traced(item.request) for item in work):
            ran = Ran(ran.streams, ran.logits.clone())  # what a graph has made lasts until it runs again
        return _Flight(work, ran, draw(ran.logits, rows), broken)

    def _land(self, flight: _Flight | None) -> list[Delta]:
        """Read the tokens of a step, and let requests and cache know of them."""
        if flight is None:
            return []
        chosen = flight.drawn.read()
        deltas: list[Delta] = []
        confirmed = []
        first = row = 0  # of each item's tokens, and of its logits
        for item in flight.work:
            request = item.request
            if self._requests.get(request.number) is request:  # else it was over before, or cancelled
                request.flying -= item.sample
                error = flight.broken.get(request.number)
                made = [self._fail(request, error)] if error else self._accept(item, flight, row, chosen)
                deltas += made
                if request.finish != "error":
                    end = item.end + max(len(made) - 1, 0)
                    confirmed.append(Confirmed(request, item.start, end, first))
            first, row = first + item.size, row + item.asked
        if self._drafter is not None and confirmed:
            self._drafter.propose(confirmed, flight.ran.streams)
        for request, start, end, _ in confirmed:
            self._remember(request, start, end)
            if request.finish:
                self.cancel(request.number)
        return deltas

    def _remember(self, request: Request, start: int, end: int) -> None:
        """Let others go on from positions start .. end - 1, which have run."""
        store = self._runner.store
        if store.points:
            self._scheduler.share(request, end)
            for place, length in self._scheduler.points(request, start, end):
                store.keep(place, request.slot, length)

    def _leave(self, request: Request) -> None:
        """Take the slot from a request; it goes on from here, if its state is still kept when it is admitted again."""
        if self._runner.store.points and request.done:
            place = self._scheduler.keep(request, request.done)
            if place is not None:
                self._runner.store.keep(place, request.slot, request.done)
        self._scheduler.turn_out(request)

    def _accept(self, item: Work, flight: _Flight, row: int, chosen: Sequence[Chosen]) -> list[Delta]:
        """Take the model's own token behind each row, up to the first that the draft did not guess; forget the rest.

        row: the item's first.
        """
        request = item.request
        deltas: list[Delta] = []
        request.draft = ()
        for guess, at in zip((*item.draft, None), range(row, row + item.asked), strict=False):
            deltas.append(self._emit(request, flight.ran.logits, at, chosen[at], first=at == row))
            self.confirmed += deltas[-1].token == guess
            if request.finish or deltas[-1].token != guess:
                break
        if item.draft:
            request.done = item.end + len(deltas) - 1
            if request.finish is None:
                self._runner.store.rewind(request.slot, request.done)
        self.drafted += len(item.draft)
        return deltas

    def _emit(self, request: Request, logits: Tensor, row: int, chosen: Chosen, first: bool) -> Delta:
        """chosen: behind a row of logits; first: of a step, whose mask was known when it was drawn."""
        if not chosen.finite:
            return self._fail(request, _not_finite(request.length))
        asked, matcher, token = request.sampling, request.matcher, chosen.token
        if matcher and not first:
            try:
                mask = matcher.mask()
            except RequestError as error:
                return self._fail(request, error)
            token = choose(logits[row, None], [Row(asked, request.length, mask)])[0].token
        request.hash.update(chosen.mark)
        whole = matcher is not None and matcher.accept(token)
        shown = trace(logits[row], token, asked.candidates) if _traced(request) else None
        request.output.append(token)
        room = self._runner.store.capacity - request.length
        finish = finish_reason(token, self._eos, self._roles, len(request.output), asked.max_tokens, room)
        silent = finish in ("stop", "role_token")
        if whole and not silent:
            finish = "stop"
        text, hit = request.stop_text.push("" if silent else request.text.push(token))
        if hit:
            finish = "stop_string"
        elif finish:
            rest, hit = request.stop_text.push(request.text.finish())
            text += rest if hit else rest + request.stop_text.finish()
        request.finish = finish
        cached = (request.cached or 0) if len(request.output) == 1 else 0
        said = request.hash.hexdigest() if finish else None
        return Delta(request.number, token, text, finish, shown, cached=cached, hash=said)

    def _fail(self, request: Request, error: DSV4Error) -> Delta:
        """End a request that cannot go on. No row reads another sequence's, so it is alone in this."""
        request.finish = "error"
        self.cancel(request.number)
        text, hit = request.stop_text.push(request.text.finish())
        return Delta(request.number, NONE, text if hit else text + request.stop_text.finish(), "error", error=error)


def _unread(work: Sequence[Work], last: _Flight | None) -> Unread | None:
    """The tokens of the step before, where they are this one's last ones."""
    if last is None:
        return None
    rows = {
        item.request.number: end - 1
        for item, end in zip(last.work, accumulate(i.asked for i in last.work), strict=True)
    }
    ends = accumulate(item.size for item in work)
    pairs = [(end - 1, rows[i.request.number]) for i, end in zip(work, ends, strict=True) if i.end > i.request.length]
    if not pairs:
        return None
    places, found = zip(*pairs, strict=True)
    return Unread(list(places), last.drawn.tokens[sent(torch.tensor(found), last.drawn.tokens.device)])


def _traced(request: Request) -> bool:
    return len(request.output) < request.sampling.trace


def _not_finite(position: int) -> NumericsError:
    return NumericsError(
        f"the model's logits at position {position} are not finite",
        do="the weights are damaged, or overflow this dtype: check the files, try float32",
    )
