"""Figures of other engines that no file of bench/results holds: what, of whom, by which source."""

from __future__ import annotations

from typing import Final, NamedTuple


class Peer(NamedTuple):
    """shown: microseconds, as the page has them."""

    shown: str
    whose: str
    source: str


_VLLM: Final = (
    "layers of Flash's width, random weights, 8K of context, in its decode graph on the GPU of the table: our own "
    "traces of it, which are not kept. Without FlashMLA's planner, which a whole model runs four times a step"
)
_MARLIN: Final = "the routed experts alone, MXFP4 times BF16, in the same traces; an H100 and an H200 take the same"
_FLASHINFER: Final = (
    "its pull request 3285, on a GPU that it does not name, by its bandwidth a faster one; for one token, two kernels"
)
_TOP_K: Final = (
    "SGLang's article on V4 (15, 256K keys) and FlashInfer's pull request 3009 (19.4), on GPUs they do not name"
)

# An op with so many tokens or keys.
PEERS: Final = {
    ("mhc_post", "8192"): Peer("101, Pro 169", "FlashInfer", _FLASHINFER),
    ("mhc_post_pre_norm_quant", "1"): Peer("3.7 + 7.2", "FlashInfer", _FLASHINFER),
    ("select_rows", "262144"): Peer("15 to 19.4", "SGLang, FlashInfer", _TOP_K),
    ("stored_moe", "1"): Peer("47", "Marlin", _MARLIN),
    ("stored_moe", "64"): Peer("965 to 1,007", "Marlin", _MARLIN),
}
# A layer, on a GPU, with so many sequences.
LAYERS: Final = {
    (device, kind, sequences): Peer(f"{us:,}", "vLLM 0.24", _VLLM)
    for device, sequences, kinds in (
        ("H100", 1, {"CSA": 228, "HCA": 203}),
        ("H100", 8, {"CSA": 424, "HCA": 394}),
        ("H100", 32, {"CSA": 897, "HCA": 855}),
        ("H100", 64, {"CSA": 1261, "HCA": 1173}),
        ("H200", 1, {"CSA": 215, "HCA": 190}),
        ("H200", 8, {"CSA": 406, "HCA": 378}),
        ("H200", 32, {"CSA": 867, "HCA": 829}),
        ("H200", 64, {"CSA": 1217, "HCA": 1133}),
        ("H200", 128, {"CSA": 1476, "HCA": 1398}),
    )
    for kind, us in kinds.items()
}
LAYERS_AT: Final = "flash", 8192  # config and tokens of context of these
_CHUNKS: Final = (
    "a chunk of one prompt of random tokens in layers of Flash's width, random weights: the wall time of four "
    "layers more (two CSA, two HCA), by our own runs of it on the GPU of the table, which are not kept"
)
# Milliseconds of a layer, on a GPU, for a chunk of so many tokens behind none.
CHUNKS: Final = {
    ("H100", 2048): Peer("5.5", "vLLM 0.24", _CHUNKS),
    ("H100", 8192): Peer("16.9", "vLLM 0.24", _CHUNKS),
}
