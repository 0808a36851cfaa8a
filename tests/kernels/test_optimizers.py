"""AdamW and LAMB: the Triton kernels against torch and the papers' lines, and what holds for both."""

import copy
from collections.abc import Callable
from typing import Any

import contract
import gate
import interpreter
import pytest
import tolerance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.kernels import dispatch, multi_tensor
from dltrain.kernels.adamw import AdamW
from dltrain.kernels.lamb import Lamb

SHAPES = [(3, 5), (9000,), (2, 3, 2, 2), (33, 48), (), (0, 4)]
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(params: list[nn.Parameter]) -> AdamW:
    return AdamW(params, **HYPER)


def lamb(params: list[nn.Parameter]) -> Lamb:
    return Lamb([p for p in params if p.numel() < 2000], **HYPER)


def plain(params: list[nn.Parameter]) -> Lamb:
    return Lamb(params, **HYPER, adapt=False)


def parameters(dtype: torch.dtype = torch.float64, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(params: list[nn.Parameter], step: int, factor: float = 1.0) -> None:
    """A function of the step, and of the tensors' order and shapes."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * factor).to(p.dtype)


def train(optimizer: Any, steps: int = 3, factor: float | None = None) -> list[Tensor]:
    """The parameters after some steps; `factor` is applied by the optimizer."""
    for step in range(steps):
        give_gradients(of(optimizer), step)
        if factor is None:
            optimizer.step()
        else:
            optimizer.step(scale=torch.tensor(factor, dtype=torch.float64))
    return [p.detach() for p in of(optimizer)]


def watched_step(optimizer: Any, step: int = 7) -> interpreter.Report:
    """One more step, looked at."""
    give_gradients(of(optimizer), step)
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    grads = [p.grad for p in of(optimizer) if p.grad is not None]
    with interpreter.watch(*of(optimizer), *grads, *states) as report:
        optimizer.step()
    return report


def in_mode(monkeypatch: pytest.MonkeyPatch, mode: str, build: Build, **kwargs: Any) -> list[Tensor]:
    dtype = kwargs.pop("dtype", torch.float64)
    monkeypatch.setattr(dispatch, "MODE", mode)
    return train(build(parameters(dtype)), **kwargs)


# ---- numbers ----


def test_adamw_is_torchs():
    got = train(adamw(parameters()), factor=0.37)
    want = parameters()
    theirs = torch.optim.AdamW(want, **HYPER)
    for step in range(3):
        give_gradients(want, step, 0.37)
        theirs.step()
    tolerance.exact(got, [p.detach() for p in want])


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("build", [lamb, plain])
def test_lamb_is_its_lines(monkeypatch, build, mode):
    got = in_mode(monkeypatch, mode, build, factor=0.37)
    lr, (b1, b2), eps, decay = HYPER.values()
    params = of(build(parameters()))
    w, m, v = [p.detach() for p in params], [0.0] * len(params), [0.0] * len(params)
    for step in range(3):
        give_gradients(params, step, 0.37)
        for i, p in enumerate(params):
            g = p.grad
            assert g is not None
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            r = m[i] / (1 - b1 ** (step + 1)) / ((v[i] / (1 - b2 ** (step + 1))).sqrt() + eps)
            u = r + decay * w[i]
            w[i] = w[i] - lr * (w[i].norm() / u.norm() if build is lamb and p.numel() else 1.0) * u
    tolerance.exact(got, w)


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_lamb_of_zeros_moves(monkeypatch, mode):
    """Weights of zero, as biases and last layers have at the start, take a step of ratio 1; no gradient, no step."""
    monkeypatch.setattr(dispatch, "MODE", mode)
    w, still = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.ones(2, 3))
    w.grad, still.grad = torch.ones(2, 3), torch.zeros(2, 3)
    Lamb([w, still], lr=0.1, weight_decay=0.0).step()
    torch.testing.assert_close(w.detach(), torch.full((2, 3), -0.1))
    assert torch.equal(still.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("build", [adamw, lamb])
def test_float32_is_as_good_as_torch(monkeypatch, build):
    start = of(build(parameters()))
    got, theirs = (in_mode(monkeypatch, mode, build, dtype=torch.float32) for mode in ("triton", "reference"))
    want = in_mode(monkeypatch, "reference", build)
    kept = [i for i, p in enumerate(start) if p.numel() > 8]  # of fewer, luck decides
    tolerance.as_good([got[i] for i in kept], [theirs[i] for i in kept], [want[i] for i in kept])


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("build", [adamw, lamb, plain])
def test_a_step_that_is_not_good_moves_nothing(monkeypatch, build, mode):
    """NaN gradients too; one that is good has the bits of one that nobody asked about."""
    monkeypatch.setattr(dispatch, "MODE", mode)
    optimizer, asked = build(parameters()), build(parameters())
    for each in (optimizer, asked):
        train(each, 2)
    before = [t.clone() for p in of(asked) for t in (p, asked.state[p]["exp_avg"], asked.state[p]["exp_avg_sq"])]
    for factor in (torch.nan, 1.0):
        give_gradients(of(asked), 2, factor)
        good = torch.tensor(factor == 1.0)
        asked.step(scale=torch.tensor(factor, dtype=torch.float64), good=good)  # type: ignore[call-arg]
        after = [t for p in of(asked) for t in (p, asked.state[p]["exp_avg"], asked.state[p]["exp_avg_sq"])]
        assert all(torch.equal(a, b) for a, b in zip(before, after)) != bool(good)
        for p in of(asked):
            asked.state[p]["step"].fill_(2.0)
    give_gradients(of(optimizer), 2)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(of(optimizer), of(asked)))


# ---- memory ----


@pytest.mark.parametrize("build", [adamw, lamb, plain])
def test_sanitizer(build):
    optimizer = build(parameters(torch.float32))
    train(optimizer, 1)
    assert watched_step(optimizer).launches


def test_bytes():
    """AdamW reads and writes 28 bytes a parameter, with bfloat16 weights and masters too; LAMB 40."""
    n = 32 * 1024
    for build, dtype, each, sizes in (
        (adamw, torch.float32, 28, [(n,)]),
        (lambda params: AdamW(params, **HYPER, masters=True), torch.bfloat16, 28, [(n,)]),
        (lambda params: Lamb(params, **HYPER), torch.float32, 40, [(32, 1024)]),
    ):
        optimizer = build(parameters(dtype, sizes))
        train(optimizer, 1)
        report = watched_step(optimizer)
        assert each * n <= report.bytes <= 1.02 * each * n
        assert not any(launch.atomics for launch in report.launches)


def test_one_launch_for_many_tensors():
    optimizer = adamw(parameters(torch.float32, [(7,)] * 20))
    train(optimizer, 1)
    (launch,) = watched_step(optimizer).launches
    assert launch.programs == 20


@settings(max_examples=15)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4),
    shift=st.integers(0, 3),
    build=st.sampled_from([adamw, lamb, plain]),
)
def test_any_shape(shapes, shift, build):
    """Empty ones, scalars, and what does not begin at a multiple of 16 bytes."""

    def made() -> list[nn.Parameter]:
        tensors = [p.detach() for p in parameters(shapes=shapes)]
        return [
            nn.Parameter(torch.empty(t.numel() + shift, dtype=t.dtype)[shift:].view(t.shape).copy_(t)) for t in tensors
        ]

    optimizer = build(made())
    got = train(optimizer, 1)
    dispatch.MODE = "reference"
    want = train(build(made()), 1)
    dispatch.MODE = "triton"
    tolerance.exact(got, want)
    watched_step(optimizer)


def test_spans_cover_every_element_once():
    spans = multi_tensor.spans((10, 0, 3, 8), (4, 4, 4, 8), torch.device("cpu")).tolist()
    assert spans == [[0, 0, 4], [0, 4, 4], [0, 8, 2], [2, 0, 3], [3, 0, 8]]


@pytest.mark.parametrize("build", [adamw, plain])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_memory_of_any_order(monkeypatch, build, mode):
    """Channels last, gradients in another order than weights, addresses that are no multiples of 16."""
    monkeypatch.setattr(dispatch, "MODE", mode)
    want = train(build(parameters(torch.float32, [(2, 3, 4, 5), (9,)])))
    a, b = parameters(torch.float32, [(2, 3, 4, 5), (9,)])
    shifted = torch.empty(10)[1:].copy_(b.detach())
    got = train(build([nn.Parameter(a.detach().to(memory_format=torch.channels_last)), nn.Parameter(shifted)]))
    assert all(torch.equal(g, w) for g, w in zip(got, want))


# ---- shards ----


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("build", [adamw, plain])
def test_a_shard_gives_the_bits_of_the_whole(monkeypatch, build, mode):
    monkeypatch.setattr(dispatch, "MODE", mode)
    torch.manual_seed(0)
    value, grads = torch.randn(33, 13), torch.randn(3, 33, 13)

    def trained(rows: slice) -> Tensor:
        p = nn.Parameter(value[rows].clone())
        optimizer = build([p])
        for grad in grads:
            p.grad = grad[rows].clone()
            optimizer.step()
        return p.detach()

    whole = trained(slice(None))
    for cut in (1, 16, 32):
        assert torch.equal(torch.cat([trained(slice(cut)), trained(slice(cut, None))]), whole)


@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize("width", [13, 48, 1300])
def test_rows_of_lamb_do_not_depend_on_the_shard(monkeypatch, mode, width):
    """The sums that norms are made of, and the moments: the rest is one number for a tensor."""
    from dltrain.kernels.lamb import direction, moments, row_squares

    w, g, m, v = torch.randn(4, 9, width)
    v = v.square()
    hyper = 0.9, 0.99, 1e-6, 0.1

    def squares(rows: slice) -> Tensor:
        a, b, c, d = (x[rows].clone() for x in (w, g, m, v))
        if mode == "triton":
            return moments([a], [b], [c], [d], [3], None, 0.1, *hyper, [width])
        return torch.stack((row_squares(a), row_squares(direction(a, b, c, d, 3, None, *hyper))), 1)

    whole = squares(slice(None))
    for cut in (1, 4, 8):
        assert torch.equal(torch.cat([squares(slice(cut)), squares(slice(cut, None))]), whole)


def test_rows_are_gathered_in_the_order_of_the_whole(monkeypatch):
    """Two processes in one: each shard's rows are sent by turns, and what comes back is the whole tensors' order."""
    from dltrain.kernels import lamb as module

    whole = [torch.arange(10.0).view(5, 2), 100 + torch.arange(2.0).view(1, 2), 200 + torch.arange(8.0).view(4, 2)]
    shards = [[w[r * c : (r + 1) * c] for w in whole for c in [-(-len(w) // 2)]] for r in range(2)]
    sent: list[Tensor] = []

    class Mesh:
        ndim = 1

        def size(self, dim: int) -> int:
            return 2

        def get_group(self, dim: int) -> None:
            return None

    def run(rank: int) -> Tensor:
        monkeypatch.setattr(module, "_mesh", lambda p: Mesh())
        monkeypatch.setattr(module, "local", lambda p: next(parts))
        parts = iter(shards[rank])
        return module.gather(torch.cat(shards[rank]), whole)

    monkeypatch.setattr(module, "_all_gather", lambda out, mine, group: sent.append(mine))
    for rank in range(2):
        run(rank)
    monkeypatch.setattr(module, "_all_gather", lambda out, mine, group: out.copy_(torch.cat(sent)))
    assert torch.equal(run(0), torch.cat(whole)) and torch.equal(run(1), torch.cat(whole))


@pytest.fixture
def mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [adamw, lamb])
def test_dtensors(mesh, build):
    from torch.distributed.tensor import Shard, distribute_tensor

    want = train(build(parameters(torch.float32, [(6, 16), (3,)])))
    params = [
        nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
        for p in parameters(torch.float32, [(6, 16), (3,)])
    ]
    optimizer = build(params)
    for step in range(3):
        plain_params = parameters(torch.float32, [(6, 16), (3,)])
        give_gradients(plain_params, step)
        for p, q in zip(params, plain_params):
            p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])  # type: ignore
        optimizer.step()
    assert all(torch.equal(p.full_tensor(), w) for p, w in zip(params, want))  # type: ignore
    assert type(optimizer.state[params[0]]["exp_avg"]) is type(params[0].data)


def test_lamb_refuses_what_has_no_norm(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.randn(2, 4), mesh, [Shard(1)]))
    p.grad = p.detach().clone()
    with pytest.raises(UserError, match="sharded along dimension 0"):
        Lamb([p]).step()
    optimizer = Lamb(parameters(torch.float32))
    optimizer.param_groups[0]["params"] = parameters(torch.float32, [(100,)])  # as DeepSpeed does
    with pytest.raises(UserError, match="zero1 to zero3"):
        optimizer.step()


# ---- 16 bits ----


def test_masters():
    """bfloat16 weights are their masters, rounded, and the masters those of a float32 run with the same gradients."""
    shapes = [(9, 7), (5,)]
    optimizer = AdamW(parameters(torch.bfloat16, shapes), **HYPER, masters=True)
    wide = [nn.Parameter(p.detach().float()) for p in of(optimizer)]
    reference = AdamW(wide, **HYPER)
    for step in range(3):
        give_gradients(of(optimizer), step)
        for p, q in zip(of(optimizer), wide):
            q.grad = p.grad.float()  # type: ignore
        optimizer.step()
        reference.step()
    for p, q in zip(of(optimizer), wide):
        assert torch.equal(optimizer.state[p]["master"], q.detach())
        assert torch.equal(p.detach(), q.detach().bfloat16())


def test_masters_without_a_kernel(monkeypatch):
    def build(params: list[nn.Parameter]) -> AdamW:
        return AdamW(params, **HYPER, masters=True)

    got, want = (in_mode(monkeypatch, m, build, dtype=torch.bfloat16, factor=0.5) for m in ("reference", "triton"))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=2**-7, atol=0)


def test_rounding_at_random_keeps_small_steps():
    """Steps of an eighth of a unit in the last place: nearest loses them all, random ones arrive on average."""
    n, steps = 4096, 4

    def moved(**kwargs: Any) -> Tensor:
        p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
        optimizer = AdamW([p], lr=2**-10, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0, **kwargs)
        for _ in range(steps):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        return p.detach().float() - 1

    assert moved().abs().max() == 0
    far = moved(stochastic=True, seed=1)
    expected, deviation = steps * 2**-10, (steps * 2**-10 * 2**-7 / n) ** 0.5
    assert abs(far.mean() - expected) < 4 * deviation
    assert torch.equal(far, moved(stochastic=True, seed=1)) and not torch.equal(far, moved(stochastic=True, seed=2))


def test_rounding_at_random_does_not_depend_on_the_shard():
    from dltrain.kernels.adamw import adamw as step

    whole = torch.randn(64).bfloat16()
    grad, seed = torch.randn(64).bfloat16(), torch.tensor([5])

    def stepped(first: int, last: int) -> Tensor:
        p, g = whole[first:last].clone(), grad[first:last].clone()
        m, v = torch.zeros(2, len(p))
        step([p], [g], [m], [v], [], [1], None, 1e-3, 0.9, 0.99, 1e-8, 0.0, seed, [3], [first])
        return p

    assert torch.equal(torch.cat([stepped(0, 23), stepped(23, 64)]), stepped(0, 64))


def test_rounding_at_random_keeps_infinity_and_nan():
    p = nn.Parameter(torch.tensor([float("inf"), -float("inf"), 1.0, 1.0], dtype=torch.bfloat16))
    p.grad = torch.tensor([0.0, 0.0, float("nan"), 0.0], dtype=torch.bfloat16)
    AdamW([p], lr=1e-3, weight_decay=0.0, stochastic=True).step()
    assert p[:2].tolist() == [float("inf"), -float("inf")] and p[2].isnan() and p[3] == 1


def test_bad_choices(monkeypatch):
    with pytest.raises(UserError, match="choose one"):
        AdamW(parameters(), masters=True, stochastic=True)
    monkeypatch.setattr(dispatch, "MODE", "reference")
    with pytest.raises(UserError, match="rounds at random in its kernel"):
        train(AdamW(parameters(torch.bfloat16), stochastic=True))


# ---- as optimizers of torch ----


def test_state_is_torchs(monkeypatch):
    """A run may change over to torch's AdamW and back."""
    optimizer = adamw(parameters())
    train(optimizer, 2)
    params = [nn.Parameter(p.detach().clone()) for p in of(optimizer)]
    theirs = torch.optim.AdamW(params, **HYPER)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or they share it
    for o in (optimizer, theirs):
        give_gradients(of(o), 5)
        o.step()
    tolerance.exact([p.detach() for p in of(optimizer)], [p.detach() for p in params])
    optimizer.load_state_dict(theirs.state_dict())
    assert {n: t.dtype for n, t in optimizer.state[of(optimizer)[0]].items()} == {
        "step": torch.float32, "exp_avg": torch.float64, "exp_avg_sq": torch.float64
    }  # fmt: skip


@pytest.mark.parametrize("factor", [None, 0.37])
def test_without_a_kernel_the_bits_are_torchs(monkeypatch, factor):
    got = in_mode(monkeypatch, "auto", adamw, dtype=torch.float32, factor=factor)
    want = parameters(torch.float32)
    theirs = torch.optim.AdamW(want, **HYPER, foreach=True)
    for step in range(3):
        give_gradients(want, step)
        if factor:
            torch._foreach_mul_([p.grad for p in want if p.grad is not None], torch.tensor(factor, dtype=torch.float32))
        theirs.step()
    assert all(torch.equal(g, w.detach()) for g, w in zip(got, want))


@pytest.mark.parametrize("build", [adamw, lamb])
def test_a_parameter_without_a_gradient_stays(build):
    a, b = parameters(torch.float32, [(3, 4), (3, 4)])
    optimizer, before = build([a, b]), b.detach().clone()
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b.detach(), before) and b not in optimizer.state
    assert optimizer.step(lambda: 3.0) == 3.0


def test_ops():
    def some() -> list[Tensor]:
        return [torch.rand(4, 16), torch.rand(2, 16)]

    ops, scale, hyper = torch.ops.dltrain, torch.ones(()), (1e-2, 0.9, 0.99, 1e-8, 0.1)
    contract.check_op(
        ops.adamw.default, some(), some(), some(), some(), [], [1, 1], scale, *hyper, None, [0, 1], [0, 0]
    )
    contract.check_op(ops.lamb_moments.default, some(), some(), some(), some(), [1, 1], scale, *hyper, [16, 16])
    squares = torch.rand(6, 2, dtype=torch.float64)
    contract.check_op(ops.lamb_apply.default, some(), some(), some(), squares, [4, 2], [1, 1], *hyper, [16, 16])


def test_hopper():
    for binary in gate.compiled("hopper_optimizers"):
        binary.check(wide=binary.kernel != "_ratios")
