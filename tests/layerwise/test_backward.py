"""The layer-by-layer gradient, against autograd through transformers' own forward pass."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from attention.test_chunked import dense
from conftest import FAMILIES, micro_model
from layerwise.test_forward import dense_attention, plain_losses, yarn
from longrope.attention import backward as kernels
from longrope.attention.autograd import differentiable_attention
from longrope.attention.chunked import Options, attention_with_lse
from longrope.distributed import SequenceParallelGroup
from longrope.execution import ExecutionConfig
from longrope.layerwise import backward as module
from longrope.layerwise import split_attention
from longrope.layerwise.backward import check_gradient_support, gradient
from longrope.layerwise.chunks import Chunks
from longrope.layerwise.forward import LongForward
from longrope.layerwise.split_attention import SplitAttention
from longrope.models.load import load_model
from longrope.rope.apply import one_axis, rescaled
from longrope.rope.rotary import find_rotary
from longrope.search.cost import gradient_cost
from longrope.stand_in import StandIn

assert dense_attention is not None  # registered under "dense64"
CACHES = ("cache", "past_key_values")


class Differentiable(StandIn):
    """Stand-in for the rescaled rotary module, differentiable in a factor e^x per frequency."""

    def __init__(self, rotary, x):
        super().__init__(rotary)
        self.config, self.x = rotary.config, x

    def forward(self, hidden, position_ids, layer_type=None):
        rotary = self.original
        if layer_type != rotary.layer_type:
            return rotary.original(hidden, position_ids, layer_type)
        positions = one_axis(position_ids)[..., None].double()
        scaled = positions * rotary.inv_freq.double() * torch.exp(-self.x)
        first = positions < rotary.rescale.start_tokens
        phases = torch.where(first, positions * rotary._original_inv_freq.double(), scaled)
        scaling = torch.where(
            first, rotary._original_attention_scaling, rotary.attention_scaling
        ).double()
        cos, sin = ((f * scaling)[..., rotary._layout] for f in (phases.cos(), phases.sin()))
        if rotary._complex:
            return torch.complex(cos, sin)
        return cos.to(hidden), sin.to(hidden)


def by_autograd(model, ids, answer_tokens=0):
    site = find_rotary(model)
    rotary = getattr(site.owner, site.name)
    x = torch.zeros(len(rotary.inv_freq), dtype=torch.float64, requires_grad=True)
    setattr(site.owner, site.name, Differentiable(rotary, x))
    try:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        loss = losses[-answer_tokens:].mean()
        (grad,) = torch.autograd.grad(loss, x)
    finally:
        setattr(site.owner, site.name, rotary)
    return loss.item(), grad


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_autograd(ids, family, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", 0)
    model, row = micro_model(FAMILIES[family]()).double(), ids[:1]
    model.config._attn_implementation = "dense64"
    with rescaled(model, yarn(model, start_tokens=4), always=True):
        loss, grad = by_autograd(model, row)
        for chunk in (13, 50, 4096):
            found = gradient(LongForward(model, chunk), row)
            # Norms and softmax of some families compute in float32 even in a float64 model, and
            # so do the states of this one.
            most = 1e-4 if family == "qwen3_5" else 1e-5
            assert found.loss == pytest.approx(loss, rel=1e-6)
            atol = most * grad.abs().max().item()
            assert_close(found.grad, grad, rtol=10 * most, atol=atol)
    assert grad.abs().max() > 1e-3  # the check is not trivial
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kept", [True, False])
def test_in_bfloat16(ids, kept, monkeypatch):
    """As close to float32 as bfloat16 allows, in one chunk and in several."""
    if not kept:
        monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", 0)
    for family in ("llama", "gemma2"):  # by the fused kernel, and by products
        model = micro_model(FAMILIES[family]())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            with rescaled(model, yarn(model), always=True):
                gradients.append(gradient(LongForward(model, 40), ids[:1]).grad)
        assert F.cosine_similarity(*gradients, dim=0) > 0.98


def test_the_loss_equals_the_forward_pass(ids):
    model = micro_model(FAMILIES["llama"]()).double()
    with rescaled(model, yarn(model), always=True):
        forward = LongForward(model, 40)
        found = gradient(forward, ids[:1]).loss
        assert found == pytest.approx(forward.losses(ids[:1]).mean().item(), rel=1e-12)


def test_out_of_memory_halves_the_chunk(micro_models, ids, monkeypatch):
    model = micro_models("llama")
    forward = LongForward(model, 64)
    own = LongForward.embed

    def embed(self, *args):
        if self.chunk_size > 20:
            raise torch.cuda.OutOfMemoryError("no room")
        return own(self, *args)

    with rescaled(model, yarn(model), always=True):
        expected = gradient(LongForward(model, 16), ids[:1])
        monkeypatch.setattr(LongForward, "embed", embed)
        found = gradient(forward, ids[:1])
    assert forward.chunk_size == 16
    assert_close(found.grad, expected.grad)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_of_the_answer_tokens_only(micro_models, ids):
    model, row = micro_models("llama"), ids[:1]
    with rescaled(model, yarn(model), always=True):
        loss, grad = by_autograd(model, row, 5)
        found = gradient(LongForward(model, 40), row, 5)
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert_close(found.grad, grad, rtol=1e-3, atol=1e-5)


@settings(max_examples=80)
@given(
    tokens=st.integers(1, 90),
    chunk=st.integers(1, 40),
    kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    window=st.sampled_from([None, 1, 8, 33, 500]),
    softcap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    value_dim=st.sampled_from([8, 5]),
    block=st.sampled_from([7, 1024]),
    heads=st.sampled_from([1, 2, 100]),
    how=st.sampled_from(["kernel", "kernel in blocks", "products"]),
)
def test_attention_equals_brute_force(
    tokens, chunk, kv_heads, groups, window, softcap, with_sinks, value_dim, block, heads, how
):
    """By autograd through the whole sequence, and by split attention, chunk by chunk."""
    generator = torch.Generator().manual_seed(tokens * 100 + chunk)

    def normal(heads, dim=8):
        drawn = torch.randn(2, heads, tokens, dim, dtype=torch.float64, generator=generator)
        return drawn.requires_grad_()

    inputs = normal(kv_heads * groups), normal(kv_heads), normal(kv_heads, value_dim)
    weight = torch.randn(
        2, tokens, kv_heads * groups, value_dim, dtype=torch.float64, generator=generator
    )
    drawn = torch.randn(kv_heads * groups, dtype=torch.float64, generator=generator)
    sinks = drawn.requires_grad_() if with_sinks else None
    trained = (*inputs, *([drawn] if with_sinks else []))
    expected_output = dense(*inputs, 0.3, window, softcap, sinks)
    expected = torch.autograd.grad((expected_output * weight).sum(), trained)

    def attention(query, key, value):
        options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
        return differentiable_attention(None, query, key, value, None, 0.3, **options)[0]

    cpu = torch.device("cpu")
    chunks = Chunks(tokens, chunk, SequenceParallelGroup())
    split = SplitAttention(chunks, chunk, cpu, lambda shape, dtype: torch.empty(shape, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "KEYS", block)
        patch.setattr("longrope.attention.chunked.QUERIES", block)
        patch.setattr(split_attention, "heads_at_once", lambda *_: heads)
        if how == "kernel in blocks":
            patch.setattr(kernels, "_accumulates_in_half", lambda query: True)
        if how == "products":  # as on a device without a fused kernel
            patch.setattr(kernels, "_kernel", lambda query, value: None)
        output = attention(*inputs)
        assert_close(output, expected_output, rtol=1e-6, atol=1e-8)
        found = torch.autograd.grad((output * weight).sum(), trained)
        assert_close(found, expected, rtol=1e-6, atol=1e-8)

        def layer(span, first=None):
            past = slice(span.start if first is None else first, span.stop)
            query, *others = inputs
            return attention(query[:, :, span], *(tensor[:, :, past] for tensor in others))

        with torch.no_grad():
            for span in chunks.spans:
                part = split.forward(span, functools.partial(layer, span, 0))
                assert_close(part, expected_output[:, span], rtol=1e-6, atol=1e-8)
            for span in chunks.spans:
                split.backward_after_attention(
                    span, functools.partial(layer, span), weight[:, span]
                )
            split.backward_attention()
            for span in chunks.spans:
                split.backward_before_attention(span, functools.partial(layer, span))
    assert_close([tensor.grad for tensor in inputs], list(expected[:3]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("tokens", "groups"), [(8192, 1), (4096, 8)])
def test_key_gradients_in_bfloat16_are_summed_in_float32(tokens, groups):
    """The first keys sum over thousands of queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        return torch.randn(1, heads, tokens, 32, generator=generator)

    query, grad, key, value = normal(groups), normal(groups), normal(1), normal(1)
    options = Options(32**-0.5)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [tensor.to(torch.bfloat16).to(dtype) for tensor in (query, key, value)]
        saved = *inputs, *attention_with_lse(*inputs, options)
        found[dtype] = kernels.attention_backward((grad + 1).to(dtype), saved, options)
    for rough, exact in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        for part in (slice(0, 64), slice(64, None)):
            error = (rough[:, :, part] - exact[:, :, part]).norm() / exact[:, :, part].norm()
            assert error < 2**-8 * 1.5


