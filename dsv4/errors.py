"""Errors that a user can cause. Each says what was got, what was wanted and what to do, on one line."""

from __future__ import annotations


class DSV4Error(Exception):
    """A mistake outside the program. The command line prints it without a traceback and exits with 1."""

    def __init__(self, what: str, *, got: object = None, wanted: object = None, do: str | None = None) -> None:
        self.what, self.got, self.wanted, self.do = what, got, wanted, do
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if wanted is not None:
            parts.append(f"wanted {wanted}")
        if do is not None:
            parts.append(do)
        super().__init__("; ".join(parts))


class ConfigError(DSV4Error):
    """A `config.json` that this program cannot run, or options that contradict each other."""


class CheckpointError(DSV4Error):
    """A checkpoint whose files, names, shapes, dtypes or bytes are not what its configuration promises."""


class PromptError(DSV4Error):
    """Messages, tools or a dialect that cannot be rendered as a prompt."""


class NumericsError(DSV4Error):
    """The model's numbers are not finite: damaged weights, or activations that a dtype cannot hold."""


class RequestError(DSV4Error):
    """A request that cannot be served: parameters out of range, or more tokens than there is room for."""


class KernelError(DSV4Error):
    """An op that no kernel can run as chosen, or a kernel that cannot be built, loaded or launched."""
