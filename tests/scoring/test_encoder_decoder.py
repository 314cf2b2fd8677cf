"""Encoder-decoder models: equal to Captum's own methods, called one target token at a time."""

from __future__ import annotations

from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from captum_llm_ext import (
    FeatureAblation,
    LayerIntegratedGradients,
    LayerSaliency,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
    segment_input,
)
from captum_llm_ext.model import encoder_decoder
from tests.models.encoder_decoder import (
    CONFIGS,
    FAMILIES,
    LAYERS,
    beginning,
    decoder_ids,
    fresh_seq2seq,
    log_p,
    loop,
    loop_with_generated,
    prompt,
    target_of,
    tiny_seq2seq,
)
from tests.models.families import PROMPT, VOCAB_SIZE, _randomise, tiny_tokenizer
from tests.oracles.cases import BASELINE, METHODS, STEPS, assert_close, our_attribution

# Few steps are enough to compare; that they do not converge is another test's matter.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENCODER = ("embedding", "encoder_block", "encoder_projection", "encoder_mlp", "cross_key")
N_PROMPT = 8


def captums(method: str, family: str, kind: str, target: Tensor) -> Tensor:
    model, ids = tiny_seq2seq(family), prompt().inp_tensor
    how: dict[str, Any] = {}
    if method == "integrated_gradients":
        how = {"baselines": torch.full_like(ids, BASELINE), "n_steps": STEPS}
    layer = model.get_submodule(LAYERS[family][kind])
    return loop(METHODS[method].__name__, model, layer, ids, target, **how)


@pytest.mark.parametrize("count", [1, 3, N_PROMPT - 1, N_PROMPT])
@pytest.mark.parametrize("kind", ENCODER)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_captum(family: str, method: str, kind: str, count: int) -> None:
    target = target_of(count)
    expected = captums(method, family, kind, target)
    model = tiny_seq2seq(family)
    layer = model.get_submodule(LAYERS[family][kind])
    result = our_attribution(METHODS[method], model, layer, prompt(), target=target)
    assert result.input_tokens == prompt().values
    assert len(prompt().values) == N_PROMPT  # so that one case has as many decoder positions
    if kind == "cross_key" and method == "gradient_x_activation" and expected.abs().max() < 1e-4:
        assert result.token_attr.abs().max() < 1e-4
        return
    assert_close(result.token_attr, expected)
    assert_close(result.seq_attr, expected.sum(0), 1e-3)


