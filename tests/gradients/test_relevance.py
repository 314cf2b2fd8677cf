"""Relevance against formulas that are written here with constants, one for each operation.

A constant is a detached tensor: x · c is differentiated as c, whatever c was computed from. The
formulas give the values of the operations, and by plain autograd the gradients of the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bloom.modeling_bloom import BloomGelu

from captum_llm_ext import LayerRelevance
from captum_llm_ext.model.hooks import differentiable
from captum_llm_ext.model.relevance_rules import relevance_rules
from tests.models.families import VOCAB_SIZE, _randomise
from tests.oracles.cases import (
    assert_close,
    in_pairs,
    our_attribution,
    prompt_input,
    target_ids,
)

RULES = ("cp", "attnlrp")
EPS = 1e-6


def const(x: Tensor) -> Tensor:
    return x.detach()


def halves(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """A product whose factors get half of its gradient each."""
    return (multiply(a, const(b)) + multiply(const(a), b)) / 2


def relevance(rules: str) -> Any:
    return lambda model, layer: LayerRelevance(model, layer, rules)


# --- a model of two layers, in many spellings ----------------------------------------------------


def mean_square(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def over(x: Tensor, denominator: Tensor) -> Tensor:
    return x * (1 / const(denominator))


def by_root(x: Tensor) -> Tensor:
    return over(x, (mean_square(x) + EPS).sqrt())


def by_deviation(x: Tensor) -> Tensor:
    return over(centred(x), (mean_square(centred(x)) + EPS).sqrt())


# Spelling → (how the model writes it, its formula).
NORMS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "layer_norm": (lambda x: F.layer_norm(x, x.shape[-1:], eps=EPS), by_deviation),
    "rms_norm": (lambda x: F.rms_norm(x, x.shape[-1:], eps=EPS), by_root),
    "group_norm": (
        lambda x: F.group_norm(x.transpose(1, 2)[0].T, 1, eps=EPS)[None],
        by_deviation,
    ),
    "rsqrt": (lambda x: x * torch.rsqrt(mean_square(x) + EPS), by_root),
    "pow": (lambda x: x * torch.pow(mean_square(x) + EPS, -0.5), by_root),
    "root": (lambda x: x / torch.sqrt(mean_square(x) + EPS), by_root),
    "one over root": (lambda x: x * (1 / (mean_square(x) + EPS).sqrt()), by_root),
    "half power": (lambda x: x.div((mean_square(x) + EPS) ** 0.5), by_root),
    "centred root": (
        lambda x: centred(x) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS),
        by_deviation,
    ),
    "norm": (
        lambda x: x / (x.norm(dim=-1, keepdim=True) * x.size(-1) ** -0.5 + EPS),
        lambda x: over(x, mean_square(x).sqrt() + EPS),
    ),
    "normalize": (
        lambda x: 4 * F.normalize(x, dim=-1),
        lambda x: over(4 * x, x.square().sum(-1, keepdim=True).sqrt()),
    ),
}
SCALE = 0.5


def causal(scores: Tensor) -> Tensor:
    length = scores.size(-1)
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)


def repeated(x: Tensor) -> Tensor:
    """Heads that share keys and values, (1, 2, length, width) → (1, 4, length, width)."""
    return x.repeat_interleave(2, dim=1)


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, repeated(k).transpose(2, 3)) * SCALE
    weights = F.softmax(causal(scores), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, training=False), repeated(v))


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q[0], repeated(k)[0].transpose(1, 2)).mul_(SCALE)
    return torch.bmm(causal(scores).softmax(-1), repeated(v)[0])[None]


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(1, 1, 1)
    scores = torch.baddbmm(bias, q[0], repeated(k)[0].transpose(1, 2), alpha=SCALE)
    return (causal(scores).softmax(-1) @ repeated(v)[0])[None]


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, repeated(k)) * SCALE
    return torch.einsum("bhqk,bhkd->bhqd", [causal(scores).softmax(-1), repeated(v)])


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sdpa": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=SCALE, enable_gqa=True
    ),
    "sdpa by name": lambda q, k, v: F.scaled_dot_product_attention(
        query=q, key=repeated(k), value=repeated(v), is_causal=True, scale=SCALE
    ),
    "matmul": by_matmul,
    "bmm": by_bmm,
    "baddbmm": by_baddbmm,
    "einsum": by_einsum,
}


def attention_formula(rules: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k), repeated(v)
    if rules == "cp":
        return const(causal(q @ k.transpose(2, 3) * SCALE).softmax(-1)) @ v
    scores = halves(torch.matmul, q, k.transpose(2, 3)) * SCALE
    return halves(torch.matmul, causal(scores).softmax(-1), v)


def slope(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: x * const(function(x) / x)


Mlp = Callable[[Any, Tensor], Tensor]
MLPS: dict[str, tuple[Mlp, Mlp]] = {
    "gated": (
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        lambda m, x: m.down(halves(torch.mul, slope(F.silu)(m.gate(x)), m.up(x))),
    ),
    "plain": (
        lambda m, x: m.down(m.activation(m.up(x))),
        lambda m, x: m.down(slope(lambda u: F.gelu(u, approximate="tanh"))(m.up(x))),
    ),
    "by a sigmoid": (
        lambda m, x: m.down(torch.sigmoid(m.gate(x)).to(x.dtype).mul(m.up(x))),
        lambda m, x: m.down(const(m.gate(x).sigmoid()) * m.up(x)),
    ),
}


class Projections(nn.Module):
    """4 heads of width 4, of which 2 share keys and values, and an mlp of width 24."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(16, 16, bias), nn.Linear(16, 16, bias)
        self.key, self.value = nn.Linear(16, 8, bias), nn.Linear(16, 8, bias)
        self.gate, self.up = nn.Linear(16, 24, bias), nn.Linear(16, 24, bias)
        self.down = nn.Linear(24, 16, bias)
        self.activation = ACT2FN["gelu_new"]

    def heads(self, x: Tensor) -> list[Tensor]:
        projected = [self.query(x), self.key(x), self.value(x)]
        return [y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in projected]


