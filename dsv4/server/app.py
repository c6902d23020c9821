"""The endpoints."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from dsv4 import __version__
from dsv4.errors import DSV4Error
from dsv4.llm import LLM
from dsv4.server.anthropic_in import CountRequest, MessagesRequest, chat_request
from dsv4.server.anthropic_out import Message, message_events
from dsv4.server.choice import Choice
from dsv4.server.describe import request_body, responses
from dsv4.server.guard import Guard
from dsv4.server.job import Job, chat_job, chat_prompt, check_calls, completion_jobs, rendered, text_ids
from dsv4.server.metrics import Metrics
from dsv4.server.options import ServerOptions
from dsv4.server.refusal import Refusal, body, refused
from dsv4.server.responses_in import ResponsesRequest, response_job
from dsv4.server.responses_out import Answer, opened, response_events, response_lines
from dsv4.server.said import Said
from dsv4.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, Sent, TokenizeRequest, read
from dsv4.server.shapes import Head, Json, whole_answer
from dsv4.server.static import FILES, served
from dsv4.server.stream import EventStream, chunk_events, pushed, whole
from dsv4.server.worker import Reading, Worker

_text_log = logging.getLogger("dsv4.server.text")


class Service:
    """A loaded model behind HTTP. `app` is what a web server runs, `worker` what it has to drain."""

    def __init__(self, llm: LLM, options: ServerOptions) -> None:
        self.llm, self.options, self.metrics = llm, options, Metrics()
        self.worker, self.said = Worker(llm, options, self.metrics), Said()
        self.started, self.fingerprint = int(time.time()), fingerprint(llm)
        # Newer versions of FastAPI would report exceptions, messages included, to wherever the environment says.
        silent = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
        pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "telemetry": silent}
        api = FastAPI(title="dsv4", version=__version__, lifespan=self._life, **pages)
        api.add_exception_handler(DSV4Error, _on_error)
        api.add_exception_handler(HTTPException, _on_http_error)
        api.add_exception_handler(Exception, _on_surprise)
        for path, page in self._pages().items():
            api.add_api_route(path, page, methods=["GET"], response_model=None, responses=responses(path))
        for path, (endpoint, kind) in self._endpoints().items():
            about: dict[str, Any] = {"responses": responses(path), "openapi_extra": request_body(kind)}
            api.add_api_route(path, endpoint, methods=["POST"], response_model=None, **about)
        for path, file in FILES.items():  # no part of the API, which is what /openapi.json describes
            api.add_route(path, served(file), include_in_schema=False)
        self.app = Guard(api, options)

    def _pages(self) -> dict[str, Callable[..., Any]]:
        return {
            "/health": self.health,
            "/ready": self.ready,
            "/version": self.version,
            "/metrics": self.metrics_page,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
        }

    def _endpoints(self) -> dict[str, tuple[Callable[..., Any], type[Sent]]]:
        return {
            "/v1/chat/completions": (self.chat, ChatRequest),
            "/v1/completions": (self.completions, CompletionRequest),
            "/v1/responses": (self.responses, ResponsesRequest),
            "/v1/messages": (self.messages, MessagesRequest),
            "/v1/messages/count_tokens": (self.count_tokens, CountRequest),
            "/tokenize": (self.tokenize, TokenizeRequest),
            "/detokenize": (self.detokenize, DetokenizeRequest),
        }

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)

    # --- how it is -------------------------------------------------------------------------------------------------

    async def health(self) -> Response:
        """200 while the engine lives; 503 when it has stopped, and while one of its steps is past the limit."""
        ills = {"the engine has stopped": self.worker.crash, "the engine hangs": self.worker.hang}
        for status, reason in ills.items():
            if reason is not None:
                return JSONResponse({"status": status, "reason": reason}, 503)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 while new requests are taken and get on; 503 when it is shutting down, has stopped or hangs."""
        self.worker.check()
        if self.worker.hang is not None:
            raise Refusal(f"the engine hangs: {self.worker.hang}", status=503, code="engine_hangs")
        return JSONResponse({"status": "ok"})

    async def version(self) -> Json:
        """Of the program, and the fingerprint of what decides its answers."""
        return {"version": __version__, "system_fingerprint": self.fingerprint}

    async def metrics_page(self) -> Response:
        """For Prometheus."""
        worker, engine = self.worker, self.llm.engine
        gauges = {
            "requests_running": ("Requests that have a slot", float(worker.live - worker.waiting)),
            "requests_waiting": ("Requests in the queue", float(worker.waiting)),
            "slots": ("Requests that can run at once", float(worker.slots)),
            "step_age_seconds": ("Time that the engine's current step has run, 0 between steps", worker.step_age),
            "start_seconds": ("From the process's start to a loaded model", self.llm.started.total),
            "cache_pages": ("Pages of the cache", float(engine.pages.count)),
            "cache_pages_used": ("Pages that requests hold; all others can be had at once", float(engine.pages.in_use)),
        }
        counters = {
            "prompt_tokens_cached_total": ("Tokens of prompts that an earlier request had left", float(engine.reused)),
            "preemptions_total": ("Requests that gave their slot to one that waited", float(engine.preempted)),
            "draft_tokens_total": ("Tokens guessed by the draft", float(engine.drafted)),
            "draft_accepted_tokens_total": ("Guesses that the model confirmed", float(engine.confirmed)),
        }
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")

    async def models(self) -> Json:
        """The one model, by each of its names."""
        return {"object": "list", "data": [self._model(name) for name in self.options.names]}

    async def model(self, name: str) -> Json:
        """One of them."""
        self._check_name(name)
        return self._model(name)

    def _model(self, name: str) -> Json:
        """Beside what OpenAI has: the context, and the efforts that can be asked for, the usual one first."""
        said = {"id": name, "object": "model", "created": self.started, "owned_by": "dsv4"}
        dialect = self.llm.dialect
        efforts = [effort for effort, text in dialect.efforts.items() if text is not None]
        efforts.sort(key=lambda effort: effort != dialect.default_effort)
        return said | {"max_model_len": self.llm.engine.capacity, "reasoning_efforts": efforts}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name not in self.options.names:
            raise Refusal(
                "there is no such model",
                status=404,
                param="model",
                code="model_not_found",
                got=repr(name[:60]),
                wanted=" or ".join(self.options.names),
            )

    # --- words -----------------------------------------------------------------------------------------------------

    async def tokenize(self, request: Request) -> Json:
        """Ids of a text, or of messages as /v1/chat/completions renders them."""
        asked = await self._read(TokenizeRequest, request)
        ids = await asyncio.to_thread(self._tokenized, asked)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.llm.engine.capacity}

    def _tokenized(self, asked: TokenizeRequest) -> list[int]:
        if (asked.prompt is None) == (asked.messages is None):
            raise Refusal("what to tokenize", wanted="either prompt or messages")
        if asked.prompt is None:
            return self.llm.tokenizer.encode_prompt(rendered(asked, self.llm, asked.tools or ()).pieces)
        if asked.parse_special:
            return self.llm.tokenizer.encode_raw(asked.prompt)
        return text_ids(asked.prompt, self.llm, asked.add_special_tokens is not False)

    async def detokenize(self, request: Request) -> Json:
        """Text of ids."""
        asked = await self._read(DetokenizeRequest, request)
        return {"prompt": self.llm.tokenizer.decode(asked.tokens)}

    # --- answers ---------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """Messages in, an answer out."""
        asked = await self._read(ChatRequest, request)
        jobs = await self._made(partial(self._chat_jobs, asked))
        return await self._answer(request, asked, jobs, chat=True)

    def _chat_jobs(self, asked: ChatRequest) -> list[Job]:
        job = chat_job(asked, self.llm, self.said)
        check_calls(asked.messages)  # behind it, for they have a shape now
        return [job]

    async def completions(self, request: Request) -> Response:
        """Texts in, their continuations out."""
        asked = await self._read(CompletionRequest, request)
        jobs = await self._made(partial(completion_jobs, asked, self.llm))
        return await self._answer(request, asked, jobs, chat=False)

    async def messages(self, request: Request) -> Response:
        """Messages in, an answer out, as Anthropic's clients say it."""
        asked = await self._read(MessagesRequest, request)
        jobs = await self._made(lambda: [chat_job(chat_request(asked), self.llm, self.said)])
        name, (choice,), reading = self._begun(jobs, asked.timeout)
        message = Message(f"msg_{name}", asked.model or self.options.names[0], choice, len(choice.job.prompt))
        if asked.stream:
            return EventStream(self.worker, reading, message_events(reading, message))
        return await whole(request, self.worker, reading, pushed(reading, [choice]), message.whole)

    async def responses(self, request: Request) -> Response:
        """Items in, items out: OpenAI's newer endpoint, without a memory."""
        asked = await self._read(ResponsesRequest, request)
        jobs = await self._made(lambda: [response_job(asked, self.llm, self.said)])
        name, (choice,), reading = self._begun(jobs, asked.timeout)
        head = opened(asked, name, asked.model or self.options.names[0], self.fingerprint, choice)
        answer = Answer(head, name, choice)
        if asked.stream:
            return EventStream(self.worker, reading, response_lines(reading, answer))
        return await whole(request, self.worker, reading, response_events(reading, answer), answer.whole)

    async def count_tokens(self, request: Request) -> Json:
        """How long the prompt of /v1/messages would be."""
        asked = await self._read(CountRequest, request)
        _, ids = await asyncio.to_thread(lambda: chat_prompt(chat_request(asked), self.llm, self.said))
        return {"input_tokens": len(ids)}

    async def _made(self, make: Callable[[], list[Job]]) -> list[Job]:
        """Tokenising a long prompt takes a while: others are served meanwhile. What is refused is counted."""
        try:
            return await asyncio.to_thread(make)
        except DSV4Error:
            self.metrics.ended["refused"] += 1
            raise

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, jobs: Sequence[Job], *, chat: bool
    ) -> Response:
        name, choices, reading = self._begun(jobs, asked.timeout)
        model = asked.model or self.options.names[0]
        head = Head(f"{'chatcmpl' if chat else 'cmpl'}-{name}", int(time.time()), model, self.fingerprint, chat)
        prompt_tokens = sum(len(job.prompt) for job in jobs)
        if asked.stream:
            events = chunk_events(reading, head, choices, prompt_tokens, asked.include_usage)
            return EventStream(self.worker, reading, events)
        said = partial(whole_answer, head, choices, prompt_tokens)
        return await whole(request, self.worker, reading, pushed(reading, choices), said)

    def _begun(self, jobs: Sequence[Job], timeout: float | None) -> tuple[str, list[Choice], Reading]:
        """Jobs handed to the engine: a name for them, their answers, and where these come from."""
        name = uuid.uuid4().hex
        wanted = [(job, sampling) for job in jobs for sampling in job.answers]
        told = partial(log_text, name) if self.options.log_text else None
        choices = [Choice(n, job, self.llm.tokenizer, name, told) for n, (job, _) in enumerate(wanted)]
        try:
            reading = self.worker.submit([(job.prompt, sampling) for job, sampling in wanted], timeout)
        except DSV4Error:
            self.metrics.ended["refused"] += 1
            raise
        for job in jobs if told else ():
            log_text(name, prompt=self.llm.tokenizer.decode(job.prompt))
        return name, choices, reading

    async def _read(self, kind: type[Any], request: Request) -> Any:
        try:
            asked: Sent = read(kind, await request.body())
            self._check_name(asked.model)
        except DSV4Error:
            self.metrics.ended["refused"] += 1
            raise
        return asked


def log_text(name: str, **said: object) -> None:
    """What was asked or answered, as the model reads and writes it: a line of JSON."""
    _text_log.info(json.dumps({"request": name} | said, ensure_ascii=False))


def fingerprint(llm: LLM) -> str:
    """A name for all that decides the bits of an answer: version, model, formats, numerics, device, kernels."""
    options = llm.resolved.options
    weights = dict(llm.resolved.facts).get("weights")
    said = (llm.config, weights, options.numerics, options.dtype, options.device, sorted(options.choices.items()))
    return f"dsv4-{__version__}-{hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DSV4Error)
    refusal = refused(error)
    return JSONResponse(body(refusal, request.url.path), refusal.status, refusal.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    refusal = Refusal(error.detail, status=error.status_code)
    return JSONResponse(body(refusal, request.url.path), error.status_code, headers)


async def _on_surprise(request: Request, error: Exception) -> Response:
    why = Refusal("the server made a mistake", status=500, code="internal_error", got=type(error).__name__)
    return JSONResponse(body(why, request.url.path), 500)
