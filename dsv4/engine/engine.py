"""The loop: schedule, run, accept."""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from dsv4.engine.request import Candidate, Delta, Request, Sampling, TextStream, Trace
from dsv4.engine.runner import Runner
from dsv4.engine.scheduler import Scheduler
from dsv4.engine.stop import StopText, finish_reason
from dsv4.errors import RequestError
from dsv4.ops.sample import sample

RANKING = 5  # candidates shown by a trace


class Engine:
    """Many requests over one model. `step` until `busy` is false; each step returns what it gave to whom."""

    def __init__(
        self, runner: Runner, chunk: int, eos: int, roles: Container[int], text: Callable[[], TextStream]
    ) -> None:
        self._runner, self._eos, self._roles, self._text = runner, eos, roles, text
        self._scheduler = Scheduler(len(runner.store.lengths), chunk)
        self._requests: dict[int, Request] = {}
        self._count = 0

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """Queue a prompt; returns the request's number. RequestError if it is empty or leaves no room for a token."""
        capacity = self._runner.store.capacity
        if not prompt:
            raise RequestError("the prompt is empty", wanted="at least one token")
        if len(prompt) >= capacity:
            raise RequestError("the prompt leaves no room for an answer", got=f"{len(prompt)} tokens",
                               wanted=f"less than the context of {capacity}", do="shorten it or raise --max-context")
        vocabulary = self._runner.model.config.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise RequestError("a token id of the prompt does not exist", got=f"{min(prompt)} to {max(prompt)}",
                               wanted=f"0 to {vocabulary - 1}")
        request = Request(self._count, tuple(prompt), sampling, self._text(), StopText(sampling.stop))
        self._count += 1
        self._requests[request.number] = request
        self._scheduler.add(request)
        return request.number

    def cancel(self, number: int) -> None:
        """Drop a request. Its slot is free for the next step; an unknown number is one that ended already."""
        request = self._requests.pop(number, None)
        if request is not None:
            self._scheduler.remove(request)

    def step(self) -> list[Delta]:
        """Run one step of the model over all requests that fit, and accept its tokens."""
        for request in self._scheduler.admit():
            self._runner.reset(request.slot)
        work = self._scheduler.schedule()
        if not work:
            return []
        logits = self._runner.run(work)
        for item in work:
            item.request.done = item.end
        sampled = [item.request for item in work if item.sample]
        return [self._accept(request, row) for request, row in zip(sampled, logits, strict=True)]

    def _accept(self, request: Request, logits: Tensor) -> Delta:
        asked, place = request.sampling, len(request.output)
        token = _choose(logits, asked, request.length)
        trace = _trace(logits, token) if place < asked.trace else None
        request.output.append(token)
        room = self._runner.store.capacity - request.length
        finish = finish_reason(token, self._eos, self._roles, len(request.output), asked.max_tokens, room)
        silent = finish in ("stop", "role_token")
        text, hit = request.stop_text.push("" if silent else request.text.push(token))
        if hit:
            finish = "stop_string"
        elif finish:
            rest, hit = request.stop_text.push(request.text.finish())
            text += rest if hit else rest + request.stop_text.finish()
        if finish:
            request.finish = finish
            self.cancel(request.number)
        return Delta(request.number, token, text, finish, trace)


def _choose(logits: Tensor, asked: Sampling, position: int) -> int:
    """The uniform number is a function of seed and position alone, so that a request can be resumed or replayed."""
    if not bool(torch.isfinite(logits).all()):
        raise FloatingPointError(f"the model's logits at position {position} are not finite")
    u = random.Random(f"{asked.seed}/{position}").random()
    return sample(logits, u, asked.temperature, asked.top_k, asked.top_p, asked.min_p)


def _trace(logits: Tensor, token: int) -> Trace:
    logs = torch.log_softmax(logits.double(), 0)
    best = torch.topk(logs, min(RANKING, len(logs)))
    ranking = zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    entropy = float(-(logs.exp() * logs).sum())
    return Trace(float(logs[token].exp()), tuple(Candidate(i, p) for i, p in ranking), entropy)