class TwoLayers(nn.Module):
    """A model in one spelling; attention may be None."""

    def __init__(self, norm: str, mlp: str, attention: str | None, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 16)
        self.blocks = nn.ModuleList(Block(norm, mlp, attention, bias) for _ in range(2))
        self.norm, self.cap = NORMS[norm][0], 5.0
        self.head = nn.Linear(16, VOCAB_SIZE, bias=False)
        _randomise(self)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=torch.tanh(self.head(self.norm(x)) / self.cap) * self.cap)

    def by_hand(self, ids: Tensor, rules: str) -> tuple[list[Tensor], Tensor]:
        """The embeddings and the states after each block, and the logits."""
        states = [self.embedding(ids).detach().requires_grad_()]
        for block in self.blocks:
            states.append(block.by_hand(states[-1], rules))
        final = self.blocks[0].norms[1](states[-1])
        return states, slope(torch.tanh)(self.head(final) / self.cap) * self.cap


class Block(nn.Module):
    def __init__(self, norm: str, mlp: str, attention: str | None, bias: bool) -> None:
        super().__init__()
        self.norms, self.mlps, self.attention = NORMS[norm], MLPS[mlp], attention
        self.parts = Projections(bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention:
            mixed = ATTENTIONS[self.attention](*self.parts.heads(self.norms[0](x)))
            x = x + self.parts.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlps[0](self.parts, self.norms[0](x))

    def by_hand(self, x: Tensor, rules: str) -> Tensor:
        if self.attention:
            mixed = attention_formula(rules, *self.parts.heads(self.norms[1](x)))
            x = x + self.parts.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlps[1](self.parts, self.norms[1](x))


@in_pairs(norm=list(NORMS), mlp=list(MLPS), attention=list(ATTENTIONS), rules=list(RULES))
def test_two_layers_by_hand(norm: str, mlp: str, attention: str, rules: str) -> None:
    model, inp, target = TwoLayers(norm, mlp, attention), prompt_input(), target_ids(2)
    prompt = inp.inp_tensor
    layers = [model.embedding, model.blocks[0]]
    result = our_attribution(relevance(rules), model, layers, inp, target=target)

    ids = torch.cat([prompt, target[None, :1]], dim=1)
    with differentiable(model):
        states, logits = model.by_hand(ids, rules)
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        scores = logits[0, -2:].log_softmax(-1)[range(2), target]
        for t, score in enumerate(scores):
            gradients = torch.autograd.grad(score, states[:2], retain_graph=True)
            for i, (state, gradient) in enumerate(zip(states, gradients, strict=False)):
                expected = (state * gradient).sum(-1)[0, : prompt.size(1)]
                assert_close(result.layer_token_attr[i, t], expected.detach())


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "pow"])
def test_relevances_sum_to_the_logit(norm: str, mlp: str, rules: str) -> None:
    """Of all positions: one target token, so that all positions are the prompt's."""
    attentions = [None, "sdpa", "matmul"] if rules == "cp" else [None]
    for attention in attentions:
        model, inp = TwoLayers(norm, mlp, attention, bias=False), prompt_input()
        result = our_attribution(
            relevance(rules), model, model.embedding, inp, "logit", target=target_ids(1)
        )
        with torch.no_grad():
            logit = model(inp.inp_tensor).logits[0, -1, target_ids(1)[0]]
        torch.testing.assert_close(result.seq_attr.sum(), logit, rtol=1e-4, atol=1e-4)


