"""`bench/peers.py`: arguments in the peers' layouts, by stand-ins that read them so; what fails is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.peers import PEERS, Peer
from dsv4.check.cases.linear import _given
from dsv4.check.contract import Case
from dsv4.errors import ConfigError
from dsv4.ops.attention import attend, sparse_attention
from dsv4.ops.linear import scaled_matmul

CPU = torch.device("cpu")
ROW = peers.rows.ROW


def flat(cache: Tensor) -> Tensor:
    """Rows of a cache as FlashMLA finds them: by the strides of pages, all rows of a page before all of its scales."""
    count, rows, one, width = cache.shape
    assert (one, width, cache.stride(1), cache.stride(3)) == (1, 584, 584, 1)
    assert cache.stride(0) % 576 == 0
    data = cache.as_strided((count, rows, 576), (cache.stride(0), 576, 1))
    scales = cache.as_strided((count, rows, 8), (cache.stride(0), 8, 1), cache.storage_offset() + rows * 576)
    return ROW.decode(data.reshape(-1, 576), scales.reshape(-1, 8))


def sparse_decode(
    q: Tensor, kv: Tensor, listed: Tensor, length: Tensor, sink: Tensor, plan: Any, splits: Any, more: Tensor,
    more_listed: Tensor, more_length: Tensor, dims: int, scale: float, out: None,
) -> tuple[Tensor, None, Tensor, Tensor]:  # fmt: skip
    assert (listed.dtype, length.tolist()) == (torch.int32, [listed.shape[2]] * len(q))
    assert (more_listed.dtype, more_length.tolist()) == (torch.int32, [more_listed.shape[2]] * len(q))
    assert (q.shape[1], dims, scale) == (1, 512, 512**-0.5)
    first, second = flat(kv), flat(more)
    rows = torch.cat((listed, more_listed + len(first)), 2).squeeze(1)
    values = sparse_attention(q.squeeze(1), torch.cat((first, second)), rows.long(), sink)
    return values.unsqueeze(1), None, torch.ones(1), torch.ones(1)


def sparse_prefill(
    q: Tensor, kv: Tensor, listed: Tensor, scale: float, dims: int, sink: Tensor, length: Tensor, out: None
) -> tuple[Tensor]:
    assert (kv.dtype, kv.shape[1:], listed.dtype) == (torch.bfloat16, (1, 512), torch.int32)
    assert (dims, scale, length.tolist()) == (512, 512**-0.5, [listed.shape[2]] * len(q))
    return (sparse_attention(q, kv.squeeze(1), listed.squeeze(1).long(), sink),)


def fp8_gemm_nt(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], y: Tensor) -> None:
    (x, by), (weight, of) = left, right
    assert by.dtype == of.dtype == torch.float32
    assert by.shape[0] == 1 or by.stride(0) == 1
    assert by.stride(1) % 4 == 0
    wide = weight.float() * of.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)
    y.copy_(x.float() * by.repeat_interleave(128, 1) @ wide.T)


def attending(make: Any, tokens: int) -> Iterator[Case]:
    yield Case(op=attend, name="few", make=partial(make, tokens, 4, 70), moved=peers.rows.moved)


def multiplying() -> Iterator[Case]:
    yield Case(op=scaled_matmul, name="few", make=partial(_given, 3, 256, 256, torch.bfloat16), tokens=(0,))


def lines(peer: Peer) -> list[dict[str, Any]]:
    return list(peers.compared(peer, Path(), CPU, 1))


@pytest.mark.parametrize(
    "peer",
    [
        Peer("decode", lambda _: sparse_decode, peers.decode, partial(attending, peers.steps, 2)),
        Peer("prefill", lambda _: sparse_prefill, peers.prefill, partial(attending, peers.chunk, 3)),
        Peer("product", lambda _: fp8_gemm_nt, peers.product, multiplying),
    ],
    ids=lambda peer: peer.name,
)
def test_a_stand_in_that_reads_the_peers_layout_gives_our_result(peer: Peer) -> None:
    made = lines(peer)
    forms = {"decode": ["planned", "and plans"], "prefill": ["rows decoded"], "product": [""]}
    assert [line["form"] for line in made] == forms[peer.name]
    for line in made:
        assert not peers.wrong(line)
        assert line["1 - cos"] < 1e-5
        assert line["ours_microseconds"] > 0 < line["theirs_microseconds"]
    assert peers.table(made).row_count == len(made)


def test_another_result_is_told() -> None:
    def other(q: Tensor, *others: Any) -> tuple[Tensor, None, Tensor, Tensor]:
        return sparse_decode(q.flip(2), *others)

    line, _ = lines(Peer("other", lambda _: other, peers.decode, partial(attending, peers.steps, 2)))
    assert "another one" in peers.wrong(line)


def test_what_fails_is_told_with_the_signature_and_the_others_go_on() -> None:
    def fails(*_: Any) -> None:
        """fails(a) -> None"""
        raise RuntimeError("no such head count\nand a long story")

    def cases() -> Iterator[Case]:
        yield from multiplying()
        yield from attending(peers.steps, 1)

    made = lines(Peer("fails", lambda _: fails, peers.decode, cases))
    assert [(line["op"], "failed" in line) for line in made] == [("scaled_matmul", True), ("attend", True)]
    assert peers.wrong(made[1]) == "RuntimeError: no such head count (fails(a) -> None)"
    assert peers.table(made).row_count == 0
    assert peers.signature(torch.ops.aten.relu).startswith("aten::relu(Tensor self) -> Tensor")


@pytest.mark.parametrize("name", PEERS)
def test_missing_files_are_told(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"got no .*{'deep_gemm' if name == 'DeepGEMM' else '_flashmla_C'}"):
        PEERS[name].load(tmp_path)


def test_without_a_gpu_or_a_folder_it_ends_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> torch.device:
        raise ConfigError("device", got=name)

    monkeypatch.setattr(peers, "device_for", none)
    with pytest.raises(SystemExit, match=r"^error: device; got cuda$"):
        peers.main(["--folder", str(tmp_path)])
    monkeypatch.setattr(peers, "device_for", lambda name: CPU)
    with pytest.raises(SystemExit, match=r"^error: --folder; got .*/none; wanted a folder"):
        peers.main(["--folder", str(tmp_path / "none")])


def test_lines_are_kept_and_the_exit_code_says_that_one_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = lines(Peer("product", lambda _: fp8_gemm_nt, peers.product, multiplying))
    broken = {"peer": "DeepGEMM", "case": "few", "failed": "RuntimeError: no", "signature": None}
    (tmp_path / "vllm-1.dist-info").mkdir()
    monkeypatch.setattr(peers, "device_for", lambda name: CPU)
    for made, code in ((whole, 0), ([*whole, broken], 1)):
        monkeypatch.setattr(peers, "measured", lambda *_, made=made: iter(made))
        with pytest.raises(SystemExit) as end:
            peers.main(["--folder", str(tmp_path), "--out", str(tmp_path / "out")])
        assert end.value.code == code
    assert "DeepGEMM, few: RuntimeError: no" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert len(kept) == 3
    assert {line["version"] for line in kept} == {"vllm-1.dist-info"}
    assert "device" in kept[0]


def test_the_timed_cases_have_the_models_shapes() -> None:
    made = {name: [case.name for case in peer.cases()] for name, peer in PEERS.items()}
    assert made["FlashMLA decode"] == [
        f"{model} CSA, {heads} heads, 128 + {picked} rows, {n}"
        for model, heads, picked in (("flash", 64, 512), ("pro", 128, 1024))
        for n in (1, 64)
    ]
    assert len(made["FlashMLA prefill"]) == 2
    assert len(made["DeepGEMM"]) == 18
    case = next(PEERS["FlashMLA decode"].cases())
    assert [x.shape for x in case.make()[2:5:2]] == [(1, 128), (1, 512)]


def test_windows_of_a_chunk_overlap() -> None:
    q, near, near_rows, _, far_rows, *_ = peers.chunk(5, 4, 70)
    assert near_rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert int(near_rows.max()) == 5 + 127 - 1 < len(near) * 64
    assert (far_rows.diff(dim=1) > 0).all()
    assert q.shape == (5, 4, 512)
