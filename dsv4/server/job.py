"""From what a client asked to prompts and sampling; everything that can be refused is refused here."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv4.chat.encode import Prompt, encode_messages
from dsv4.chat.replay import replay_known
from dsv4.engine.request import Grammar, Sampling
from dsv4.llm import LLM
from dsv4.server.fields import need_answers, need_call, of
from dsv4.server.held import chat_grammar, shown_schema, text_grammar
from dsv4.server.refusal import Refusal
from dsv4.server.said import Said
from dsv4.server.schema import ChatRequest, CompletionRequest, Generating, TokenizeRequest

COMPLETION_TOKENS = 16  # what /v1/completions has always given to those who do not say
ANSWERED = "a message of role tool for each call, right behind them"
_SEEDS = 1 << 31


@dataclass(frozen=True)
class Job:
    """One prompt and the answers wanted of it, each with its sampling.

    `in_reasoning`: how a chat answer begins; None for a plain text. `tools`: whether calls may be made, `one_call`:
    whether the first ends the answer. `echo` is shown before each answer. `said`: who remembers what is sampled.
    """

    prompt: tuple[int, ...]
    answers: tuple[Sampling, ...]
    in_reasoning: bool | None = None
    tools: bool = False
    one_call: bool = False
    echo: str = ""
    said: Said | None = None


def chat_job(asked: ChatRequest, llm: LLM, said: Said | None = None) -> Job:
    """A chat as a job, its answers so far as `said` knows them. PromptError, RequestError or Refusal if none can be."""
    prompt, ids = chat_prompt(asked, llm, said)
    limit = asked.max_completion_tokens or asked.max_tokens
    if asked.max_tokens not in (None, limit):
        raise Refusal("max_tokens and max_completion_tokens differ", param="max_tokens", do="send one of them")
    if asked.top_logprobs and not asked.logprobs:
        raise Refusal("top_logprobs without logprobs", param="top_logprobs", do='add "logprobs": true')
    candidates = asked.top_logprobs or 0 if asked.logprobs else None
    tools = asked.tools or any(message.get("tools") for message in asked.messages)
    offered = asked.tool_choice != "none" and bool(tools)
    answers = _held(_answers(asked, ids, llm, limit, candidates), chat_grammar(asked, llm, prompt))
    return Job(ids, answers, prompt.in_reasoning, offered, asked.parallel_tool_calls is False, said=said)


def chat_prompt(asked: ChatRequest, llm: LLM, said: Said | None) -> tuple[Prompt, tuple[int, ...]]:
    """A chat as the model reads it, and as ids."""
    tools = [] if asked.tool_choice == "none" else asked.tools or []  # then the model does not hear of them
    prompt = rendered(asked, llm, tools)
    return prompt, tuple(replay_known(prompt.pieces, said.find if said else lambda _: (), llm.tokenizer))


def check_calls(messages: Sequence[dict[str, Any]]) -> None:
    """Behind each turn of the model that calls come messages of tools, one or more for each call and no others."""
    calls: set[str] = set()
    unanswered: set[str] = set()
    made = ""
    for n, message in enumerate(messages):
        if message["role"] == "tool":
            unanswered.discard(need_call(f"messages.{n}.tool_call_id", message.get("tool_call_id"), calls))
            continue
        need_answers(made, unanswered, ANSWERED)
        made = f"messages.{n}.tool_calls"
        given = message.get("tool_calls") or () if message["role"] == "assistant" else ()
        calls = {of(f"{made}.{place}", call, "id", str) for place, call in enumerate(given)}
        unanswered = set(calls)
    need_answers(made, unanswered, ANSWERED)


def completion_jobs(asked: CompletionRequest, llm: LLM) -> list[Job]:
    """One job for each prompt, in their order."""
    if asked.best_of not in (None, asked.n or 1):
        raise Refusal("best_of", param="best_of", got=asked.best_of, wanted="the same as n", do="leave it out")
    if asked.echo and asked.logprobs is not None:
        raise Refusal("echo with logprobs is not supported", param="echo", do="leave one of them out")
    jobs, grammar = [], text_grammar(asked, llm)
    for prompt in _prompts(asked.prompt):
        begin = asked.add_special_tokens is not False
        ids = text_ids(prompt, llm, begin) if isinstance(prompt, str) else list(prompt)
        answers = _held(_answers(asked, ids, llm, asked.max_tokens, asked.logprobs, COMPLETION_TOKENS), grammar)
        echo = (prompt if isinstance(prompt, str) else llm.tokenizer.decode(ids)) if asked.echo else ""
        jobs.append(Job(tuple(ids), answers, echo=echo))
    return jobs


def text_ids(text: str, llm: LLM, begin: bool) -> list[int]:
    """Ids of a text, behind the token for the beginning of a sentence if asked. No letters make a control token."""
    return [llm.tokenizer.bos_id] * begin + llm.tokenizer.encode_text(text)


def _prompts(given: str | Sequence[Any]) -> Iterable[str | Sequence[int]]:
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


def rendered(asked: ChatRequest | TokenizeRequest, llm: LLM, tools: Sequence[dict[str, Any]]) -> Prompt:
    """The messages of a request as a prompt."""
    go_on = bool(asked.continue_final_message)
    if isinstance(asked, ChatRequest) and asked.add_generation_prompt not in (None, not go_on):
        wanted = "the contrary of continue_final_message"
        raise Refusal("add_generation_prompt", param="add_generation_prompt", got=not go_on, wanted=wanted)
    thinking, effort = _thinking(asked)
    return encode_messages(
        asked.messages or [],
        llm.dialect,
        thinking=thinking,
        effort=effort,
        tools=tools,
        response_format=shown_schema(asked, llm),
        continue_final=go_on,
    )


def _thinking(asked: ChatRequest | TokenizeRequest) -> tuple[bool, str | None]:
    """Whether to think and how hard. There are three ways to say it, and two may not contradict each other."""
    said: dict[str, bool] = {}
    if asked.thinking is not None:
        if set(asked.thinking) != {"type"} or asked.thinking["type"] not in ("enabled", "disabled"):
            wanted = '{"type": "enabled"} or {"type": "disabled"}'
            raise Refusal("thinking", param="thinking", got=str(asked.thinking)[:60], wanted=wanted)
        said["thinking"] = asked.thinking["type"] == "enabled"
    for name, value in (asked.chat_template_kwargs or {}).items():
        if name not in ("thinking", "enable_thinking"):
            wanted = "thinking or enable_thinking"
            raise Refusal("chat_template_kwargs", param="chat_template_kwargs", got=repr(name[:60]), wanted=wanted)
        said[f"chat_template_kwargs.{name}"] = value
    effort = asked.reasoning_effort
    if effort == "none":
        said["reasoning_effort"], effort = False, None
    if len(set(said.values())) > 1:
        raise Refusal("thinking is switched on and off at once", param="thinking", got=", ".join(said))
    return next(iter(said.values()), True), effort


def _answers(
    asked: Generating,
    ids: Sequence[int],
    llm: LLM,
    limit: int | None,
    candidates: int | None,
    usual: int | None = None,
) -> tuple[Sampling, ...]:
    """Sampling of each of the n answers; number i has the seed + i, and a request without a seed draws one."""
    llm.engine.check(ids)
    room = llm.engine.capacity - len(ids)
    if limit is not None and limit > room:
        raise Refusal(
            "prompt and answer do not fit into the context",
            param="max_tokens",
            code="context_length_exceeded",
            got=f"{len(ids)} tokens of prompt and max_tokens {limit}",
            wanted=f"max_tokens up to {room}, {llm.engine.capacity} tokens in all",
        )
    tokens = limit or min(room, usual or room)
    changes: dict[str, Any] = {"temperature": asked.temperature, "top_p": asked.top_p, "min_p": asked.min_p}
    changes["top_k"] = 0 if asked.top_k == -1 else asked.top_k
    changes = {name: value for name, value in changes.items() if value is not None}
    seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
    first = replace(
        llm.defaults,
        **changes,
        seed=seed,
        max_tokens=tokens,
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
        logit_bias=_bias(asked.logit_bias or {}),
        trace=0 if candidates is None else tokens,
        candidates=candidates or 0,
    )
    llm.engine.check(ids, first)
    return tuple(replace(first, seed=seed + number) for number in range(asked.n or 1))


def _held(answers: tuple[Sampling, ...], grammar: Grammar | None) -> tuple[Sampling, ...]:
    return tuple(replace(sampling, grammar=grammar) for sampling in answers)


def _bias(given: dict[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = [name for name in given if not (name.isascii() and name.isdecimal())]
    if wrong:
        raise Refusal("logit_bias", param="logit_bias", got=repr(wrong[0][:60]), wanted="token ids as keys")
    return tuple((int(name), amount) for name, amount in given.items())
