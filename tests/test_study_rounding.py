"""Roundings beyond the official ones: known values, what they lose, and where a model applies them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dsv4.cache.store import Store
from dsv4.checkpoint.load import load
from dsv4.checkpoint.reader import Checkpoint
from dsv4.config import EngineOptions, ModelConfig
from dsv4.model.batch import Segment
from dsv4.model.model import Model
from dsv4.ops.moe import Expert, Route, moe
from dsv4.quant.formats import FP8_BLOCK, NVFP4
from dsv4.quant.rounding import FLOAT, LINEARS, NUMERICS, OFFICIAL, PLACES, ROUNDINGS, Numerics, none
from dsv4.quant.scaled import nvfp4_global, nvfp4_per_tensor, nvfp4_per_token, nvfp4_simulate
from dsv4.quant.tensor import QTensor
from tests.devices import bits, normal
from tests.micro import write_micro

HALF = torch.bfloat16
BY_ROW = [name for name in ROUNDINGS if not name.endswith("-tensor")]

# --- NVFP4 -----------------------------------------------------------------------------------------------------------


def test_nvfp4_rounds_half_steps_to_even() -> None:
    """amax 6 has the scale 1, so that these are E2M1's own numbers and the middles between them."""
    x = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, 0])
    want = torch.tensor([6, 4, 4, 2, 2, 1, 1, 0, -4, -4, -2, -2, -1, -1, -0.0, 0])
    assert torch.equal(bits(nvfp4_simulate(x)), bits(want))


def test_nvfp4_divides_by_the_scale_as_stored() -> None:
    """6.375 / 6 = 1.0625 lies between 1 and 1.125 in E4M3 and is stored as 1: 3 stays 3, and 6.375 becomes 6."""
    x = torch.tensor([6.375, 3.0, 1.0] + 13 * [0.0])
    assert nvfp4_simulate(x)[:3].tolist() == [6.0, 3.0, 1.0]


@pytest.mark.parametrize(("scale", "want"), [(1.0, 896.0), (2.0, 896.0), (0.25, 672.0), (0.125, 336.0)])
def test_nvfp4_saturates_where_the_global_scale_is_too_small(scale: float, want: float) -> None:
    """The largest number is 2688 times the global scale; 900 / 6 = 150 is stored as 144 or 160 (ties to even: 152)."""
    found = float(nvfp4_simulate(torch.tensor([900.0] + 15 * [0.0]), scale)[0])
    assert found == pytest.approx(want, rel=0.05)
    assert found <= 2688 * scale


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]), st.integers(1, 3), st.sampled_from([16, 48, 40]))
def test_nvfp4_under_the_tensor_s_own_scale_is_the_stored_format(seed: int, size: float, rows: int, width: int) -> None:
    """Bit for bit what `formats.NVFP4` packs into bytes and reads back."""
    x = size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) ** 3
    stored = NVFP4.encode(x)
    assert torch.equal(bits(nvfp4_per_tensor(x)), bits(NVFP4.decode(stored)))
    assert stored.global_scale is not None
    assert torch.equal(bits(nvfp4_simulate(x, stored.global_scale)), bits(stored.values()))


def test_nvfp4_per_token_is_per_tensor_of_every_row_alone() -> None:
    x = normal("x", 5, 80) * torch.tensor([[1e-4], [1], [1e3], [0], [7]])
    for row, got in zip(x, nvfp4_per_token(x), strict=True):
        assert torch.equal(bits(got), bits(nvfp4_per_tensor(row.unsqueeze(0))[0]))


def test_the_global_scale_of_nothing_is_one() -> None:
    assert nvfp4_global(0.0).item() == 1
    assert nvfp4_global(2688.0).item() == 1
    assert nvfp4_global(float("nan")).isnan()


# --- every rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_zeros_and_no_rows_stay_as_they_are(name: str, dtype: torch.dtype) -> None:
    rounding = ROUNDINGS[name]
    assert not rounding(torch.zeros(3, 96, dtype=dtype)).any()
    for shape in ((0, 96), (3, 2, 40), (1, 7)):
        got = rounding(torch.ones(shape, dtype=dtype))
        assert (got.shape, got.dtype) == (shape, dtype)


