"""Attention: the Triton kernels against torch and against the formula."""

import itertools
import math

import contract
import interpreter
import pytest
import tolerance
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dltrain import ops
from dltrain.errors import UserError
from dltrain.kernels import attention, dispatch, dropout, launch

DOCUMENTS = torch.tensor([[4] * 20 + [1] * 3 + [2] * 27 + [4] * 20])
FEATURES = {
    "full": {"H": 2, "Q": 40, "K": 40},
    "causal": {"is_causal": True},
    "causal with more keys": {"is_causal": True, "K": 90},
    "causal with more queries": {"is_causal": True, "K": 40},
    "window": {"window": (5, 3)},
    "wide window": {"window": (50, 40)},
    "open window": {"window": (-1, 7)},
    "causal window": {"window": (33, -1), "is_causal": True},
    "a window behind the keys": {"window": (3, 0), "Q": 130, "K": 35},
    "key lengths": {"B": 4, "key_lengths": torch.tensor([0, 33, 70, 100])},
    "causal key lengths": {"B": 2, "key_lengths": torch.tensor([1, 64], dtype=torch.int32), "is_causal": True},
    "documents": {"documents": DOCUMENTS},
    "causal documents": {"B": 2, "documents": torch.cat([DOCUMENTS, DOCUMENTS.flip(1)]), "is_causal": True},
    "documents, window and lengths": {"documents": DOCUMENTS, "window": (4, 2), "key_lengths": torch.tensor([50])},
    "sequences": {"cu_seqlens": torch.tensor([0, 10, 10, 40, 66], dtype=torch.int32)},
    "causal sequences": {"cu_seqlens": torch.tensor([3, 35, 70]), "is_causal": True},
    "grouped queries": {"H": 4, "G": 2, "is_causal": True, "enable_gqa": True, "Q": 40, "K": 40},
    "soft-cap": {"softcap": 2.0, "scale": 0.7},
    "all of it": {
        "H": 3,
        "G": 1,
        "enable_gqa": True,
        "softcap": 3.0,
        "is_causal": True,
        "window": (9, -1),
        "documents": DOCUMENTS,
        "key_lengths": torch.tensor([60]),
    },
    "padded heads": {"E": 24, "V": 40, "Q": 20, "K": 50},
    "one query": {"Q": 1, "K": 37},
}


def problem(
    *, B: int = 1, H: int = 1, G: int | None = None, Q: int = 70, K: int = 70, E: int = 16, V: int = 16, **options
) -> tuple[list[Tensor], dict]:
    """Query, key, value and the output's gradient in float64, and the options of the call."""
    G = G or H
    shapes = (B, H, Q, E), (B, G, K, E), (B, G, K, V), (B, H, Q, V)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes], options


def results(f, tensors: list[Tensor], **options) -> list[Tensor]:
    """The output, dq, dk and dv."""
    *inputs, grad = tensors
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact_together(got: list[Tensor], want: list[Tensor]) -> None:
    """Exact against the largest of all results: where every query sees one key, dq and dk are rounding alone."""
    tolerance.exact([torch.cat([x.flatten() for x in got])], [torch.cat([x.flatten() for x in want])])


