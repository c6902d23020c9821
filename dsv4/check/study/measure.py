"""What a run makes of the predictions: distance to the official ones, perplexity, exercises answered."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4.check.study.sample import Passage

_LARGEST = 700.0  # nats whose exponential is still a number


@dataclass
class _Sums:
    tokens: int = 0
    divergence: float = 0.0
    agreed: int = 0
    nats: float = 0.0


@dataclass
class Answers:
    """Sums over the passages of one sample."""

    text: _Sums = field(default_factory=lambda: _Sums())
    answer: _Sums = field(default_factory=lambda: _Sums())
    exercises: dict[str, list[int]] = field(default_factory=dict)  # family: [answered, asked]

    def add(self, passage: Passage, logits: Tensor, base: Tensor) -> None:
        """One passage: its logits [n, V] FP32 and those of the official run."""
        targets = torch.tensor(passage.ids[passage.start :], device=logits.device)
        ours, theirs = (torch.log_softmax(rows.double(), -1) for rows in (logits, base))
        best = logits.argmax(-1)
        sums = self.answer if passage.family else self.text
        sums.tokens += len(targets)
        sums.divergence += float((theirs.exp() * (theirs - ours)).sum())
        sums.agreed += int((best == base.argmax(-1)).sum())
        sums.nats -= float(ours.gather(1, targets.unsqueeze(1)).sum())
        if passage.family:
            count = self.exercises.setdefault(passage.family, [0, 0])
            count[0] += bool((best == targets).all())
            count[1] += 1

    def values(self) -> dict[str, Any]:
        """The measures of one sample, those that there is something for; None for a number that is not finite.

        kl: nats per predicted token, KL(official || this run), text_kl: the same over the texts alone; top1: share of
        predicted tokens with the same most probable token; perplexity: of the texts; answer_perplexity: of the
        reference answers; score: share of exercises whose whole reference answer is the most probable token each time,
        which is what greedy decoding then writes. exercises: answered and asked, by family.
        """
        text, answer = self.text, self.answer
        tokens = text.tokens + answer.tokens
        found: dict[str, Any] = {
            "kl": _ratio(text.divergence + answer.divergence, tokens),
            "top1": _ratio(text.agreed + answer.agreed, tokens),
        }
        if text.tokens:
            found |= {"text_kl": _ratio(text.divergence, text.tokens), "perplexity": _perplexity(text)}
        if self.exercises:
            right, asked = map(sum, zip(*self.exercises.values(), strict=True))
            found |= {"answer_perplexity": _perplexity(answer), "score": right / asked, "exercises": self.exercises}
        return found


def _ratio(total: float, count: int) -> float | None:
    return total / count if math.isfinite(total) else None


def _perplexity(sums: _Sums) -> float | None:
    mean = _ratio(sums.nats, sums.tokens)
    return None if mean is None or mean > _LARGEST else math.exp(mean)
