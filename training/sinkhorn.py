"""Sinkhorn's iteration with a gradient: [N, M, M] logits to nearly doubly stochastic matrices, a token a thread.

Unrolled in a framework this is 40 small steps over sixteen numbers, forward and backward, twice a layer: most of the
time of a thin model. Here it is two GPU kernels. The backward pass runs the iteration again, keeps the sums that it
divided by, and walks back through them: with y = x / (s + eps) and s = sum(x),  dx = (dy - sum(dy * y)) / (s + eps)
and x = y * (s + eps). On a CPU the plain loop is used. The equations are those of `dsv4/ops/mhc.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch: the plain loop is all there is
    triton = None

BLOCK = 64


def plain(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The loop itself, in FP32 or wider."""
    a = torch.softmax(logits, -1) + eps
    for step in range(iterations):
        if step:
            a = a / (a.sum(-1, keepdim=True) + eps)
        a = a / (a.sum(-2, keepdim=True) + eps)
    return a


if triton is not None:

    @triton.jit
    def _forward(
        source,
        out,
        sums,
        count,
        iterations: tl.constexpr,
        eps: tl.constexpr,
        M: tl.constexpr,
        KEEP: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = token < count
        i, j = tl.arange(0, M), tl.arange(0, M)
        at = token[:, None, None] * M * M + i[None, :, None] * M + j[None, None, :]
        x = tl.load(source + at, mask=inside[:, None, None], other=0.0)
        x = tl.exp(x - tl.max(x, 2)[:, :, None])
        x = x / tl.sum(x, 2)[:, :, None]
        a = x + eps
        for step in range(iterations):
            if step > 0:
                s = tl.sum(a, 2) + eps
                a = a / s[:, :, None]
                if KEEP:
                    at_sum = (token[:, None] * iterations + step) * 2 * M + i[None, :]
                    tl.store(sums + at_sum, s, mask=inside[:, None])
            s = tl.sum(a, 1) + eps
            a = a / s[:, None, :]
            if KEEP:
                at_sum = (token[:, None] * iterations + step) * 2 * M + M + j[None, :]
                tl.store(sums + at_sum, s, mask=inside[:, None])
        tl.store(out + at, a, mask=inside[:, None, None])

    @triton.jit
    def _backward(
        source,
        final,
        sums,
        grad,
        out,
        count,
        iterations: tl.constexpr,
        eps: tl.constexpr,
        M: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = token < count
        i, j = tl.arange(0, M), tl.arange(0, M)
        at = token[:, None, None] * M * M + i[None, :, None] * M + j[None, None, :]
        a = tl.load(final + at, mask=inside[:, None, None], other=0.0)
        g = tl.load(grad + at, mask=inside[:, None, None], other=0.0)
        for back in range(iterations):
            step = iterations - 1 - back
            at_sum = (token[:, None] * iterations + step) * 2 * M + M + j[None, :]
            s = tl.load(sums + at_sum, mask=inside[:, None], other=1.0)
            g = (g - tl.sum(g * a, 1)[:, None, :]) / s[:, None, :]
            a = a * s[:, None, :]
            if step > 0:
                at_sum = (token[:, None] * iterations + step) * 2 * M + i[None, :]
                s = tl.load(sums + at_sum, mask=inside[:, None], other=1.0)
                g = (g - tl.sum(g * a, 2)[:, :, None]) / s[:, :, None]
                a = a * s[:, :, None]
        x = a - eps  # the softmax
        g = x * (g - tl.sum(g * x, 2)[:, :, None])
        tl.store(out + at, g, mask=inside[:, None, None])


@torch.library.custom_op("training::sinkhorn", mutates_args=())
def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """[N, M, M] FP32 -> the same shape; differentiable in `logits`."""
    return _run(logits, iterations, eps, keep=False)[0]


def _run(logits: Tensor, iterations: int, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    if not logits.is_cuda:
        return plain(logits, iterations, eps), logits
    logits, (count, m, _) = logits.contiguous(), logits.shape
    out = torch.empty_like(logits)
    sums = logits.new_empty((count, iterations, 2, m) if keep else (0,))
    _forward[(triton.cdiv(count, BLOCK),)](logits, out, sums, count, iterations, eps, m, keep, BLOCK, num_warps=2)
    return out, sums


@sinkhorn.register_fake
def _(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("training::sinkhorn_backward", mutates_args=())
def sinkhorn_backward(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of `sinkhorn` with respect to its logits."""
    if not logits.is_cuda:
        return _plain_backward(logits, grad, iterations, eps)
    final, sums = _run(logits, iterations, eps, keep=True)
    out, (count, m, _) = torch.empty_like(final), final.shape
    grid = (triton.cdiv(count, BLOCK),)
    _backward[grid](logits, final, sums, grad.contiguous(), out, count, iterations, eps, m, BLOCK, num_warps=2)
    return out


def _plain_backward(logits: Tensor, g: Tensor, iterations: int, eps: float) -> Tensor:
    softmax = torch.softmax(logits, -1)
    a, sums = softmax + eps, []
    for step in range(2 * iterations - 1):  # columns first, then rows and columns in turn
        sums.append(a.sum(-2 + step % 2, keepdim=True) + eps)
        a = a / sums[-1]
    for step in reversed(range(2 * iterations - 1)):
        g = (g - (g * a).sum(-2 + step % 2, keepdim=True)) / sums[step]
        a = a * sums[step]
    return softmax * (g - (g * softmax).sum(-1, keepdim=True))


@sinkhorn_backward.register_fake
def _(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.logits, ctx.iterations, ctx.eps = inputs


def _gradient(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return sinkhorn_backward(ctx.logits, grad, ctx.iterations, ctx.eps), None, None


sinkhorn.register_autograd(_gradient, setup_context=_keep)