def tiles(monkeypatch, BM: int, BN: int, TMA: bool = False, SPECIALIZE: bool = False) -> None:
    """All kernels with these tiles."""
    use = {"BM": BM, "BN": BN, "TMA": TMA, "SPECIALIZE": SPECIALIZE, "num_warps": 4, "num_stages": 1}
    delta = {"BM": BM, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(launch, "config", lambda kernel, *_, **__: delta if kernel == "attention_delta" else use)


@pytest.mark.parametrize("feature", FEATURES)
def test_float64_is_exact(feature, watched):
    tensors, options = problem(**FEATURES[feature])
    got = results(ops.scaled_dot_product_attention, tensors, **options)
    tolerance.exact(got, results(attention.reference, tensors, **options))
    kernels = [launched.kernel for launched in watched.launches]
    assert kernels == ["forward", "delta", "query_gradient", "key_value_gradient"]


@pytest.mark.parametrize(
    "feature", ["full", "causal", "causal documents", "grouped queries", "all of it", "key lengths"]
)
@pytest.mark.parametrize("specialize", [False, True])
def test_other_tiles_and_descriptors(feature, specialize, monkeypatch):
    tensors, options = problem(**FEATURES[feature])
    want = results(attention.reference, tensors, **options)
    tiles(monkeypatch, *((64, 16) if specialize else (16, 32)), TMA=True, SPECIALIZE=specialize)
    tolerance.exact(results(ops.scaled_dot_product_attention, tensors, **options), want)


@pytest.mark.parametrize(
    ("feature", "p"),
    [("full", 0.1), ("soft-cap", 0.7), ("grouped queries", 0.1), ("causal documents", 0.1), ("one query", 1.0)],
)
def test_dropout_is_the_formula_with_its_mask(feature, p, monkeypatch):
    tensors, options = problem(**FEATURES[feature])
    B, H, Q, E = tensors[0].shape
    K = tensors[1].shape[2]
    torch.manual_seed(5)
    keep_BHQK = dropout.keep(dropout.draw_seed(torch.device("cpu")), B * H, Q, K, p).view(B, H, Q, K)
    assert abs(keep_BHQK.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / keep_BHQK.numel()) + 1e-9
    bounds = attention.document_bounds(options["documents"]) if "documents" in options else None
    mask = attention.visible(Q, K, torch.device("cpu"), is_causal="is_causal" in options, bounds=bounds)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        extra = {"scale": options.get("scale", E**-0.5), "softcap": options.get("softcap", 0.0)}
        return attention.explicit(q, k, v, mask, dropout_p=p, keep_BHQK=keep_BHQK, **extra)

    want = results(formula, tensors)
    for size in ((64, 32), (16, 64)):  # the mask does not depend on tiles
        tiles(monkeypatch, *size)
        torch.manual_seed(5)
        tolerance.exact(results(ops.scaled_dot_product_attention, tensors, dropout_p=p, **options), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "feature", [{}, {"is_causal": True}, {"E": 24, "V": 24}, {"E": 80, "V": 80, "window": (20, 20)}]
)
def test_lower_precision_is_as_good_as_torch(dtype, feature):
    """torch's kernel; its formula of single products, which it takes where E and V differ, rounds less."""
    tensors, options = problem(**feature)
    rounded = [x.to(dtype) for x in tensors]
    want = results(attention.reference, [x.double() for x in rounded], **options)
    got = results(ops.scaled_dot_product_attention, rounded, **options)
    tolerance.as_good(got, results(attention.reference, rounded, **options), want)


@pytest.mark.parametrize("E", [16, 24, 40, 64, 80, 96, 128, 192, 256])
def test_every_head_size(E):
    tensors, _ = problem(H=1, Q=9, K=21, E=E, V=E)
    got = results(ops.scaled_dot_product_attention, tensors, is_causal=True)
    tolerance.exact(got, results(F.scaled_dot_product_attention, tensors, is_causal=True))


@settings(max_examples=16)
@given(
    B=st.integers(0, 2),
    G=st.integers(1, 2),
    group=st.integers(1, 3),
    Q=st.integers(0, 70),
    K=st.integers(0, 70),
    E=st.integers(1, 40),
    V=st.integers(1, 20),
    is_causal=st.booleans(),
    window=st.none() | st.tuples(st.integers(-1, 40), st.integers(-1, 40)),
    lengths=st.none() | st.lists(st.integers(-1, 80), min_size=2, max_size=2),
    layout=st.sampled_from(["heads outside", "heads inside", "transposed", "unaligned"]),
    constant_grad=st.booleans(),
)
def test_any_shape(B, G, group, Q, K, E, V, is_causal, window, lengths, layout, constant_grad):
    def laid(x: Tensor) -> Tensor:
        if layout == "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "transposed":
            return x.mT.contiguous().mT
        return F.pad(x, (1, 2))[..., 1:-2] if layout == "unaligned" else x

    tensors, options = problem(B=B, H=G * group, G=G, Q=Q, K=K, E=E, V=V, is_causal=is_causal, window=window)
    options["enable_gqa"] = group > 1
    options["key_lengths"] = None if lengths is None else torch.tensor([lengths, lengths]).mT[:B, 0]  # strided
    tensors = [laid(x) for x in tensors]
    if constant_grad:
        tensors[3] = torch.ones((), dtype=torch.float64).expand(tensors[3].shape)
    with interpreter.watch():
        got = results(ops.scaled_dot_product_attention, tensors, **options)
    mask = attention.visible(
        Q, K, torch.device("cpu"), is_causal=is_causal, key_lengths=options["key_lengths"], window=window
    )

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.explicit(q, k, v, mask, scale=E**-0.5)

    exact_together(got, results(formula, tensors))


@settings(max_examples=8)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=90), st.booleans(), st.integers(1, 20))
def test_any_documents(documents, is_causal, left):
    tensors, options = problem(H=1, Q=len(documents), K=len(documents), documents=torch.tensor([documents]))
    options |= {"is_causal": is_causal, "window": (left, -1)}
    got = results(ops.scaled_dot_product_attention, tensors, **options)
    exact_together(got, results(attention.reference, tensors, **options))