@pytest.mark.parametrize("name", ["get_input_embeddings", "shared", "one_module"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_token_embedding(family: str, name: str) -> None:
    """The module that the model names as its embedding may never run, or run in both halves."""
    model: Any = fresh_seq2seq(family)
    if name == "one_module":
        model.set_input_embeddings(model.get_input_embeddings())
        halves = model.get_encoder(), model.get_decoder()
        assert halves[0].get_input_embeddings() is halves[1].get_input_embeddings()
    target = target_of(3)
    expected = captums("integrated_gradients", family, "embedding", target)
    layer = "*shared" if name == "shared" and family != "marian" else model.get_input_embeddings()
    result = our_attribution(LayerIntegratedGradients, model, layer, prompt(), target=target)
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_generated_tokens_at_the_embeddings(family: str, method: str) -> None:
    model, target, inp = tiny_seq2seq(family), target_of(4), prompt()
    layers = [model.get_submodule(LAYERS[family][k]) for k in ("embedding", "decoder_embedding")]
    name = METHODS[method].__name__
    how = {"n_steps": STEPS} if method == "integrated_gradients" else {}
    expected = loop_with_generated(name, model, layers, inp.inp_tensor, target, BASELINE, **how)
    result = our_attribution(
        METHODS[method],
        model,
        model.get_input_embeddings(),
        inp,
        target=target,
        include_generated=True,
    )
    assert result.input_tokens[-4:] == tiny_tokenizer().convert_ids_to_tokens(target)
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("kind", ["decoder_embedding", "decoder_mlp", "encoder_mlp", "cross_key"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [4, N_PROMPT])
def test_generated_tokens_at_a_layer_of_either_half(family: str, kind: str, count: int) -> None:
    model, target, inp = tiny_seq2seq(family), target_of(count), prompt()
    layer = model.get_submodule(LAYERS[family][kind])
    pair = [None, layer] if kind.startswith("decoder") else [layer, None]
    how = {"n_steps": STEPS}
    expected = loop_with_generated(
        "LayerIntegratedGradients", model, pair, inp.inp_tensor, target, BASELINE, **how
    )
    result = our_attribution(
        LayerIntegratedGradients, model, layer, inp, target=target, include_generated=True
    )
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_both_halves_in_one_call(family: str) -> None:
    model, inp, target = tiny_seq2seq(family), prompt(), target_of(3)
    names = [LAYERS[family][kind] for kind in ("embedding", "encoder_mlp", "decoder_mlp")]
    how = {"target": target, "include_generated": True}
    result = our_attribution(LayerIntegratedGradients, model, names, inp, **how)
    assert result.layer_names == names
    for name in names:
        alone = our_attribution(LayerIntegratedGradients, model, name, inp, **how)
        assert_close(result[name].token_attr, alone.token_attr)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_norms(family: str) -> None:
    model, inp, target = tiny_seq2seq(family), prompt(), target_of(3)
    result = our_attribution(
        lambda m, layer: LayerSaliency(m, layer, norm="l2"),
        model,
        model.get_input_embeddings(),
        inp,
        target=target,
    )
    layer: Any = model.get_submodule(LAYERS[family]["embedding"])
    for t, token in enumerate(target.tolist()):
        leaf: list[Tensor] = []

        def keep(module: Any, args: Any, output: Tensor, leaf: list[Tensor] = leaf) -> Tensor:
            leaf.append(output.detach().requires_grad_())
            return leaf[0]

        hook = layer.register_forward_hook(keep)
        score = log_p(model, inp.inp_tensor, decoder_ids(model, target, t), token)
        hook.remove()
        gradient = torch.autograd.grad(score.sum(), leaf[0])[0]
        assert_close(result.token_attr[t], gradient[0].norm(dim=-1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("generated", [False, True])
def test_sums_match_the_score_difference(family: str, generated: bool) -> None:
    model, inp, target = tiny_seq2seq(family), prompt(), target_of(3)
    wrapper = LLMGradientAttribution(
        LayerIntegratedGradients(model, model.get_input_embeddings()), tiny_tokenizer()
    )
    how: dict[str, Any] = {"method": "adaptive", "tol": 0.02, "max_rows": 4000}
    result = wrapper.attribute(inp, target=target, include_generated=generated, **how)
    ids = inp.inp_tensor
    for t, token in enumerate(target.tolist()):
        fed = decoder_ids(model, target, t)
        start = fed.clone()
        if generated:
            start[0, len(beginning(model)) :] = BASELINE
        with torch.no_grad():
            difference = log_p(model, ids, fed, token) - log_p(
                model, torch.full_like(ids, BASELINE), start, token
            )
        delta = result.token_attr[t].sum() - difference[0]
        assert delta.abs() < 0.1
        assert (delta - result.convergence_delta[t]).abs() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_gives_every_target_token(family: str) -> None:
    model, passes = tiny_seq2seq(family), []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    our_attribution(
        METHODS["gradient_x_activation"],
        model,
        model.get_input_embeddings(),
        prompt(),
        target=target_of(7),
    )
    hook.remove()
    assert len(passes) <= 4  # the probe's two, the trace and the pass


@pytest.mark.parametrize("attr_target", ["prob", "logit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_scores(family: str, attr_target: str) -> None:
    model, inp = tiny_seq2seq(family), prompt()
    with torch.no_grad():
        fed = decoder_ids(model, torch.tensor([]), 0)
        target = model(input_ids=inp.inp_tensor, decoder_input_ids=fed).logits[0, -1:].argmax(-1)
    result = our_attribution(
        METHODS["gradient_x_activation"],
        model,
        model.get_input_embeddings(),
        inp,
        target=target,
        attr_target=attr_target,
    )

    def forward(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, decoder_input_ids=fed).logits[:, -1]
        scores = logits.softmax(-1) if attr_target == "prob" else logits
        return scores[:, int(target[0])]

    layer = model.get_submodule(LAYERS[family]["embedding"])
    expected = captum.attr.LayerGradientXActivation(forward, layer).attribute(inp.inp_tensor)
    assert_close(result.token_attr, expected.sum(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_equals_captum(family: str) -> None:
    model, inp, target = tiny_seq2seq(family), prompt(), target_of(4)
    result = LLMAttribution(captum.attr.FeatureAblation(model), tiny_tokenizer()).attribute(
        inp, target=target
    )
    rows = []
    for t, token in enumerate(target.tolist()):

        def forward(ids: Tensor, fed: Tensor, token: int = token) -> Tensor:
            with torch.no_grad():
                return log_p(model, ids, fed, token)

        method = captum.attr.FeatureAblation(forward)
        fed = (decoder_ids(model, target, t),)
        rows.append(
            method.attribute(inp.inp_tensor, baselines=BASELINE, additional_forward_args=fed)[0]
        )
    assert_close(result.token_attr, torch.stack(rows))


SENTENCES = "Dave plays golf. The capital of France is Paris. He lives in Palm Coast"


@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_of_parts_of_other_lengths(family: str) -> None:
    """The batch pads the encoder's ids, which all its positions would see without a mask."""
    model, target, tokenizer = tiny_seq2seq(family), target_of(3), tiny_tokenizer()
    inp: Any = segment_input(SENTENCES)
    result = LLMAttribution(captum.attr.FeatureAblation(model), tokenizer).attribute(inp, target)

    def scores(present: Tensor) -> Tensor:
        ids = tokenizer.encode(inp.to_model_input(present[None]), return_tensors="pt")
        with torch.no_grad():
            found = [
                log_p(model, ids, decoder_ids(model, target, t), token)
                for t, token in enumerate(target.tolist())
            ]
        return torch.cat(found)

    whole = torch.ones(3)
    rows = [scores(whole) - scores(whole - torch.eye(3)[i]) for i in range(3)]
    assert_close(result.token_attr, torch.stack(rows, dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_of_parts(family: str) -> None:
    """A part's column is the sum over its tokens; the path starts at the mean embedding."""
    model, target, tokenizer = tiny_seq2seq(family), target_of(2), tiny_tokenizer()
    inp: Any = segment_input(SENTENCES)
    layer: Any = model.get_submodule(LAYERS[family]["embedding"])
    result = our_attribution(LayerIntegratedGradients, model, layer, inp, target=target)
    encoded = tokenizer(SENTENCES, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]])
    edges = [SENTENCES.index(value) for value in inp.values]
    owner = torch.tensor(
        [
            max(i for i, edge in enumerate(edges) if b > edge) if SENTENCES[a:b].strip() else -1
            for a, b in encoded["offset_mapping"]
        ]
    )
    with torch.no_grad():
        end = layer(ids)
        mean = layer(torch.arange(layer.num_embeddings)).mean(0)
        start = torch.where((owner >= 0)[None, :, None], mean, end)
    expected = torch.zeros(2, 3)
    points, weights = np.polynomial.legendre.leggauss(STEPS)
    for t, token in enumerate(target.tolist()):
        for point, weight in zip((1 + points) / 2, weights / 2, strict=True):
            value = (start + float(point) * (end - start)).requires_grad_()
            hook = layer.register_forward_hook(lambda *_, value=value: value)
            score = log_p(model, ids, decoder_ids(model, target, t), token)
            hook.remove()
            gradient = torch.autograd.grad(score.sum(), value)[0]
            per_token = float(weight) * (gradient * (end - start)).sum(-1)[0]
            for i in range(3):
                expected[t, i] += per_token[owner == i].sum()
    assert_close(result.token_attr, expected.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_target_that_the_model_generates(family: str) -> None:
    model: Any = tiny_seq2seq(family)
    inp, how = prompt(), {"max_new_tokens": 5, "do_sample": False}
    mask = torch.ones_like(inp.inp_tensor)
    sequence = model.generate(inp.inp_tensor, attention_mask=mask, **how)[0]
    assert int(sequence[0]) == model.config.decoder_start_token_id
    wrappers: list[Any] = [
        LLMAttribution(captum.attr.FeatureAblation(model), tiny_tokenizer()),
        LLMGradientAttribution(
            LayerSaliency(model, model.get_input_embeddings()), tiny_tokenizer()
        ),
    ]
    for wrapper in wrappers:
        found = wrapper.attribute(inp, gen_args=how)
        given = wrapper.attribute(inp, target=sequence[1:])
        assert found.output_tokens == given.output_tokens
        assert_close(found.token_attr, given.token_attr)


def test_hooks_are_gone_and_the_model_is_as_it_was() -> None:
    model: Any = fresh_seq2seq("t5")
    before = {name for name, _ in model.named_modules()}
    our_attribution(
        LayerIntegratedGradients, model, model.get_input_embeddings(), prompt(), target="golf"
    )
    assert {name for name, _ in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


# --- with other parts of the package --------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_conductance_at_the_embeddings_is_integrated_gradients(family: str) -> None:
    """Along its own path a layer's conductance is its integrated gradients."""
    model, inp, target = tiny_seq2seq(family), prompt(), target_of(2)
    how: dict[str, Any] = {"target": target, "method": "adaptive", "tol": 0.01, "max_rows": 8000}
    found, expected = (
        LLMGradientAttribution(kind(model, model.get_input_embeddings()), tiny_tokenizer())
        .attribute(inp, **how)
        .token_attr
        for kind in (captum.attr.LayerConductance, LayerIntegratedGradients)
    )
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_encoder_and_a_decoder_with_embeddings_of_their_own() -> None:
    kind, settings = CONFIGS["marian"]
    settings = {**settings, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    config = getattr(transformers, kind)(**settings, decoder_vocab_size=VOCAB_SIZE)
    model: Any = _randomise(transformers.MarianMTModel(config))
    layer, target, inp = model.get_input_embeddings(), target_of(3), prompt()
    halves = model.get_encoder().embed_tokens, model.get_decoder().embed_tokens
    assert not torch.equal(halves[0].weight, halves[1].weight)
    expected = loop_with_generated(
        "LayerIntegratedGradients", model, halves, inp.inp_tensor, target, BASELINE, n_steps=STEPS
    )
    how: dict[str, Any] = {"target": target, "include_generated": True}
    result = our_attribution(LayerIntegratedGradients, model, layer, inp, **how)
    assert_close(result.token_attr, expected)
    with pytest.raises(ValueError, match="give a token id as the baseline"):
        our_attribution(LayerIntegratedGradients, model, layer, inp, baselines="mean", **how)
    our_attribution(LayerIntegratedGradients, model, layer, inp, baselines="mean", target=target)


# --- halves that do not name their embedding ------------------------------------------------------


def fsmt() -> Any:
    """A translator of WMT19, whose encoder is a plain module."""
    config = transformers.FSMTConfig(
        langs=["en", "de"],
        src_vocab_size=VOCAB_SIZE,
        tgt_vocab_size=VOCAB_SIZE,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return _randomise(transformers.FSMTForConditionalGeneration(config))


def fsmt_score(model: Any, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    start = torch.cat([torch.tensor([2]), target[:-1]])[None]
    output = model(input_ids=ids, decoder_input_ids=start, use_cache=False)
    return output.logits[0].log_softmax(-1)[range(len(target)), target].sum()


def test_ablation_of_a_model_whose_encoder_is_a_plain_module(monkeypatch: Any) -> None:
    model, tokenizer, target = fsmt(), tiny_tokenizer(), torch.tensor([40, 50, 60])
    inp = TextTokenInput(PROMPT, tokenizer)
    ids, expected = inp.inp_tensor, []
    with torch.no_grad():
        for i in range(ids.size(1)):
            ablated = ids.clone()
            ablated[0, i] = 0
            expected.append(fsmt_score(model, ids, target) - fsmt_score(model, ablated, target))
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, target)
    assert_close(result.seq_attr, torch.stack(expected))
    # Ablation needs no embedding, where a half has it under a name that nobody knows.
    monkeypatch.setattr(encoder_decoder, "find_token_embedding", lambda half: None)
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp, target)
    assert_close(result.seq_attr, torch.stack(expected))
    method = LayerSaliency(model, model.get_input_embeddings())
    with pytest.raises(ValueError, match="cannot tell which embedding"):
        LLMGradientAttribution(method, tokenizer).attribute(inp, target)


def test_saliency_of_a_model_whose_encoder_is_a_plain_module() -> None:
    model, tokenizer, target = fsmt(), tiny_tokenizer(), torch.tensor([40, 50, 60])
    inp, held = TextTokenInput(PROMPT, tokenizer), []
    embedding = model.get_encoder().embed_tokens
    hook = embedding.register_forward_hook(lambda module, args, output: held.append(output))
    score = fsmt_score(model, inp.inp_tensor, target)
    hook.remove()
    (gradient,) = torch.autograd.grad(score, held[0])
    method = LayerSaliency(model, model.get_input_embeddings())
    result = LLMGradientAttribution(method, tokenizer).attribute(inp, target)
    assert_close(result.seq_attr, gradient[0].abs().sum(-1))
