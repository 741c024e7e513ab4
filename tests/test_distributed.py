"""Sequence parallelism: a group of processes computes what one process does."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from layerwise.test_forward import yarn
from longrope.attention.autograd import differentiable_attention
from longrope.compat import cache_name
from longrope.distributed import SequenceParallelGroup, local_device
from longrope.layerwise.backward import gradient
from longrope.layerwise.chunks import Chunks
from longrope.layerwise.forward import Continuation, LongForward
from longrope.layerwise.split_attention import SplitAttention
from longrope.rope.apply import rescaled
from program import TORCHRUN, history, interpreter, refused, succeeds

PROGRAM = """
import json
from test_distributed import shared_forward
from longrope.distributed import ranks

with ranks({members}) as these:
    found = shared_forward(these.group, {families!r})
    if these.first:
        json.dump(found, open({out!r}, "w"))
"""

FAMILIES = ["llama", "qwen2", "gemma2", "gpt_neox"]  # sliding windows and soft-caps among them


def shared_forward(group, families, chunk=9):
    """Losses of several lengths, scores of continuations over many chunks, and gradients."""
    import conftest

    found = {}
    ids = torch.randint(3, 1536, (2, 97), generator=torch.Generator().manual_seed(0))
    asked = [
        Continuation(0, 5, [7, 8]),
        Continuation(1, 30, list(range(40))),
        Continuation(1, 97, [3]),
    ]
    for family in families:
        model = conftest.micro_model(conftest.FAMILIES[family]())
        forward = LongForward(model, chunk, group=group)
        with rescaled(model, yarn(model)):
            for tokens in (2, 3, 4, 40, 97):  # 1 to 96 go in
                found[f"{family} {tokens}"] = forward.losses(ids[:, :tokens]).tolist()
            logits, cache = forward.prefill(ids)
            found[f"{family} first token"] = logits.tolist()
            following = logits.argmax(-1, keepdim=True)
            with torch.no_grad():
                after = model(input_ids=following, **{cache_name(model): cache}).logits
            found[f"{family} next token"] = after.tolist()
            found[f"{family} answers"] = [list(a) for a in forward.score(ids, asked)]
        with rescaled(model, yarn(model), always=True):
            for tokens, counted in ((3, 0), (40, 0), (97, 0), (97, 5)):
                grad = gradient(forward, ids[:1, :tokens], counted)
                found[f"{family} gradient {tokens} {counted}"] = [
                    grad.loss,
                    *grad.grad.tolist(),
                ]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("longrope.layerwise.split_attention.heads_at_once", lambda *_: 1)
                grad = gradient(forward, ids[1:])
            found[f"{family} gradient by heads"] = grad.grad.tolist()
    return found


@pytest.mark.parametrize("members", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_group_computes_what_one_process_does(tmp_path, members):
    out = tmp_path / "found.json"
    code = PROGRAM.format(members=members, families=FAMILIES, out=str(out))
    succeeds(code=code, ranks=members)
    found, expected = json.loads(out.read_text()), shared_forward(SequenceParallelGroup(), FAMILIES)
    assert found.keys() == expected.keys()
    for name in expected:
        ours, theirs = (torch.tensor(side[name]) for side in (found, expected))
        atol = 1e-4 * max(theirs.abs().max().item(), 0.01) if "gradient" in name else 1e-4
        assert_close(ours, theirs, rtol=1e-4, atol=atol, msg=name)


class Thread(SequenceParallelGroup):
    """A member of a group of threads in one process."""

    def __init__(self, rank, size, board, barrier):
        super().__init__(rank, size)
        self.board, self.barrier = board, barrier

    def exchange(self, tensor):
        self.board[self.rank] = tensor
        self.barrier.wait(20)
        found = torch.stack([sent[self.rank] for sent in self.board])
        self.barrier.wait(20)
        return found


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    chunk=st.integers(1, 20),
    members=st.integers(2, 4),
    kv_heads=st.integers(1, 5),
    groups=st.sampled_from([1, 3]),
    at_once=st.sampled_from([1, 2, 4, 100]),
    value_dim=st.sampled_from([8, 5]),
)
def test_attention_heads_are_shared_among_processes(
    tokens, chunk, members, kv_heads, groups, at_once, value_dim
):
    """With idle processes, uneven chunks and shared key heads."""
    generator = torch.Generator().manual_seed(tokens * 100 + chunk)

    def normal(heads, dim=8):
        return torch.randn(2, heads, tokens, dim, dtype=torch.float64, generator=generator)

    inputs = normal(kv_heads * groups), normal(kv_heads), normal(kv_heads, value_dim)
    weight = normal(kv_heads * groups, value_dim).transpose(1, 2)

    def whole(*inputs):
        return differentiable_attention(None, *inputs, None, 0.3)[0]

    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = torch.autograd.grad((whole(*leaves) * weight).sum(), leaves)
    board, barrier = [None] * members, threading.Barrier(members)

    def member(rank):
        chunks = Chunks(tokens, chunk, Thread(rank, members, board, barrier))
        split = SplitAttention(
            chunks, chunk, torch.device("cpu"), lambda s, dtype: torch.empty(s, dtype=dtype)
        )
        mine = [tensor.clone().requires_grad_() for tensor in inputs]
        query, *both = mine

        def layer(span, first):
            return whole(query[:, :, span], *(tensor[:, :, first : span.stop] for tensor in both))

        with torch.no_grad():
            for span, place in chunks.own():
                split.forward(place, partial(layer, span, 0))
            for span, place in chunks.own():
                split.backward_after_attention(
                    place, partial(layer, span, span.start), weight[:, span]
                )
            split.backward_attention()
            for span, place in chunks.own():
                split.backward_before_attention(place, partial(layer, span, span.start))
        return [tensor.grad for tensor in mine], chunks.group.size > 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longrope.layerwise.split_attention.heads_at_once", lambda *_: at_once)
        with ThreadPoolExecutor(members) as pool:
            found = list(pool.map(member, range(members)))
    shares = [grads for grads, shared in found if shared] or [found[0][0]]
    total = [sum(each) for each in zip(*shares, strict=True)]
    assert_close(total, list(expected), rtol=1e-9, atol=1e-12)


@given(tokens=st.integers(1, 300), size=st.integers(1, 50), members=st.integers(1, 5))
def test_every_token_is_in_one_chunk(tokens, size, members):
    every = [Chunks(tokens, size, SequenceParallelGroup(rank, members)) for rank in range(members)]
    alone = tokens < members
    owned = [token for c in every[: 1 if alone else None] for own in c.own() for token in
             range(*own.span.indices(tokens))]  # fmt: skip
    assert sorted(owned) == list(range(tokens))
    assert len({len(c.own()) for c in every}) == 1  # else collectives would hang
    for chunks in every:
        place = 0
        for number, own in enumerate(chunks.own()):
            assert own.place == slice(place, place + own.span.stop - own.span.start)
            place = own.place.stop
            if members > 1 and not alone:
                assert chunks.concurrent(number)[chunks.group.rank] == own.span
        parts = chunks.own(7)
        assert sum(p.span.stop - p.span.start for p in parts) == place
        assert all(p.span.stop - p.span.start <= 7 for p in parts)


@pytest.fixture
def small(texts):
    search = ["search", "bundled", "--target", "2x", "--data", texts, "--windows", 2]
    return [
        *search,
        "--algorithm",
        "evolution",
        "--population",
        4,
        "--mutations",
        2,
        "--crossovers",
        1,
    ]


@pytest.mark.slow
def test_search_and_evaluate_with_sequence_parallel(small, tmp_path):
    """A search of four processes in two groups, and an evaluation of two in one."""
    options = ["--budget", 4, "--chunk-size", 50]
    succeeds(*small, *options, "--out", tmp_path / "one")
    group = ["--sequence-parallel", 2]
    succeeds(*small, *options, *group, "--out", tmp_path / "many", ranks=4)
    lines = zip(history(tmp_path / "many"), history(tmp_path / "one"), strict=True)
    for found, expected in lines:  # the chunks differ, so the last digits may
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["factors"] == expected["factors"]
    model, texts = small[1], small[small.index("--data") + 1]
    asked = [
        "evaluate",
        "perplexity",
        model,
        "--lengths",
        "512",
        "--data",
        texts,
        "--chunk-size",
        100,
        "--json",
    ]
    alone = json.loads(succeeds(*asked))
    together = json.loads(succeeds(*asked, *group, ranks=2))
    (one,), (two,) = alone["perplexity"], together["perplexity"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
    assert two["tokens"] == one["tokens"]


@pytest.mark.slow
def test_a_group_runs_the_gradient_search(small, tmp_path):
    """Two processes of torchrun share each window, with activations in files."""
    search = [*small[: small.index("--algorithm")], "--budget", 16, "--chunk-size", 50]
    search += ["--transfer", "none"]
    succeeds(*search, "--out", tmp_path / "one")
    group = ["--sequence-parallel", 2, "--offload-activations", tmp_path]
    done = interpreter(*TORCHRUN, 2, "-m", "longrope", *search, *group, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = list(zip(history(tmp_path / "two"), history(tmp_path / "one"), strict=True))
    assert sum("grad" in found for found, _ in lines) >= 3
    for found, expected in lines:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["factors"] == pytest.approx(expected["factors"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [["search", "--data", "python-library"], ["extend"]],
)
def test_one_gpu_for_several_processes_is_refused(tmp_path, asked):
    options = ["--target", "2x", "--device", "cuda:1", "--out", tmp_path / "out"]
    done = interpreter(*TORCHRUN, 2, "-m", "longrope", *asked, *options)
    assert done.returncode != 0
    assert "cuda:1" in done.stderr
    assert "2 processes" in done.stderr


def test_a_group_larger_than_the_run_is_refused(small, tmp_path):
    assert "--sequence-parallel is 2" in refused(
        *small, "--sequence-parallel", 2, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("here", "gpus", "torchrun", "expected"),
    [
        (2, 2, True, "cuda:1"),
        (2, 1, False, "cuda:0"),
        (2, 1, True, "1 GPU "),
        (4, 2, True, "2 GPUs "),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, here, gpus, torchrun, expected):
    """On a machine with ``gpus`` GPUs, as reported by torch."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if expected.startswith("cuda"):
        assert local_device(None) == local_device("cuda") == expected
    else:
        with pytest.raises(ValueError, match=f"{here} processes for {expected}"):
            local_device(None)
    assert local_device("cpu") == "cpu"
