"""dsv4: the DeepSeek-V4 language models, run exactly. Importing this package imports no torch."""

from __future__ import annotations

__version__ = "0.1.0"