@pytest.mark.parametrize("name", ["bf16", "fp8", "mxfp4", "nvfp4", "fp4-128"])
def test_what_is_rounded_stays_rounded(name: str) -> None:
    """NVFP4's scales are normal E4M3 numbers here; below 2^-6 they are too coarse for that."""
    once = ROUNDINGS[name](normal("x", 64, 256))
    assert torch.equal(bits(ROUNDINGS[name](once)), bits(once))


@pytest.mark.parametrize("name", BY_ROW)
def test_a_row_does_not_depend_on_its_company(name: str) -> None:
    x = normal("x", 9, 160, dtype=HALF) * torch.logspace(-3, 3, 9, dtype=HALF).unsqueeze(1)
    whole = ROUNDINGS[name](x)
    for row in range(9):
        assert torch.equal(bits(ROUNDINGS[name](x[row : row + 1])[0]), bits(whole[row]))


@pytest.mark.parametrize("name", [name for name in ROUNDINGS if name != "none"])
def test_nan_is_never_hidden(name: str) -> None:
    x = normal("x", 2, 64)
    x[0, 3] = float("nan")
    assert ROUNDINGS[name](x)[0, 3].isnan()


def error(name: str, x: Tensor) -> float:
    """|x - rounded x| / |x|."""
    return float((ROUNDINGS[name](x) - x).norm() / x.norm())


def test_finer_formats_lose_less() -> None:
    """On normally distributed numbers; cosines as people quote them: 0.9997 for FP8, 0.995 for NVFP4."""
    x = normal("x", 512, 512)
    order = ["none", "bf16", "fp8", "nvfp4", "mxfp4", "fp4-128", "fp4-tensor"]
    errors = [error(name, x) for name in order]
    assert all(less < 0.97 * more for less, more in itertools.pairwise(errors)), errors
    assert 1 - errors[2] ** 2 / 2 == pytest.approx(0.9997, abs=1e-4)
    assert 1 - errors[3] ** 2 / 2 == pytest.approx(0.995, abs=2e-3)
    assert error("int8-token", x) < errors[3]


def test_an_outlier_spoils_what_shares_its_scale() -> None:
    x = normal("x", 8, 256)
    x[0, 0] = 3e3
    rest = (slice(1, None), slice(None))
    assert error("nvfp4", x[rest]) == pytest.approx(
        float((ROUNDINGS["nvfp4"](x)[rest] - x[rest]).norm() / x[rest].norm())
    )
    assert not ROUNDINGS["fp4-tensor"](x)[rest].any()


# --- places ----------------------------------------------------------------------------------------------------------

Micro = tuple[ModelConfig, dict[str, Tensor | QTensor]]
OPTIONS = EngineOptions(max_context=64)
# Rows that a place rounds in a layer of ratio 4 and 48 tokens: each token's and each pooled entry's.
_CALLS = {"kv": [12, 48], "index": [12, 48], "attn_input": [48], "latent": [48], "group_output": [48]}
ONE_LAYER = ("kv", "index", *(place for place in LINEARS if place != "draft_input"))


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    """Three layers, each kind of place in the middle one."""
    directory = write_micro(
        tmp_path_factory.mktemp("micro"), num_hidden_layers=3, compress_ratios=[8, 4, 8, 0], index_topk=2
    )
    config = ModelConfig.load(directory)
    return config, load(Checkpoint.open(directory), config)


def streams(micro: Micro, rounds: Callable[[int], Numerics] | None, options: EngineOptions = OPTIONS) -> Tensor:
    model = Model(*micro, options, rounds)
    ids = [5 * n % 12 for n in range(48)]
    return model(model.batch([Segment(0, 0, ids)]), Store(micro[0], options)).streams


