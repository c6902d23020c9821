"""What the embedded model can do, as figures that a change must not lower: `python -m tests.gates` writes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsv4.check.evaluate import Plan, evaluate, options_for, planned
from dsv4.check.evaluate_report import all_score, draft_score, mode
from dsv4.check.perplexity import HELDOUT, total
from dsv4.config import EngineOptions, ModelConfig
from dsv4.llm import EMBEDDED, LLM

GATES = Path(__file__).parent / "golden/gates.json"
ITEMS, CONTEXT, TOKENS = 2, 1024, 300  # of a row, of long prompts, of each held-out source


def measured() -> dict[str, Any]:
    """Right answers by row, perplexity by source, draft and mistakes of the embedded model."""
    config, rows = ModelConfig.load(EMBEDDED), planned((), (CONTEXT,))
    options = options_for(config, rows, EngineOptions(max_sequences=16, prefill_chunk=512))
    plan = Plan(
        model=EMBEDDED, options=options, dialect=None, rows=tuple(rows), items=ITEMS, long_items=ITEMS, seed=0,
        texts=HELDOUT, tokens=TOKENS, piece=TOKENS,
    )  # fmt: skip
    found = evaluate(LLM.load(EMBEDDED, options), plan, 1, lambda *_: None)
    losses = {reading.source: reading.loss for reading in found.readings}
    draft = draft_score(found)
    return {
        "rows": {f"{r.row.family} {mode(r.row)}": r.score.right for r in found.results if not r.why},
        "share": round(all_score(found.results).share or 0.0, 4),
        "nats": {source: round(loss.nats / loss.tokens, 4) for source, loss in losses.items()},
        "nats of all": round((whole := total(losses.values())).nats / whole.tokens, 4),
        "draft kept": round(draft.right / draft.n, 4),
        "mistakes": {d.mistake: round(d.nats / d.tokens, 4) for d in found.damages},
    }


if __name__ == "__main__":
    GATES.write_text(json.dumps(measured(), indent=1) + "\n", encoding="utf-8")