def test_bounds():
    start, end = attention.document_bounds(torch.tensor([[7, 7, 0, 7], [1, 1, 1, 1]]))
    assert start.tolist() == [[0, 0, 2, 3], [0, 0, 0, 0]]
    assert end.tolist() == [[2, 2, 3, 4], [4, 4, 4, 4]]
    start, end = attention.sequence_bounds(torch.tensor([1, 1, 3, 4]), 6)
    assert start.tolist() == [[0, 1, 1, 3, 4, 4]]
    assert end.tolist() == [[0, 3, 3, 4, 4, 4]]  # 0, 4 and 5 lie in no sequence


def test_the_reference_is_its_formula():
    """Each mask written out, pair by pair."""
    for feature in ("all of it", "causal sequences"):
        (q, k, v, _), options = problem(**FEATURES[feature])
        Q, K = q.shape[2], k.shape[2]
        left, right = options.get("window", (-1, -1))
        see = torch.zeros(Q, K, dtype=torch.bool)
        for i in range(Q):
            for j in range(K):
                see[i, j] = j <= i and (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
                if "key_lengths" in options:
                    see[i, j] &= j < options["key_lengths"][0]
                if "documents" in options:
                    d = options["documents"][0]
                    see[i, j] &= bool((d[min(i, j) : max(i, j) + 1] == d[i]).all())
                if "cu_seqlens" in options:
                    cu = options["cu_seqlens"].tolist()
                    see[i, j] &= any(a <= i < b and a <= j < b for a, b in itertools.pairwise(cu))
        s = q @ k.expand(1, q.shape[1], -1, -1).mT * q.shape[-1] ** -0.5
        cap = options.get("softcap")
        s = (cap * torch.tanh(s / cap) if cap else s).masked_fill(~see, -math.inf)
        want = s.softmax(-1).nan_to_num(0.0) @ v
        tolerance.exact([attention.reference(q, k, v, **options)], [want])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # of pairs that are masked next
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(watched, dtype):
    """All logits near 1e4 or near -1e4, row by row: as exact as numbers of that size allow."""
    tensors, options = problem(is_causal=True)
    tensors[0][..., 0], tensors[1][..., 0] = 100.0, 100.0
    tensors[0][:, :, ::2, 0] = -100.0
    tensors = [x.to(dtype) for x in tensors]
    out, dq, dk, dv = results(ops.scaled_dot_product_attention, tensors, scale=1.0, **options)
    want = results(attention.reference, [x.double() for x in tensors], scale=1.0, **options)
    want[1][..., 0] = dq[..., 0]  # a sum over keys that cancels but for rounding
    for g, w in zip((out, dq, dk, dv), want):
        assert g.isfinite().all()
        assert (g - w).norm() <= 1e-2 * w.norm()


def test_rows_without_keys_are_zero():
    tensors, options = problem(**FEATURES["key lengths"])
    got = results(ops.scaled_dot_product_attention, [x.float() for x in tensors], **options)
    assert all(g[0].eq(0).all() for g in got)
    assert all(g[2].ne(0).any() for g in got)


def test_a_row_does_not_depend_on_its_batch():
    tensors, _ = problem(B=3, H=1, Q=40, K=40)
    tensors = [x.to(torch.bfloat16) for x in tensors]
    lengths = torch.tensor([40, 17, 30])
    whole = results(ops.scaled_dot_product_attention, tensors, key_lengths=lengths)
    alone = results(ops.scaled_dot_product_attention, [x[1:2] for x in tensors], key_lengths=lengths[1:2])
    assert all(torch.equal(w[1:2], a) for w, a in zip(whole, alone))


def test_packed_sequences_equal_separate_ones():
    lengths = [5, 33, 20]
    tensors, _ = problem(Q=58, K=58)
    cu = torch.tensor([0, 5, 38, 58])
    packed = results(ops.scaled_dot_product_attention, tensors, cu_seqlens=cu, is_causal=True)
    parts = zip(*(x.split(lengths, 2) for x in tensors))
    alone = [results(ops.scaled_dot_product_attention, list(part), is_causal=True) for part in parts]
    tolerance.exact(packed, [torch.cat(one, 2) for one in zip(*alone)])


def test_keys_are_read_as_often_as_their_tiles_are_seen(watched):
    """64 x 32 tiles of queries and keys: a causal tile reads the keys up to its last query, rounded up to tiles."""
    tensors, _ = problem(H=3, Q=128, K=128)
    results(ops.scaled_dot_product_attention, tensors, is_causal=True)
    row = 16 * 8  # bytes
    (ran,) = watched.of("forward")
    assert ran.loaded["key"] == ran.loaded["value"] == 3 * (64 + 128) * row
    assert ran.loaded["query"] == ran.stored["out"] == 3 * 128 * row
    (ran,) = watched.of("query_gradient")
    assert ran.loaded["key"] == ran.loaded["value"] == 3 * (64 + 128) * row
    (ran,) = watched.of("key_value_gradient")  # tiles of 64 keys
    assert ran.loaded["query"] == ran.loaded["grad"] == 3 * (128 + 64) * row
    assert watched.of("delta")[0].bytes == 3 * 128 * (2 * row + 8)
    results(ops.scaled_dot_product_attention, tensors, documents=torch.arange(2).repeat_interleave(64)[None])
    assert watched.of("forward")[1].loaded["key"] == 3 * (64 + 64) * row


def test_what_torch_asks_of_an_op():
    (q, k, v, grad), _ = problem(H=2, G=1, Q=5, K=7)
    numbers = 0.25, 0.0, 0.0, 3, 0
    rest = None, torch.tensor([6]), None, None, *numbers
    contract.check_op(attention.backward, grad, q, k, v, *attention.forward(q, k, v, *rest), *rest)
    contract.check_op(attention.forward, *(x.requires_grad_() for x in (q, k, v)), *rest)


def test_compiled_in_one_graph():
    (q, k, v, _), _ = problem(H=1, Q=6, K=6)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
        return ops.scaled_dot_product_attention(q, k, v, is_causal=True, documents=documents)

    contract.check_compiled(f, q, k, v)


def test_a_second_derivative_raises():
    (q, k, v, _), _ = problem(H=1, Q=3, K=3)
    contract.check_no_second_derivative(ops.scaled_dot_product_attention, q, k, v)


def test_autocast_and_checkpointing():
    (q, k, v, grad), _ = problem(H=1, Q=6, K=6)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        plain = f(*leaves)
        torch.manual_seed(1)
        again = checkpoint(f, *leaves, use_reentrant=False)
    assert plain.dtype == torch.bfloat16
    grads = [torch.autograd.grad(out, leaves, grad.to(torch.bfloat16)) for out in (plain, again)]
    assert torch.equal(plain, again)
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_auto_on_a_cpu_is_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "auto")
    (q, k, v, _), _ = problem()
    assert ops.scaled_dot_product_attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == q.shape
    q, k, v = q.float(), k.float(), v.float()
    mask_B11K = (torch.arange(70) < 50)[None, None, None]
    want = F.scaled_dot_product_attention(q, k, v, mask_B11K)
    assert torch.equal(ops.scaled_dot_product_attention(q, k, v, mask_B11K), want)
    assert torch.equal(ops.scaled_dot_product_attention(q, k, v, key_lengths=torch.tensor([50])), want)
    mask = torch.randn(70, 70)
    got = ops.scaled_dot_product_attention(q, k, v, mask, window=(-1, 20))
    want = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(~torch.ones(70, 70).tril(20).bool(), -math.inf))
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_lengths": torch.ones(3, dtype=torch.int64)}, "key_lengths has shape \\(3,\\)"),
        ({"key_lengths": torch.ones(1)}, "key_lengths is torch.float32"),
        ({"documents": torch.ones(1, 4, dtype=torch.int32)}, "documents has shape \\(1, 4\\)"),
        ({"cu_seqlens": torch.zeros(2, 2, dtype=torch.int32)}, "cu_seqlens has shape"),
        ({"documents": DOCUMENTS, "cu_seqlens": torch.tensor([0, 70])}, "give one"),
        ({"documents": DOCUMENTS, "K": 40}, "as many keys as queries"),
        ({"cu_seqlens": torch.tensor([0, 70]), "B": 2}, "one row"),
        ({"window": (3, -2)}, "window is"),
        ({"softcap": -1.0}, "softcap is"),
    ],
)
def test_bad_input(change, words):
    tensors, options = problem(**change)
    with pytest.raises(ValueError, match=words) as caught:
        results(ops.scaled_dot_product_attention, tensors, **options)
    assert "\n" not in str(caught.value)


