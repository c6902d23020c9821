"""The loop: schedule, run, accept."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch import Tensor

from dsv4.cache.pages import Pages
from dsv4.engine.choose import Chosen, Row, choose, trace
from dsv4.engine.request import NONE, Delta, Request, Sampling, TextStream
from dsv4.engine.runner import Runner
from dsv4.engine.scheduler import Scheduler, Work
from dsv4.engine.speculate import Confirmed, Drafter
from dsv4.engine.stop import StopText, finish_reason
from dsv4.errors import DSV4Error, NumericsError, RequestError
from dsv4.ops.op import PURE, Choices, under


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
    ) -> None:
        """`choices`: what the model's ops run as, where nobody says otherwise around `step`; `turn`: as in options."""
        self._runner, self._eos, self._roles, self._text, self._drafter = runner, eos, roles, text, drafter
        self.drafted = self.confirmed = 0  # tokens guessed so far, and how many of them the model chose as well
        store = runner.store
        self._scheduler = Scheduler(len(store.lengths), chunk, Pages(store.page_count, store.page, store.points), turn)
        self._requests: dict[int, Request] = {}
        self._count = 0
        self._choices = choices

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    @property
    def stalled(self) -> bool:
        """Whether `step` can do nothing until a request is added, cancelled or released."""
        return self._scheduler.stalled

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
        """Run one step of the model over all requests that fit, and accept its tokens."""
        with under(self._choices):
            return self._step()

    def _step(self) -> list[Delta]:
        self._admit()
        work = self._scheduler.schedule()
        if not work:
            return []
        streams, logits = self._runner.run(work)
        counts = [item.asked for item in work]
        chosen = iter(self._choose(work, logits))
        deltas: list[Delta] = []
        confirmed = []
        for item, seen, rows in zip(work, streams.split([one.size for one in work]), logits.split(counts), strict=True):
            deltas += self._accept(item, rows, [next(chosen) for _ in rows])
            request, start, end = item.request, item.start, item.request.done
            if request.finish != "error":
                confirmed.append(Confirmed(request, start, end, seen[: end - start]))
        if self._drafter is not None and confirmed:
            self._drafter.propose(confirmed)
        for request, start, *_ in confirmed:
            self._remember(request, start)
            if request.finish:
                self.cancel(request.number)
        return deltas

    def _admit(self) -> None:
        """Give slots to those whose turn it is, and bring the slots to where their requests can go on from."""
        store = self._runner.store
        for request in self._scheduler.in_the_way():
            self._leave(request)
        for request in self._scheduler.admit():
            store.reset(request.slot, request.done)
            store.assign(request.slot, request.pages)
            if request.point is not None:
                store.restore(request.point, request.slot, request.done)

    def _remember(self, request: Request, start: int) -> None:
        """Let others go on from what has run since `start`."""
        store = self._runner.store
        if store.points:
            self._scheduler.share(request)
            for place, length in self._scheduler.points(request, start):
                store.keep(place, request.slot, length)

    def _leave(self, request: Request) -> None:
        """Take the slot from a request; it goes on from here, if its state is still kept when it is admitted again."""
        if self._runner.store.points and request.done:
            place = self._scheduler.keep(request, request.done)
            if place is not None:
                self._runner.store.keep(place, request.slot, request.done)
        self._scheduler.turn_out(request)

    def _choose(self, work: Sequence[Work], logits: Tensor) -> list[Chosen]:
        """The model's own token behind every row, together; what a grammar says of it is asked when its turn comes."""
        rows = [Row(item.request.sampling, item.request.length + n) for item in work for n in range(item.asked)]
        return choose(logits, rows)

    def _accept(self, item: Work, logits: Tensor, chosen: Sequence[Chosen]) -> list[Delta]:
        """Take the model's own token behind each row, up to the first that the draft did not guess; forget the rest."""
        request, deltas = item.request, []
        request.done, request.draft = item.end, ()
        for guess, row, one in zip((*item.draft, None), logits, chosen, strict=False):
            deltas.append(self._emit(request, row, one))
            self.confirmed += deltas[-1].token == guess
            if request.finish or deltas[-1].token != guess:
                break
            request.done += 1
        if item.draft and request.finish is None:
            self._runner.store.rewind(request.slot, request.done)
        self.drafted += len(item.draft)
        return deltas

    def _emit(self, request: Request, logits: Tensor, chosen: Chosen) -> Delta:
        if not chosen.finite:
            return self._fail(request, _not_finite(request.length))
        asked, matcher, token = request.sampling, request.matcher, chosen.token
        try:
            mask = matcher.mask() if matcher else None
        except RequestError as error:
            return self._fail(request, error)
        request.hash.update(chosen.mark)
        if mask is not None:
            token = choose(logits.unsqueeze(0), [Row(asked, request.length, mask)])[0].token
        whole = matcher is not None and matcher.accept(token)
        shown = trace(logits, token, asked.candidates) if len(request.output) < asked.trace else None
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


def _not_finite(position: int) -> NumericsError:
    return NumericsError(
        f"the model's logits at position {position} are not finite",
        do="the weights are damaged, or overflow this dtype: check the files, try float32",
    )