# --- one operation at a time ---------------------------------------------------------------------


Formula = Callable[[Tensor, Tensor], Tensor]
# Operation of x and y, both (3, 3) → its formula.
OPERATIONS: dict[str, tuple[Formula, Formula]] = {
    "mul_": (lambda x, y: x.clone().mul_(y), lambda x, y: halves(torch.mul, x, y)),
    "mul by name": (lambda x, y: torch.mul(other=x, input=y), lambda x, y: halves(torch.mul, x, y)),
    "square": (lambda x, y: x.square() + x * x + x**2, lambda x, y: 3 * x * const(x)),
    "third power": (lambda x, y: torch.pow(x, 3), lambda x, y: x * const(x * x)),
    "addcmul": (
        lambda x, y: torch.addcmul(x, x, y, value=2),
        lambda x, y: x + 2 * halves(torch.mul, x, y),
    ),
    "addmm": (lambda x, y: torch.addmm(x, x, y), lambda x, y: x + halves(torch.matmul, x, y)),
    "linear": (lambda x, y: F.linear(x, y, x[0]), lambda x, y: halves(F.linear, x, y) + x[0]),
    "three factors": (
        lambda x, y: torch.einsum("ij,jk,kl->il", x, y, x),
        lambda x, y: (x @ const(y @ x) + const(x) @ y @ const(x) + const(x @ y) @ x) / 3,
    ),
    "sigmoid of itself": (
        lambda x, y: x * torch.sigmoid(1.702 * x).to(torch.float64),
        lambda x, y: x * const(torch.sigmoid(1.702 * x)).double(),
    ),
    "gate through shapes": (
        lambda x, y: x * (y.sigmoid().view(9, 1) * 2).reshape(3, 3).contiguous(),
        lambda x, y: x * const(y.sigmoid() * 2),
    ),
    "gate that adds": (lambda x, y: x + y.sigmoid(), lambda x, y: x + y.sigmoid()),
    "glu": (
        lambda x, y: F.glu(torch.cat([x, y], dim=-1)),
        lambda x, y: x * const(y.sigmoid()),
    ),
    "lone tanh": (
        lambda x, y: 5 * torch.tanh(x / 5),
        lambda x, y: x * const(5 * torch.tanh(x / 5) / x),
    ),
    "in place": (
        lambda x, y: F.silu(x.clone(), inplace=True) + F.elu(x.clone(), 1.0, True),
        lambda x, y: slope(F.silu)(x) + slope(F.elu)(x),
    ),
    "saturated": (lambda x, y: F.relu6(20 * x), lambda x, y: slope(F.relu6)(20 * x)),
    "written into": (lambda x, y: F.silu(x).mul_(2).add_(y), lambda x, y: 2 * slope(F.silu)(x) + y),
    "std": (
        lambda x, y: centred(x) / (x.std(-1, keepdim=True) + EPS),
        lambda x, y: over(centred(x), x.std(-1, keepdim=True) + EPS),
    ),
    "reciprocal": (
        lambda x, y: y * torch.linalg.vector_norm(x, dim=-1, keepdim=True).reciprocal(),
        lambda x, y: over(y, x.norm(dim=-1, keepdim=True)),
    ),
    "divided in place": (
        lambda x, y: x.clone().div_(y.norm(dim=-1, keepdim=True).clamp(min=EPS)),
        lambda x, y: over(x, y.norm(dim=-1, keepdim=True)),
    ),
    # What no rule covers.
    "quotient": (lambda x, y: x / (1 + y.abs()), lambda x, y: x / (1 + y.abs())),
    "softplus": (lambda x, y: F.softplus(x).exp(), lambda x, y: F.softplus(x).exp()),
    "not 0 at 0": (lambda x, y: ACT2FN["laplace"](x), lambda x, y: ACT2FN["laplace"](x)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_by_hand(name: str) -> None:
    operation, formula = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 3, generator=generator).requires_grad_() for _ in range(2))
    seed = torch.randn(3, 3, generator=generator)
    plain, expected = operation(x, y), formula(x, y)
    for rules in RULES:
        with relevance_rules(nn.Module(), rules):
            output = operation(x, y)
        assert torch.equal(output, plain)
        torch.testing.assert_close(output, expected)
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        ours, theirs = (
            torch.autograd.grad(z, [x, y], seed.to(z), materialize_grads=True, **options)
            for z in (output, expected)
        )
        torch.testing.assert_close(ours, theirs)


