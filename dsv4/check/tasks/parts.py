"""Exercises that contain other exercises, and the split between taught and held-out ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from dsv4.check.tasks.asking import held_out
from dsv4.check.tasks.item import Item

Make = Callable[[Random, bool, int], Item]


def keeping(make: Make) -> Make:
    """`make` without the taught items of which a part is held out by its own family.

    The parts stand in `facts["parts"]` as pairs of family and key.
    """

    def again(random: Random, thinking: bool, size: int) -> Item:
        while True:
            item = make(random, thinking, size)
            if item.held_out or not any(held_out(family, key) for family, key in item.facts["parts"]):
                return item

    return again
