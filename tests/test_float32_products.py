"""bfloat16 products made in float32, against products in float64 rounded once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lopt_lite import float32_products as products
from lopt_lite.residency import memory_model

CPU = torch.device("cpu")


@pytest.fixture(params=["much room", "little room"], autouse=True)
def _room(request, monkeypatch):
    """As on a CPU without bfloat16 instructions; with little room, everything is done in many pieces."""
    monkeypatch.setattr(products, "_cpu_multiplies_bfloat16", lambda: False)
    if request.param == "little room":
        monkeypatch.setattr(products, "_SCRATCH", 700)
        monkeypatch.setattr(products, "_LONGEST_SUM", 13)


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _strided(kind, *shape, seed=0):
    """The same values in different places of memory."""
    values = _random(*shape, seed=seed)
    if kind == "by columns":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "part":
        whole = _random(*shape[:-1], shape[-1] + 5, seed=seed + 1)
        whole[..., 2 : 2 + shape[-1]] = values
        return whole[..., 2 : 2 + shape[-1]]
    return values


def _is_rounded(found, exact):
    """Within half a unit in the last place of bfloat16, and what float32 sums lose of terms that cancel."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("left", ["by rows", "by columns", "part"])
@pytest.mark.parametrize("right", ["by rows", "by columns", "part"])
@pytest.mark.parametrize("shape", [(1, 3, 2), (31, 29, 37), (5, 64, 1), (2, 4, 31, 29, 37)])
def test_products_are_exact_but_for_one_rounding(left, right, shape):
    *batch, rows, inner, columns = shape
    a, b = _strided(left, *batch, rows, inner), _strided(right, *batch, inner, columns, seed=5)
    with products.float32_products(CPU):
        _is_rounded(a @ b, a.double() @ b.double())


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("alpha", [1, 2.5])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_sums_with_products(beta, alpha, batch):
    a, b, c = _random(*batch, 11, 40), _random(*batch, 40, 17, seed=1), _random(*batch, 11, 17, seed=2)
    add = torch.baddbmm if batch else torch.addmm
    exact = beta * c.double() + alpha * (a.double() @ b.double())
    with products.float32_products(CPU):
        _is_rounded(add(c, a, b, beta=beta, alpha=alpha), exact)
        row = c[..., :1, :]
        _is_rounded(add(row, a, b), row.double() + a.double() @ b.double())
        out = torch.empty(0, dtype=torch.bfloat16)
        add(c, a, b, beta=beta, alpha=alpha, out=out)
        _is_rounded(out, exact)
        (c.baddbmm_ if batch else c.addmm_)(a, b, beta=beta, alpha=alpha)
        _is_rounded(c, exact)


def test_with_beta_0_what_was_there_does_not_matter():
    """As everywhere in PyTorch."""
    c = torch.full((2, 2), float("nan")).bfloat16()
    with products.float32_products(CPU):
        _is_rounded(
            torch.addmm(c, _random(2, 3), _random(3, 2), beta=0), _random(2, 3).double() @ _random(3, 2).double()
        )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modules_without_gradients(mode):
    """In inference mode, operations come as they were called, not in their parts."""
    x, linear = _random(2, 9, 12), nn.Linear(12, 20).bfloat16()
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    with mode(), products.float32_products(CPU):
        _is_rounded(linear(x), exact)
        _is_rounded(torch.einsum("bti,oi->bto", x, linear.weight), x.double() @ linear.weight.double().t())


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)])
def test_nothing_to_multiply(shape):
    rows, inner, columns = shape
    with products.float32_products(CPU):
        found = _random(rows, inner) @ _random(inner, columns)
    assert torch.equal(found, torch.zeros(rows, columns).bfloat16())


def _gradients(tensors, output, dtype):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    made = output(*tensors)
    made.backward(torch.linspace(-1, 1, made.numel(), dtype=dtype).view(made.shape))
    return [made.detach(), *(tensor.grad for tensor in tensors)]


def test_the_way_back_is_made_in_float32_too():
    x, weight = _random(7, 30), _random(21, 30, seed=1)
    exact = _gradients([x, weight], nn.functional.linear, torch.float64)
    with products.float32_products(CPU):
        found = _gradients([x, weight], nn.functional.linear, torch.bfloat16)
    for gradient, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=2**-7, atol=2e-2)


@pytest.mark.parametrize("heads", [(6, 6), (6, 2)])
@pytest.mark.parametrize("mask", ["causal", "for all", "for each row", "for each head", "true or false"])
def test_attention(heads, mask):
    rows, tokens, width = 3, 10, 8
    query = _random(rows, tokens, heads[0], width).transpose(1, 2)
    key, value = (_random(rows, tokens, heads[1], width, seed=s).transpose(1, 2) for s in (1, 2))
    shape = {"for all": (1, 1), "for each row": (rows, 1), "for each head": (rows, 6), "true or false": (rows, 1)}.get(
        mask
    )
    chosen = None if shape is None else _random(*shape, tokens, tokens, seed=4)
    if mask == "true or false":
        chosen = (chosen > 0) | torch.eye(tokens, dtype=torch.bool)

    def attend(q, k, v):
        return nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=chosen.to(q.dtype) if chosen is not None and chosen.is_floating_point() else chosen,
            is_causal=mask == "causal",
            scale=0.4,
            enable_gqa=heads[0] != heads[1],
        )

    exact = _gradients([query, key, value], attend, torch.float64)
    with products.float32_products(CPU):
        found = _gradients([query, key, value], attend, torch.bfloat16)
    for tensor, expected in zip(found, exact, strict=True):
        error = float((tensor.double() - expected).norm() / expected.norm())
        assert error < 6e-3


def test_nothing_else_changes():
    a, b = torch.randn(9, 9), _random(9, 9)
    expected = [a @ a, a.double() @ a.double(), b + b, torch.softmax(b, -1)]
    with products.float32_products(CPU):
        found = [a @ a, a.double() @ a.double(), b + b, torch.softmax(b, -1)]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_where_the_device_multiplies_bfloat16_nothing_is_done(monkeypatch):
    monkeypatch.setattr(products, "_cpu_multiplies_bfloat16", lambda: True)
    assert not products.needed(CPU)
    assert not products.needed(torch.device("cuda"))
    monkeypatch.setattr(products._Float32Products, "__init__", None)
    with products.float32_products(CPU), products.float32_products(torch.device("cuda")):
        pass


class _NewStorages(TorchDispatchMode):
    """Bytes of all storages that operations have made."""

    def __init__(self):
        super().__init__()
        self.nbytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.nbytes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


def test_nothing_is_allocated_but_the_result_and_the_buffer(monkeypatch):
    monkeypatch.undo()
    a, b = _random(2000, 1500), _random(1500, 4000)
    with _NewStorages() as seen, products._Float32Products():
        a @ b
    operands = {a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()}
    made = sorted(nbytes for at, nbytes in seen.nbytes.items() if at not in operands)
    assert made == [2 * 2000 * 4000, products.SCRATCH_BYTES]


def test_the_buffer_is_planned_for(monkeypatch):
    """The prediction of a run's memory counts it where it is needed, and only there."""
    layout = memory_model.Layout(1, False, True, 64, 1024, None, False)

    def overhead(itemsize):
        shapes = SimpleNamespace(full=False, itemsize=itemsize)
        return memory_model._overhead(shapes, layout, 1, on_cpu=True)

    assert overhead(2) - overhead(4) == products.SCRATCH_BYTES
    monkeypatch.setattr(products, "_cpu_multiplies_bfloat16", lambda: True)
    assert overhead(2) == overhead(4)