def test_the_names_in_the_options_are_the_tables(micro: Micro) -> None:
    assert (NUMERICS["official"], NUMERICS["float"]) == (OFFICIAL, FLOAT)
    named = {name: replace(OPTIONS, numerics=name) for name in ("official", "float")}  # type: ignore[arg-type]
    official, floating = (streams(micro, None, options) for options in named.values())
    assert torch.equal(bits(official), bits(streams(micro, lambda _: OFFICIAL, named["float"])))
    assert torch.equal(bits(floating), bits(streams(micro, lambda _: FLOAT)))
    assert not torch.equal(official, floating)


def test_official_is_what_the_reference_rounds() -> None:
    names = {rounding: name for name, rounding in ROUNDINGS.items()}
    table = {place: names[getattr(OFFICIAL, place)] for place in PLACES}
    want = dict.fromkeys(LINEARS, "fp8") | {"group_output": "none", "kv": "fp8-64", "index": "mxfp4"}
    assert table == want
    assert all(getattr(FLOAT, place) is none for place in PLACES)


@pytest.mark.parametrize("place", ONE_LAYER)
def test_every_place_counts_and_no_place_is_another(place: str, micro: Micro) -> None:
    """Doubling what a place reads changes the result, only at its own place; a no-op under another name does not."""
    calls: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    def numerics(layer: int) -> Numerics:
        return replace(OFFICIAL, **{place: seen}) if layer == 1 else OFFICIAL

    changed = streams(micro, numerics)
    if place in _CALLS:
        assert sorted(len(x) for x in calls) == _CALLS[place]
    assert calls
    if place != "index":  # twice all index scores, or none: the selection is the same
        assert not torch.equal(changed, streams(micro, None))
    same = partial(getattr(OFFICIAL, place))  # another object with the same meaning, so that no short cut is taken
    other = streams(micro, lambda layer: replace(OFFICIAL, **{place: same}))
    assert torch.equal(bits(other), bits(streams(micro, None)))


def test_the_index_is_rounded_where_it_selects(micro: Micro) -> None:
    """Index vectors of signs alone select other rows."""
    changed = streams(micro, lambda _: replace(OFFICIAL, index=torch.sign))
    assert not torch.equal(changed, streams(micro, None))


def test_layers_behind_a_change_alone_feel_it(micro: Micro) -> None:
    model = Model(*micro, OPTIONS, lambda layer: FLOAT if layer == 2 else OFFICIAL)
    assert [block.attn.rounds for block in model.blocks] == [OFFICIAL, OFFICIAL, FLOAT]
    assert [block.ffn.rounds for block in model.blocks] == [OFFICIAL, OFFICIAL, FLOAT]


def test_experts_and_the_shared_one_read_roundings_of_their_own() -> None:
    """Each of the four in turn rounds everything to zero; silu(0) * 0 makes the outputs that depend on it vanish."""
    weights = [Expert(*(FP8_BLOCK.encode(normal(f"{e}{n}", 32, 32)) for n in range(3))) for e in range(4)]
    x, picks = normal("x", 5, 32, dtype=HALF), Route(torch.arange(10).view(5, 2) % 3, torch.ones(5, 2))
    silent = Expert(*(FP8_BLOCK.encode(torch.zeros(32, 32)) for _ in range(3)))

    def mixed(shared: Expert, **changes: object) -> Tensor:
        return moe(x, picks, weights[:3], shared, 10.0, replace(OFFICIAL, **changes))  # type: ignore[arg-type]

    routed, both = mixed(silent), mixed(weights[3])
    for half in ("input", "hidden"):
        assert torch.equal(mixed(weights[3], **{f"shared_{half}": torch.zeros_like}), routed)
        alone = mixed(weights[3], **{f"expert_{half}": torch.zeros_like})
        assert torch.allclose((alone + routed).float(), both.float(), rtol=0.02, atol=0.02 * float(both.abs().max()))
        assert alone.any()
        for place in ("expert", "shared"):
            same = partial(getattr(OFFICIAL, f"{place}_{half}"))
            assert torch.equal(bits(mixed(weights[3], **{f"{place}_{half}": same})), bits(both))
