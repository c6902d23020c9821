"""What a client may send: the fields that do something, those that may be ignored, and no others.

A field that this server does not know is refused, because an answer that silently lacks what was asked for is a wrong
answer. IGNORED lists fields that cannot change an answer; NEUTRAL those that are taken with values that ask for
nothing. A field that is null counts as absent, as in OpenAI's own clients.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsv4.server.refusal import Refusal

IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prediction",  # a hint at speed
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "priority",
    }
)
NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "modalities": (["text"],),
    "functions": ([],),
    "suffix": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "separate_reasoning": (True,),
    "include_reasoning": (True,),
    "background": (False,),
    "truncation": ("disabled",),
}
# What else to do.
_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "regex", "ebnf", "grammar")
ADVICE = dict.fromkeys(_GUIDED, "send structured_outputs")
_KEPT = ("previous_response_id", "conversation")
ADVICE |= dict.fromkeys(_KEPT, "send all that was said so far as input: this server keeps nothing")

Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
Ids = Annotated[list[int], Field(min_length=1)]


class Sent(BaseModel):
    """Any body. Types are taken as sent: "0.5" is no number."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None


class Generating(Sent):
    """What all that generate have in common. Numbers out of range are refused where sampling is made of them."""

    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    max_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    seed: Seed | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    logit_bias: dict[str, Number] | None = None
    timeout: Annotated[Number, Field(gt=0)] | None = None  # seconds; the server's own deadline counts where it is less
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(Generating):
    """`POST /v1/chat/completions`. Messages and tools are checked by the chat room, which renders them."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    thinking: dict[str, str] | None = None
    chat_template_kwargs: dict[str, bool] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Generating):
    """`POST /v1/completions`. A text is text: control tokens in it are letters; give ids to have them count."""

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class TokenizeRequest(Sent):
    """`POST /tokenize`: a text, or messages as the chat endpoint would render them."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: dict[str, str] | None = None
    chat_template_kwargs: dict[str, bool] | None = None
    reasoning_effort: str | None = None
    response_format: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    parse_special: bool | None = None


class DetokenizeRequest(Sent):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, Field(ge=0, lt=1 << 32)]]


T = TypeVar("T", bound=Sent)


def read(kind: type[T], sent: bytes) -> T:
    """A body, checked. Refusal that names the field."""
    try:
        asked = kind.model_validate_json(sent)
    except ValidationError as error:
        raise _refusal(error) from None
    for name, value in (asked.model_extra or {}).items():
        if value is None or name in IGNORED or any(_same(value, neutral) for neutral in NEUTRAL.get(name, ())):
            continue
        only = " or ".join(repr(neutral) for neutral in NEUTRAL.get(name, ()))
        raise Refusal(
            f"{name[:60]!r} is not supported and would change the answer",
            param=name[:60],
            code="unsupported_parameter",
            wanted=f"{only}, or no such field" if only else None,
            do=ADVICE.get(name, "leave it out"),
        )
    for name in asked.stream_options or {} if isinstance(asked, Generating) else ():
        if name not in ("include_usage", "include_obfuscation"):  # the second asks for padding of a wire
            raise Refusal("stream_options", param="stream_options", got=repr(name[:60]), wanted="include_usage")
    return asked


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(error: ValidationError) -> Refusal:
    """The first faulty field. Of a union's branches pydantic lists each; the one that fits best tells what is wrong."""
    faults = error.errors(include_url=False, include_context=False)
    same = [fault for fault in faults if fault["loc"][:1] == faults[0]["loc"][:1]]
    fault = max(same, key=lambda fault: (not fault["type"].endswith("_type"), len(fault["loc"])))
    param = ".".join(str(part) for part in fault["loc"][:1]) or None
    got = None if fault["type"] in ("missing", "json_invalid") else repr(fault["input"])[:60]
    return Refusal(f"{param or 'the body'}: {fault['msg']}", param=param, code="invalid_value", got=got)