MODULES = [
    *(ACT2FN[name] for name in ACT2FN if name not in ("laplace", "sqrtsoftplus")),
    BloomGelu(),
]
UNLIKE = (nn.Sigmoid,)  # not 0 at 0


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_an_activation_module_is_one_operation(module: nn.Module) -> None:
    """However it is spelled: slope value/input, and its derivative at 0."""
    module = module.float().eval().requires_grad_(False)
    x = torch.tensor([-3.0, -0.4, 0.0, 0.7, 2.5, 9.0], requires_grad=True)
    plain = module(x)
    (derivative,) = torch.autograd.grad(plain.sum(), x)
    with relevance_rules(nn.Sequential(module), "cp"):
        output = module(x)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(output, plain)
    slopes = torch.where(x == 0, derivative, plain / x)
    torch.testing.assert_close(gradient, derivative if isinstance(module, UNLIKE) else slopes)


@pytest.mark.parametrize("rules", RULES)
def test_attention_of_torch_is_opened(rules: str) -> None:
    """`nn.MultiheadAttention` is one function of torch; the rules hold for its parts."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(1, 5, 8, requires_grad=True)
    gradients = []
    for need_weights in (True, False):
        with relevance_rules(module, rules):
            output = module(x, x, x, need_weights=need_weights)[0]
        assert torch.equal(output, module(x, x, x, need_weights=need_weights)[0])
        gradients.append(torch.autograd.grad(output[0, -1].sum(), x)[0])
    q, k, v = (
        y.unflatten(-1, (2, 4)).transpose(1, 2)
        for y in F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    )
    if rules == "cp":
        mixed = const((q @ k.transpose(2, 3) / 2).softmax(-1)) @ v
    else:
        mixed = halves(
            torch.matmul, (halves(torch.matmul, q, k.transpose(2, 3)) / 2).softmax(-1), v
        )
    by_hand = module.out_proj(mixed.transpose(1, 2).flatten(2))
    (expected,) = torch.autograd.grad(by_hand[0, -1].sum(), x)
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected)
