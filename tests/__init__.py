"""Tests."""

from pathlib import Path

PICO = Path(__file__).parent / "pico"  # a trained checkpoint of four narrow layers, quicker than the embedded one
