"""The double entry: every tensor of a checkpoint is used once or ignored for a reason, every parameter is filled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.checkpoint.detect import detect, refuse_other_draft
from dsv4.checkpoint.names import parameters
from dsv4.checkpoint.specs import Param, StoredFormats, TensorSpec
from dsv4.config import ModelConfig
from dsv4.config_fields import shown
from dsv4.errors import CheckpointError


@dataclass(frozen=True)
class Ledger:
    """What will be loaded, and what will not and why. `nbytes` counts the stored bytes of what will."""

    params: tuple[Param, ...]
    ignored: dict[str, str]
    formats: StoredFormats

    @property
    def nbytes(self) -> int:
        return sum(param.nbytes for param in self.params)


def balance(config: ModelConfig, specs: Mapping[str, TensorSpec], draft: bool = True) -> Ledger:
    """Holds the tensors `specs` against `config`, before a byte of them is read.

    Raises CheckpointError for the first dtype or shape that differs, then for gaps, then for leftovers, naming them.
    Without `draft`, the drafter's tensors need not be there and are ignored where they are.
    """
    formats = detect(config, specs)
    if draft:
        refuse_other_draft(config, specs)
    params = tuple(parameters(config, formats, draft))
    wanted = {spec.name: spec for param in params for spec in param.stored()}
    for name, spec in wanted.items():
        if name in specs and specs[name] != spec:
            raise CheckpointError(f"tensor {name}", got=str(specs[name]), wanted=str(spec))
    _refuse("is missing", [name for name in wanted if name not in specs], "the checkpoint is incomplete")
    ignored = {name: _reason(name, formats, draft) for name in specs if name not in wanted}
    extra = [name for name, reason in ignored.items() if reason is None]
    _refuse("belongs to no parameter of this configuration", extra, "config.json and the tensors do not match")
    return Ledger(params, {name: reason for name, reason in ignored.items() if reason}, formats)


def _reason(name: str, formats: StoredFormats, draft: bool) -> str | None:
    """Why a tensor may be left over; None if it may not."""
    if name.startswith("mtp.") and not draft:
        return "draft weights, and no draft was asked for"
    bank = name.partition(".experts.")[0] + ".experts"
    if name.endswith(".input_scale") and bank in formats.nvfp4:
        return "activation scale of a 4-bit serving mode; activations are not quantised to NVFP4 here"
    return None


def _refuse(what: str, names: list[str], do: str) -> None:
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(f"tensor {shown(sorted(names)[0])} {what}{more}", do=do)