def test_unsupported_gradients_are_refused_before_a_long_sequence(micro_models, ids):
    """Small Gemma 4 models, whose last layers reuse keys of earlier layers."""
    shared = FAMILIES["gemma4"]().to_diff_dict() | {"num_kv_shared_layers": 2}
    shared |= {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 1536}
    model = micro_model(transformers.Gemma4TextConfig(**shared))
    forward = LongForward(model, 40)
    with rescaled(model, yarn(model)):
        assert_close(forward.losses(ids), plain_losses(model, ids), rtol=1e-4, atol=1e-4)
    for tokens in (30, 1000):  # by autograd, and by layers
        with pytest.raises(ValueError, match=r"rotary cosines.*evolution"):
            check_gradient_support(forward, yarn(model), tokens)
    other = micro_models("qwen3_5")
    check_gradient_support(LongForward(other, 40), yarn(other), 1000)


@pytest.mark.parametrize("kept", [True, False])
def test_a_model_whose_cosines_get_no_gradient_is_refused(ids, monkeypatch, kept):
    """As a model with a rotation that is not differentiable."""
    if not kept:
        monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", 0)
    model = micro_model(FAMILIES["llama"]())
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, given: (
                args,
                given | {"position_embeddings": [t.detach() for t in given["position_embeddings"]]},
            ),
            with_kwargs=True,
        )
    with (
        rescaled(model, yarn(model), always=True),
        pytest.raises(ValueError, match="no gradient"),
    ):
        gradient(LongForward(model, 40 if not kept else 500), ids[:1])


