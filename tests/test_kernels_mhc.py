"""What the kernels of mHC promise beside the contract: one order of sums for all forms, and Sinkhorn at any logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4 import kernels
from dsv4.check.cases.mhc import exact_sinkhorn, prescribed
from dsv4.check.cases.norm import FORMATS
from dsv4.check.fences import transform
from dsv4.check.metrics import differing, leaves
from dsv4.kernels import launch, mhc, mhc_accepts
from dsv4.kernels.mhc import mix, mix_form, mix_plan, post_mix
from dsv4.ops.mhc import Mixed, Mixer, mhc_head, mhc_post, mhc_post_pre_norm_quant, mhc_pre, mhc_pre_norm_quant
from dsv4.quant.formats import FP8_BLOCK, FP8_ROW, Format
from tests import shim
from tests.devices import far, normal
from tests.shim.build import build, library
from tests.shim.build import kernels as declared
from tests.shim.everyday import kernels_of

EPS = 1e-6
BF16, FP32 = torch.bfloat16, torch.float32
FILES = ("mhc_mix.cu", "mhc_post.cu", "mhc_finish.cu", "mhc_step.cu")
ROWS = [(label, fmt, scale) for label, fmt, scale in FORMATS if scale != "tensor"]
FUSED = {op: op.implementations["fused"].run for op in (mhc_pre, mhc_post, mhc_head)}
kernels.install()


def streams_and_mixer(tokens: int, d: int, dtype: torch.dtype, m: int = 4, n: int = 0) -> tuple[Tensor, Mixer]:
    n = n or m * (m + 2)
    mixer = Mixer(normal("fn", n, m * d, size=0.1), normal("base", n), normal("scale", n))
    return normal("streams", tokens, m, d, dtype=dtype), mixer


def mixed_of(streams: Tensor) -> Mixed:
    tokens, m, d = streams.shape
    comb = torch.softmax(normal("comb", tokens, m, m), 2)
    return Mixed(normal("x", tokens, d, dtype=streams.dtype), normal("post", tokens, m), comb, streams)


def step_arguments(tokens: int, d: int, dtype: torch.dtype, fmt: Format, scale: Any) -> tuple[Any, ...]:
    streams, mixer = streams_and_mixer(tokens, d, dtype)
    y, weight = normal("y", tokens, d, dtype=dtype), normal("weight", d)
    return y, mixed_of(streams), mixer, 20, EPS, EPS, weight, fmt, scale


def differences(left: Any, right: Any) -> dict[str, int]:
    """Numbers that differ, by the name of their tensor."""
    other = leaves(right)
    found = {name: differing(leaf.tensor, other[name].tensor) for name, leaf in leaves(left).items()}
    return {name: count for name, count in found.items() if count}


@pytest.fixture
def machine() -> Iterator[list[str]]:
    with shim.machine() as ran:
        yield ran


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("tokens", "d"), [(1, 8), (8, 264), (13, 600)])
def test_forms_of_the_mix_have_one_order_of_sums(tokens: int, d: int, dtype: torch.dtype, machine: list[str]) -> None:
    """On two multiprocessors: blocks walk over the tokens, tiles are left unfilled, ranges too."""
    streams, mixer = streams_and_mixer(tokens, d, dtype)
    few = mix(streams, mixer, 24, "few")
    assert differences(few, mix(streams, mixer, 24, "many")) == {}
    assert differences(few, mix(streams, mixer, 24, "any")) == {}
    assert len(set(machine)) == 3
    flat = streams.double().flatten(1)
    assert far(few.double().sum(1)[:, :24], flat @ mixer.fn.double().T) < 1e-6
    assert far(few.double().sum(1)[:, 24], flat.square().sum(1)) < 1e-6


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize(("tokens", "d"), [(1, 8), (13, 600)])
def test_forms_of_the_way_back_agree(tokens: int, d: int, dtype: torch.dtype, machine: list[str]) -> None:
    """The streams are those of `mhc_post`, the sums those of `mix`."""
    streams, mixer = streams_and_mixer(tokens, d, dtype)
    mixed, y = mixed_of(streams), normal("y", tokens, d, dtype=dtype)
    few = post_mix(y, mixed, mixer, "few")
    assert differences(few, post_mix(y, mixed, mixer, "many")) == {}
    apart = FUSED[mhc_post](y, mixed)
    assert differences(few, (apart, mix(apart, mixer, 24))) == {}


def test_a_token_has_its_bits_in_company_of_another_form(machine: list[str]) -> None:
    streams, mixer = streams_and_mixer(mhc.MANY_FROM + 1, 264, BF16)
    company = FUSED[mhc_pre](streams, mixer, 20, EPS, EPS)
    for token in (0, 7, mhc.MANY_FROM):
        alone = FUSED[mhc_pre](streams[token : token + 1], mixer, 20, EPS, EPS)
        assert differences(alone, Mixed(*(part[token : token + 1] for part in company))) == {}
    assert {"mhc_mix_few_bf16", "mhc_mix_many_bf16"} <= set(machine)


@pytest.mark.parametrize(("label", "fmt", "scale"), ROWS, ids=[label for label, *_ in ROWS])
@pytest.mark.parametrize(("tokens", "d", "dtype"), [(2, 264, BF16), (1, 512, BF16), (17, 72, FP32)])
def test_the_step_is_its_smaller_ops(
    tokens: int, d: int, dtype: torch.dtype, label: str, fmt: Format, scale: Any, machine: list[str]
) -> None:
    """Bit for bit: one cluster a token, two kernels, or the kernels of `mhc_post`, `mhc_pre` and `rms_norm_quant`."""
    given = step_arguments(tokens, d, dtype, fmt, scale)
    found = mhc_post_pre_norm_quant.implementations["fused"].run(*given)
    _, later, normed, stored = found
    assert later.streams is found[0]
    apart = FUSED[mhc_post](*given[:2])
    into = FUSED[mhc_pre](apart, *given[2:6])
    last = kernels_of()["rms_norm_quant"].implementations["fused"].run(into.x, given[6], EPS, fmt, scale)
    assert differences((found[0], later[:3], normed, stored), (apart, into[:3], *last)) == {}
    way_in = mhc_pre_norm_quant.implementations["fused"].run(apart, *given[2:])
    assert differences(found[1:], way_in) == {}
    if dtype == BF16:
        assert differences(found, in_one_block(*given)) == {}


def in_one_block(*given: Any) -> Any:
    """The cluster's kernel on a host that has none: a block with all ranges, two at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mhc_accepts, "cluster_size", lambda d, device: 1)
        return mhc_post_pre_norm_quant.implementations["cluster"].run(*given)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("size", [0.5, 8.0, 100.0])
