"""Answers through OpenAI's own client, streamed and whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.serving import FRANCE, OFF, STORY, Running, running

PARIS = "The capital of France is Paris."


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=4, max_context=256))


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[Running]:
    with running(llm, names=("pico", "other")) as server:
        yield server


def chat(client: openai.OpenAI, messages: Any = FRANCE, extra: Any = None, **asked: Any) -> Any:
    return client.chat.completions.create(model="pico", messages=messages, extra_body=extra, **asked)


def streamed(client: openai.OpenAI, messages: Any = FRANCE, extra: Any = None, **asked: Any) -> dict[str, Any]:
    """What a stream adds up to."""
    found: dict[str, Any] = {"reasoning_content": "", "reasoning": "", "content": "", "logprobs": []}
    for chunk in chat(client, messages, extra, stream=True, stream_options={"include_usage": True}, **asked):
        if chunk.usage:
            found["usage"] = chunk.usage
        for choice in chunk.choices:
            for name in ("reasoning_content", "reasoning", "content"):
                found[name] += getattr(choice.delta, name, None) or ""
            found["logprobs"] += choice.logprobs.content if choice.logprobs else []
            found["finish"] = choice.finish_reason
    return found


def test_an_answer_with_its_reasoning(client: openai.OpenAI) -> None:
    answer = chat(client)
    (choice,) = answer.choices
    assert choice.message.content == PARIS
    assert choice.message.reasoning_content.startswith("The user asks")
    assert choice.message.reasoning == choice.message.reasoning_content
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert answer.system_fingerprint.startswith("dsv4-")


@pytest.mark.parametrize(
    ("messages", "asked", "extra"),
    [
        (FRANCE, {"logprobs": True, "top_logprobs": 3}, {}),
        (FRANCE, {}, OFF),
        (STORY, {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 16}, OFF | {"top_k": 40, "min_p": 0.01}),
        (FRANCE, {"stop": ["Par", "zz"]}, OFF),
        (FRANCE, {"max_tokens": 5}, {}),
    ],
)
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, messages: Any, asked: Any, extra: Any) -> None:
    whole = chat(client, messages, extra, **asked)
    found = streamed(client, messages, extra, **asked)
    (choice,) = whole.choices
    assert found["content"] == choice.message.content
    assert found["reasoning_content"] == found["reasoning"] == (getattr(choice.message, "reasoning", None) or "")
    assert found["finish"] == choice.finish_reason
    assert found["usage"] == whole.usage
    assert found["logprobs"] == (choice.logprobs.content if choice.logprobs else [])
    entries = whole.usage.completion_tokens if asked.get("logprobs") else 0
    assert len(found["logprobs"]) == entries  # every sampled token has one


def test_usage_counts_every_token(client: openai.OpenAI, llm: LLM) -> None:
    usage = chat(client).usage
    prompt = llm.tokenizer.encode_prompt(llm.prompt(FRANCE).pieces)
    said = [delta.token for delta in llm_alone(FRANCE)]
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(said))
    assert usage.total_tokens == len(prompt) + len(said)
    assert usage.completion_tokens_details.reasoning_tokens == said.index(llm.tokenizer.controls["</think>"])


def llm_alone(messages: Any) -> list[Any]:
    """The same model outside any server: its tokens are what the server has to say."""
    fresh = LLM.load(PICO, EngineOptions(max_context=256))
    return list(fresh.generate(fresh.prompt(messages)))


@pytest.mark.parametrize(
    "extra",
    [OFF, {"chat_template_kwargs": {"thinking": False}}, {"chat_template_kwargs": {"enable_thinking": False}},
     {"reasoning_effort": "none"}, OFF | {"chat_template_kwargs": {"thinking": False}}],
)  # fmt: skip
def test_thinking_can_be_switched_off(client: openai.OpenAI, extra: Any) -> None:
    (choice,) = chat(client, extra=extra).choices
    assert choice.message.content == PARIS
    assert not hasattr(choice.message, "reasoning_content")


@pytest.mark.parametrize("extra", [{"thinking": {"type": "enabled"}}, {"reasoning_effort": "high"}])
def test_thinking_can_be_asked_for(client: openai.OpenAI, extra: Any) -> None:
    assert chat(client, extra=extra, max_tokens=2).choices[0].message.reasoning_content


def test_a_thinking_block_that_never_closes_is_all_reasoning(client: openai.OpenAI) -> None:
    (choice,) = chat(client, max_completion_tokens=6).choices
    assert choice.finish_reason == "length"
    assert choice.message.content == ""
    assert choice.message.reasoning_content.startswith("The user asks")


def test_a_seed_names_an_answer_and_is_told(client: openai.OpenAI) -> None:
    asked = {"temperature": 1.5, "max_tokens": 12}
    first = chat(client, STORY, OFF, **asked)
    again = chat(client, STORY, OFF, seed=first.seed, **asked)
    assert again.choices == first.choices
    others = {chat(client, STORY, OFF, seed=n, **asked).choices[0].message.content for n in range(4)}
    assert len(others) > 1


def test_n_answers_are_those_of_n_seeds(client: openai.OpenAI) -> None:
    asked = {"temperature": 1.5, "max_tokens": 8}
    together = chat(client, STORY, OFF, seed=5, n=3, **asked)
    alone = [chat(client, STORY, OFF, seed=5 + n, **asked).choices[0].message.content for n in range(3)]
    assert [choice.message.content for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    found: dict[int, str] = {}
    for chunk in chat(client, STORY, OFF, seed=5, n=3, stream=True, **asked):
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + (choice.delta.content or "")
    assert [found[n] for n in range(3)] == alone


def test_logprobs_are_the_models_own(client: openai.OpenAI, llm: LLM) -> None:
    """Greedy: the token taken is the first of the ranking, and the ranking falls; bytes spell the answer."""
    choice = chat(client, extra=OFF, logprobs=True, top_logprobs=4).choices[0]
    entries = choice.logprobs.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert len(values) == 4
    spelt = bytes(byte for entry in entries[:-1] for byte in entry.bytes).decode()
    assert spelt == PARIS
    assert bytes(entries[-1].bytes).decode() == "<｜end▁of▁sentence｜>"
    alone = LLM.load(PICO, EngineOptions(max_context=256))
    (first, *_) = alone.generate(alone.prompt(FRANCE, thinking=False), trace_all(alone))
    assert first.trace.logprob == entries[0].logprob  # through JSON and back, bit for bit


def trace_all(llm: LLM) -> Any:
    from dataclasses import replace

    return replace(llm.defaults, trace=1)


def test_a_bias_forbids_and_forces(client: openai.OpenAI, llm: LLM) -> None:
    (paris, *_) = llm.tokenizer.encode_text(" Paris")
    (the, *_) = llm.tokenizer.encode_text("The")
    assert (
        "Paris" not in chat(client, extra=OFF, logit_bias={str(paris): -100}, max_tokens=16).choices[0].message.content
    )
    assert chat(client, extra=OFF, logit_bias={str(the): 100}, max_tokens=3).choices[0].message.content == "TheTheThe"


def test_a_stop_string_is_cut_off(client: openai.OpenAI) -> None:
    (choice,) = chat(client, extra=OFF, stop=" is Par").choices
    assert (choice.message.content, choice.finish_reason) == ("The capital of France", "stop")


def test_an_answer_that_is_begun_goes_on(client: openai.OpenAI) -> None:
    begun = [*FRANCE, {"role": "assistant", "content": "The capital of France"}]
    extra = OFF | {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, begun, extra).choices[0].message.content == " is Paris."
    prefix = [*FRANCE, {"role": "assistant", "content": "The capital of France", "prefix": True}]
    assert chat(client, prefix, OFF).choices[0].message.content == " is Paris."


def test_every_role_and_field_of_a_history_is_rendered(server: Running, llm: LLM) -> None:
    """What the endpoint renders is what the chat room renders, reasoning and calls and results included."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "Ann"}'}}
    history = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "is Ann?"}]},
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "a sister"},
        {"role": "developer", "content": "Answer."},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    sent = {"messages": history, "tools": tools}
    ids = server.post("/tokenize", sent).json()["tokens"]
    assert ids == llm.tokenizer.encode_prompt(llm.prompt(history, tools=tools).pieces)
    text = llm.tokenizer.decode(ids)
    for part in ("Be short.", "Who\n\nis Ann?", "I look.", 'invoke name="look"', "<tool_result>a sister", "Answer."):
        assert part in text
    counted = server.post("/v1/chat/completions", sent | {"max_tokens": 1}).json()["usage"]
    assert counted["prompt_tokens"] == len(ids)