@pytest.mark.parametrize(("times", "says"), [(0, "attention interface"), (2, "2 times")])
def test_a_layer_that_does_not_call_its_attention_once_is_refused(ids, monkeypatch, times, says):
    monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", 0)
    model = micro_model(FAMILIES["llama"]())
    own = model.model.layers[1].self_attn.forward

    def several(hidden_states, *args, **kwargs):
        cache = next(value for name, value in kwargs.items() if name in CACHES)
        if not times:
            cache.update(*[hidden_states.unflatten(-1, (4, 16)).transpose(1, 2)] * 2, 1)
        for _ in range(times):
            hidden_states, _ = own(hidden_states, *args, **kwargs)
        return hidden_states, None

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", several)
    with (
        rescaled(model, yarn(model), always=True),
        pytest.raises(ValueError, match=f"{says}.*evolution"),
    ):
        gradient(LongForward(model, 40), ids[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 64, 100])
def test_a_kernel_is_checked_before_use(dtype, dim):
    own, here = kernels._cpu_kernel, torch.device("cpu")

    def past_forgotten(*args):
        return own(*args) if args[0] else [torch.zeros_like(tensor) for tensor in args[3:6]]

    def missing(*args):
        raise RuntimeError("no kernel image is available for execution on the device")

    assert kernels.matches_products(own, here, dtype, dim)
    assert not kernels.matches_products(past_forgotten, here, dtype, dim)
    assert not kernels.matches_products(missing, here, dtype, dim)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gpu_kernel_is_called_with_this_torch_s_signature(causal):
    """Only shapes and arguments; its results are checked on the GPU itself."""
    query = torch.empty(1, 4, 100, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(1, 4, 100 if causal else 300, 64, device="meta", dtype=torch.bfloat16)
    lse = torch.empty(1, 4, 100, device="meta")
    found = kernels._cuda_kernel(causal, 64**-0.5, query, query, key, key, query, lse)
    assert [tensor.shape for tensor in found] == [query.shape, key.shape, key.shape]


def test_the_estimated_cost_matches_the_flops(monkeypatch):
    """By torch's count of matrix products."""
    loaded = load_model("bundled", ExecutionConfig(dtype="float32"))
    row = torch.randint(3, 1500, (1, 513), generator=torch.Generator().manual_seed(0))
    info = loaded.info
    linear, attention = info.forward_flops(512)
    for kept, chunk in ((4e9, 512), (0, 512), (0, 256), (0, 64)):
        monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", kept)
        forward = LongForward(loaded.model, chunk)
        with (
            rescaled(loaded.model, info.rescale("yarn", 2048), always=True),
            FlopCounterMode(display=False) as counter,
        ):
            gradient(forward, row)
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if "mm" in str(op))
        priced = gradient_cost(info, 512, chunk) * (linear + attention) - 3.5 * attention
        # The head is not recomputed, and in a kept graph the first layer's input has no gradient.
        assert 0.85 * priced < products <= 1.01 * priced
    monkeypatch.setattr(module, "_MAX_GRAPH_BYTES", 4e9)
    long = gradient_cost(info, 2**20, 2048)
    assert math.isclose(long, 3.5, rel_tol=0.05)  # nearly all attention: 1 forward, 2.5 backward