def test_sinkhorn_at_any_logits(m: int, size: float, machine: list[str]) -> None:
    """Against FP64, at 2 and 20 iterations, of logits that are exact: within 1e-6, and no worse than the reference."""
    for iterations in (2, 20):
        streams, mixer = prescribed(40 if m < 16 else 8, m, 8 * m, size, BF16)
        found = FUSED[mhc_pre](streams, mixer, iterations, EPS, 0.0)
        logits = (streams.double().flatten(1) @ mixer.fn.double().T * mixer.scale)[:, 2 * m :].view(-1, m, m)
        exact = exact_sinkhorn(logits, iterations, EPS)
        assert (found.comb.double() - exact).abs().max() < 1e-6
        assert (found.comb >= 0).all()


@pytest.mark.parametrize("base", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_with_its_token(base: float, machine: list[str]) -> None:
    streams, mixer = streams_and_mixer(3, 264, BF16)
    clean = FUSED[mhc_pre](streams, mixer, 20, EPS, EPS)
    streams[1, 2, 100] = base
    broken = FUSED[mhc_pre](streams, mixer, 20, EPS, EPS)
    for token in (0, 2):
        assert differences([part[token] for part in clean[:3]], [part[token] for part in broken[:3]]) == {}
    assert broken.comb[1].isnan().all()
    assert broken.post[1].isnan().all()


def test_plans_fill_one_wave_and_no_more() -> None:
    for d in (64, 4096, 7168):
        ranges = -(-d // 256)
        for tokens in (1, 2, 8, 100, 8192):
            few, many = (mix_plan(form, tokens, 24, d, BF16, 132) for form in ("few", "many"))
            assert few.grid == ranges * 6 * few.groups
            assert few.groups == min(tokens, max(1, 6 * 132 // (6 * ranges)))
            assert many.grid == ranges * many.groups
            assert many.groups == min(-(-tokens // 6), max(1, 264 // ranges))
    assert mix_plan("few", 1, 24, 4096, BF16, 132) == ("few", 96, 128, 1)
    assert mix_plan("few", 0, 24, 4096, BF16, 132).grid == 0


def test_the_form_follows_from_the_shape() -> None:
    assert [mix_form(tokens, 4, 24) for tokens in (1, mhc.MANY_FROM - 1, mhc.MANY_FROM)] == ["few", "few", "many"]
    assert mix_form(10_000, 4, 4) == "few"
    assert mix_form(10_000, 3, 15) == "any"


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 17, 64), BF16, "17 streams, and 1 to 16 fit"),
        ((2, 4, 63), BF16, "63 columns, and multiples of 8 to 7936 fit"),
        ((2, 4, 7944), BF16, "7944 columns"),
        ((2, 4, 64), torch.float16, "the streams are float16"),
        ((2, 4, 64), BF16, None),
    ],
)
def test_streams_that_are_refused(shape: tuple[int, ...], dtype: torch.dtype, words: str | None) -> None:
    streams = torch.zeros(shape, dtype=dtype)
    given = (streams, Mixer(streams, streams, streams), 20, EPS, EPS)
    assert mhc_accepts.pre(*given) == "the streams are on cpu"
    with shim.posing():
        said = mhc_accepts.pre(*given)
        assert said is None if words is None else said is not None and words in said
        wide = torch.zeros(*shape[:2], shape[2] + 8, dtype=dtype)[..., : shape[2]]
        assert mhc_accepts.pre(wide, *given[1:]) is not None
        assert mhc_accepts.pre(*given[:3], 0.0, EPS) is not None


def test_steps_that_are_refused() -> None:
    given = step_arguments(9, 64, BF16, FP8_ROW, None)
    with shim.posing():
        assert mhc_accepts.step(*given) is None
        assert mhc_accepts.cluster_step(*given) == "9 tokens, and 4 fit"
        wide = [mhc_accepts.cluster_step(*step_arguments(n, 7168, BF16, FP8_ROW, None)) for n in (0, 1, 2, 3, 4)]
        assert [said is None for said in wide] == [True, False, False, True, True]
        assert mhc_accepts.cluster_step(*step_arguments(1, 4096, BF16, FP8_ROW, None)) is None
        assert mhc_accepts.step(given[0].float(), *given[1:]) == "y is float32, the streams are bfloat16"
        assert mhc_accepts.step(*given[:7], FP8_BLOCK) == "no kernel stores fp8"
        three = mixed_of(given[1].streams[:, :3].contiguous())
        assert mhc_accepts.step(given[0], three, *given[2:]) == "3 streams, and 4 fit"


def test_every_kernel_has_a_wrapper_of_its_signature() -> None:
    ours = {(kernel.file, kernel.name): kernel for kernel in launch.KERNELS if kernel.file in FILES}
    assert ours.keys() == {(file, name) for file in FILES for name in declared(file)}
    for kernel in ours.values():
        entry = library(build(kernel.file)).simt_find(kernel.name.encode())
        assert entry.contents.letters.decode() == kernel.signature, kernel


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 264, 4096, 7168])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_forms_agree_on_a_gpu(d: int, dtype: torch.dtype) -> None:
    """The mix as few, many and any; three steps in a row, as one cluster a token and as two kernels."""
    for tokens in (1, 3, 8):
        streams, mixer = on_gpu(streams_and_mixer(tokens, d, dtype))
        sums = [mix(streams, mixer, 24, form) for form in ("few", "many", "any")]
        assert differences([sums[0]] * 2, sums[1:]) == {}
        for _, fmt, scale in ROWS:
            given = on_gpu(step_arguments(tokens, d, dtype, fmt, scale))
            if mhc_accepts.cluster_step(*given):
                continue  # FP32, or too wide for the clusters of this card
            fused, cluster = (mhc_post_pre_norm_quant.implementations[name].run for name in ("fused", "cluster"))
            first, second = given, given
            for _ in range(3):
                first, second = chained(fused, first), chained(cluster, second)
            assert differences(first[:2], second[:2]) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fused", "cluster"])
