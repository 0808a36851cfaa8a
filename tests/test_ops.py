import math

import torch

from dltrain import ops


def test_attention_is_its_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64).unbind()
    mask = torch.tensor([True, True, True, False, False]).expand(2, 1, 1, 5)
    scores = (q @ k.mT / math.sqrt(4)).masked_fill(~mask, -math.inf)
    torch.testing.assert_close(ops.scaled_dot_product_attention(q, k, v, mask), scores.softmax(-1) @ v)
    causal = (q @ k.mT * 0.3).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    got = ops.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    torch.testing.assert_close(got, causal.softmax(-1) @ v)


def test_attention_of_a_query_without_keys_is_zero():
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    out = ops.scaled_dot_product_attention(q, q, q, torch.zeros(1, 1, 1, 3, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert grad.isfinite().all()


def test_layer_norm_is_its_formula():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8, dtype=torch.float64), torch.rand(8).double(), torch.rand(8).double()
    expected = (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt() * weight + bias
    torch.testing.assert_close(ops.layer_norm(x, (8,), weight, bias, 1e-3), expected)


def test_gelu_is_its_formula():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(ops.gelu(x), x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    tanh = x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    torch.testing.assert_close(ops.gelu(x, "tanh"), tanh)


def test_cross_entropy_is_its_formula():
    torch.manual_seed(0)
    z, t = torch.randn(4, 6), torch.tensor([1, 5, -100, 0])
    lse, kept = z.logsumexp(-1), torch.tensor([0, 1, 3])
    smoothed = 0.9 * (lse - z[range(4), t.clamp(0)]) + 0.1 * (lse - z.mean(-1))
    got = ops.cross_entropy(z, t, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(got[kept], smoothed[kept])
    assert got[2] == 0
    torch.testing.assert_close(ops.cross_entropy(z, t, label_smoothing=0.1), smoothed[kept].mean())


def test_cross_entropy_of_bfloat16_is_float32():
    z = torch.randn(4, 6, dtype=torch.bfloat16)
    loss = ops.cross_entropy(z, torch.arange(4), reduction="sum")
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ops.cross_entropy(z.float(), torch.arange(4), reduction="sum"))
