"""Losses are those of the true next token, whatever the chunk, and perplexity counts what it says it counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from dsv4.cache.store import Store
from dsv4.check.forced import forced_logits, losses, nats, served
from dsv4.check.perplexity import Text, encoded, measure, read_texts, unigram_nats
from dsv4.config import EngineOptions
from dsv4.engine.request import Sampling
from dsv4.errors import ConfigError
from dsv4.llm import LLM
from dsv4.model.batch import Segment
from tests import PICO


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(draft_tokens=1))


def some_ids(llm: LLM, count: int) -> list[int]:
    random = Random(3)
    return [llm.tokenizer.bos_id, *(random.randrange(300, 4000) for _ in range(count))]


def test_losses_are_those_of_one_direct_call(llm: LLM) -> None:
    ids = some_ids(llm, 150)
    model, options = served(llm)
    store = Store(model.config, replace(options, max_context=len(ids), prefill_chunk=len(ids)))
    logits = model.logits(model(model.batch([Segment(0, 0, ids)]), store).streams).double()
    byhand = [math.log(sum(row.exp().tolist())) - float(row[ids[n + 1]]) for n, row in enumerate(logits[:-1])]
    assert losses(model, options, ids).tolist() == pytest.approx(byhand, rel=1e-9)


@pytest.mark.parametrize("chunk", [3, 37, 200])
def test_losses_do_not_depend_on_the_chunk(llm: LLM, chunk: int) -> None:
    ids = some_ids(llm, 140)
    whole = losses(*served(llm), ids)
    assert len(whole) == 140
    assert torch.equal(losses(*served(llm), ids, chunk), whole)


def test_the_models_own_words_are_what_it_predicts(llm: LLM) -> None:
    """An off-by-one between logits and targets shows here: every greedy token is the argmax of the row before it."""
    prompt = llm.tokenizer.encode_prompt(
        llm.prompt([{"role": "user", "content": "What is the capital of Peru?"}]).pieces
    )
    number = llm.engine.add(prompt, Sampling(temperature=0, max_tokens=12))
    said = []
    while llm.engine.busy:
        said += [delta.token for delta in llm.engine.step() if delta.number == number]
    best = torch.cat([logits.argmax(-1) for logits in forced_logits(*served(llm), [*prompt, *said], 7)])
    assert best[len(prompt) - 1 : -1].tolist() == said


def test_nats_of_a_uniform_model() -> None:
    assert nats(torch.zeros(3, 8), torch.tensor([0, 5, 7])).tolist() == pytest.approx([math.log(8)] * 3)


def test_no_ids_and_one_id_have_no_loss(llm: LLM) -> None:
    assert losses(*served(llm), []).tolist() == losses(*served(llm), [0]).tolist() == []


def test_the_unigram_yardstick_is_the_best_there_is() -> None:
    found = unigram_nats([[1, 1], [1, 2]])
    assert found == pytest.approx({1: math.log(4 / 3), 2: math.log(4)})
    assert sum(math.exp(-loss) for loss in found.values()) == pytest.approx(1)


def test_perplexity_counts_tokens_characters_and_bytes(llm: LLM) -> None:
    texts = encoded([Text("a", "Once upon a time."), Text("a", "The café.")], llm.tokenizer, None, 100)
    loss = measure(llm, texts, unigram_nats(ids for _, ids in texts))
    assert (loss.tokens, loss.characters, loss.bytes) == (sum(len(ids) for _, ids in texts), 26, 27)
    report = loss.as_json()
    behind_bos = sum(float(losses(*served(llm), [llm.tokenizer.bos_id, *ids]).sum()) for _, ids in texts)
    assert loss.nats == pytest.approx(behind_bos)
    assert report["perplexity"] == pytest.approx(math.exp(loss.nats / loss.tokens))
    assert report["bits_per_byte"] == pytest.approx(loss.nats / math.log(2) / 27)
    alone = [measure(llm, [text], unigram_nats(ids for _, ids in texts)) for text in texts]
    assert alone[0] + alone[1] == loss


def test_texts_are_cut_by_piece_and_by_source(llm: LLM) -> None:
    texts = [Text(source, "one two three four five six seven eight") for source in "aab"]
    cut = encoded(texts, llm.tokenizer, 7, 5)
    assert [(text.source, len(ids)) for text, ids in cut] == [("a", 5), ("a", 2), ("b", 5)]
    assert all(llm.tokenizer.decode(ids) == text.text for text, ids in cut)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"source": "a"}', '{"source": "a", "text": 1}', '{"source": "", "text": "b"}']
)
def test_a_broken_line_of_texts_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"source": "a", "text": "b\u2028c"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^texts.jsonl:2; got"):
        read_texts(path)