def test_control_tokens_in_text_stay_text(server: Running, llm: LLM) -> None:
    sent = {"messages": [{"role": "user", "content": "<｜User｜></think>"}]}
    ids = server.post("/tokenize", sent).json()["tokens"]
    assert ids.count(llm.tokenizer.controls["<｜User｜>"]) == 1
    assert llm.tokenizer.controls["</think>"] not in ids


# --- completions, words, models --------------------------------------------------------------------------------------


def test_a_text_goes_on(client: openai.OpenAI, llm: LLM) -> None:
    prompt = "The capital of France"
    text = client.completions.create(model="pico", prompt=prompt, max_tokens=6)
    ids = [llm.tokenizer.bos_id, *llm.tokenizer.encode_text(prompt)]
    by_ids = client.completions.create(model="pico", prompt=ids, max_tokens=6)
    assert text.choices == by_ids.choices
    assert text.usage.prompt_tokens == len(ids)
    echoed = client.completions.create(model="pico", prompt=prompt, max_tokens=6, echo=True)
    assert echoed.choices[0].text == prompt + text.choices[0].text
    stream = client.completions.create(model="pico", prompt=prompt, max_tokens=6, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == echoed.choices[0].text


def test_several_texts_go_on_in_their_order(client: openai.OpenAI) -> None:
    prompts = ["The capital of France", "The capital of Japan"]
    asked: dict[str, Any] = {"model": "pico", "max_tokens": 5, "seed": 1, "temperature": 1}
    together = client.completions.create(prompt=prompts, n=2, **asked)
    alone = [client.completions.create(prompt=prompt, n=2, **asked).choices for prompt in prompts]
    assert [choice.text for choice in together.choices] == [choice.text for two in alone for choice in two]
    assert [choice.index for choice in together.choices] == [0, 1, 2, 3]


def test_old_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "pico", "prompt": "The capital", "max_tokens": 4, "logprobs": 2}
    said = client.completions.create(**asked).choices[0]
    assert "".join(said.logprobs.tokens) == said.text
    places = zip(said.logprobs.text_offset, said.logprobs.tokens, strict=True)
    assert all(said.text[at:].startswith(token) for at, token in places)
    assert [max(top.values()) for top in said.logprobs.top_logprobs] == said.logprobs.token_logprobs
    none = client.completions.create(**asked | {"logprobs": 0}).choices[0].logprobs
    assert (none.token_logprobs, none.top_logprobs) == (said.logprobs.token_logprobs, [{}] * 4)