def test_what_no_kernel_does():
    (q, k, v, _), _ = problem(H=2, Q=4, K=4)
    with pytest.raises(UserError, match="has no kernel for an attn_mask"):
        ops.scaled_dot_product_attention(q, k, v, torch.zeros(4, 4))
    for inputs in ((q[0], k[0], v[0]), (q, k[:, :1], v[:, :1]), (q, k.float(), v)):
        with pytest.raises(UserError, match="has no kernel for"):
            ops.scaled_dot_product_attention(*inputs)
    big = torch.randn(1, 1, 2, 512)
    with pytest.raises(UserError, match="more than 256 features"):
        ops.scaled_dot_product_attention(big, big, big)
    with pytest.raises(RuntimeError):
        ops.scaled_dot_product_attention(q.long(), k.long(), v.long())  # torch's own words


def test_the_compiler_makes_hopper_code_of_every_configuration():
    import gate

    binaries = gate.compiled("hopper_attention")
    assert {binary.kernel for binary in binaries} == {"forward", "delta", "query_gradient", "key_value_gradient"}
    for binary in binaries:
        exact = "float32" in binary.launch  # products of float32 are no matter for the tensor cores
        narrow = (binary.kernel, binary.launch[:3]) == ("key_value_gradient", "256")  # see the row's note
        binary.check(matmul=binary.kernel != "delta" and not exact and not narrow)
        if "'SPECIALIZE': True" in binary.launch:
            assert binary.tma and binary.warps == 12  # two groups that compute, one that loads
