"""All families by name."""

from __future__ import annotations

from dsv4.check.tasks import (
    arithmetic,
    conversation,
    facts,
    lists,
    naming,
    retrieval,
    stories,
    structured,
    talk,
    tools,
    words,
)
from dsv4.check.tasks.item import Family

FAMILIES: dict[str, Family] = {
    **facts.FAMILIES,
    **arithmetic.FAMILIES,
    **lists.FAMILIES,
    **retrieval.FAMILIES,
    **tools.FAMILIES,
    **structured.FAMILIES,
    **stories.FAMILIES,
    **words.FAMILIES,
    **talk.FAMILIES,
    **naming.FAMILIES,
    **conversation.FAMILIES,
}