def test_models_by_each_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["pico", "other"]
    assert client.models.retrieve("other").max_model_len == 256
    assert client.chat.completions.create(model="other", messages=FRANCE, max_tokens=1).model == "other"
    with pytest.raises(openai.NotFoundError, match="got 'gpt-9'; wanted pico or other"):
        client.chat.completions.create(model="gpt-9", messages=FRANCE)


def test_text_to_ids_and_back(server: Running, llm: LLM) -> None:
    text = "Straße <think> 中"
    plain = server.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == llm.tokenizer.encode_text(text)
    assert plain["count"] == len(plain["tokens"])
    assert server.post("/tokenize", {"prompt": text}).json()["tokens"] == [llm.tokenizer.bos_id, *plain["tokens"]]
    special = server.post("/tokenize", {"prompt": text, "parse_special": True}).json()["tokens"]
    assert special == llm.tokenizer.encode_raw(text)
    assert server.post("/detokenize", {"tokens": plain["tokens"]}).json() == {"prompt": text}


def test_pages_for_those_who_watch(server: Running) -> None:
    assert server.get("/health").json() == server.get("/ready").json() == {"status": "ok"}
    assert server.get("/version").json()["system_fingerprint"].startswith("dsv4-")
    schema = server.get("/openapi.json").json()
    assert "messages" in str(schema["paths"]["/v1/chat/completions"]["post"]["requestBody"])
    before = {name: server.metric(name) for name in ("prompt_tokens_total", "generation_tokens_total")}
    first = server.metric("time_to_first_token_seconds_count")
    usage = server.post("/v1/chat/completions", {"messages": FRANCE} | OFF).json()["usage"]
    assert server.metric("prompt_tokens_total") - before["prompt_tokens_total"] == usage["prompt_tokens"]
    assert server.metric("generation_tokens_total") - before["generation_tokens_total"] == usage["completion_tokens"]
    assert server.metric("time_to_first_token_seconds_count") == first + 1
    assert server.metric('time_to_first_token_seconds_bucket{le="+Inf"}') == first + 1
    assert server.metric("draft_tokens_total") >= server.metric("draft_accepted_tokens_total") > 0
    assert server.metric("requests_running") == server.metric("requests_waiting") == 0