def test_a_chain_of_steps_in_a_graph(name: str) -> None:
    """Dependent launches that overlap: fifty steps, replayed, give the bits of fifty steps one after another."""
    run, given = mhc_post_pre_norm_quant.implementations[name].run, on_gpu(step_arguments(2, 4096, BF16, FP8_ROW, None))

    def steps() -> Any:
        chain = given
        for _ in range(50):
            chain = chained(run, chain)
        return chain[:2]

    eager = steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = steps()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert differences(eager, captured) == {}


def chained(run: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The next step's arguments: its sublayer hands on what it read."""
    _, later, normed, _ = run(*given)
    return normed, later, *given[2:]


def on_gpu(given: Any) -> Any:
    return transform(given, lambda x: x.cuda())


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [2, 13])
def test_no_race(tokens: int) -> None:
    """ThreadSanitizer sees none in any kernel, and OS threads give the bits of the fibers."""
    given, found = step_arguments(tokens, 264, BF16, ROWS[-1][1], "row"), []
    for threads in (False, True):
        with shim.machine(threads=threads):
            forms = [post_mix(*given[:3], form) for form in ("few", "many")]
            one = in_one_block(*(x if i else x[:2] for i, x in enumerate(given))) if tokens == 2 else None
            found.append((forms, mhc_post_pre_norm_quant.implementations["fused"].run(*given), one))
            streams, mixer = streams_and_mixer(2, 72, FP32, m=5)
            found[-1] += (
                FUSED[mhc_pre](streams, mixer, 3, EPS, EPS),
                FUSED[mhc_post](normal("y", 2, 72), mixed_of(streams)),
            )
            found[-1] += (FUSED[mhc_head](*streams_and_mixer(2, 72, FP32, n=4), EPS, EPS),)
    assert differences(*found) == {}
