"""Encoder-decoder models, for translation and summarisation: one row of ids feeds both halves.

A row holds the encoder's ids, then the decoder's: those it begins with and the target without its
last token. Prompt (with the decoder's beginning) and target then form a row as they do for a causal
model. The decoder is causal, so one pass scores all target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from captum_llm_ext.model.adapter import Adapter, Part
from captum_llm_ext.model.hooks import is_ids
from captum_llm_ext.model.layers import Site, find_token_embedding, owner_of, token_embedding


class EncoderDecoder(Adapter):
    """An encoder-decoder model on rows whose first `n_encoder` ids are the encoder's.

    beginning: the ids that the decoder begins with, which are not scored.
    """

    def __init__(self, model: Any, n_encoder: int, beginning: Sequence[int]) -> None:
        super().__init__(model)
        self.n_encoder, self.beginning = n_encoder, list(beginning)
        self.embeddings = TokenEmbeddings.of(owner_of(model, "get_encoder"), n_encoder)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.embeddings

    def site(self, site: Site) -> Site:
        """The model's token embedding means both halves of the row."""
        is_embedding = site.module is super().get_input_embeddings()
        return replace(site, module=token_embedding(self)) if is_embedding else site

    def prompt(self, ids: Tensor) -> Tensor:
        return torch.cat([ids, ids.new_tensor(self.beginning)])

    def parts(self, length: int) -> list[Part]:
        return [(0, length), (0, self.n_encoder), (self.n_encoder, length)]

    def whole_blocks(self, model: nn.Module) -> list[nn.Module]:
        return []  # no block holds the states of both halves

    def context(self, n_prompt: int, n_target: int) -> int:
        n_beginning = len(self.beginning)
        return max(n_prompt - n_beginning, n_beginning + n_target)

    def check_embedding_baseline(self, replaced: Tensor) -> None:
        if self.embeddings is None:
            return
        encoder, decoder = self.embeddings.encoder.weight, self.embeddings.decoder.weight
        in_decoder = replaced[self.n_encoder :].any()
        if in_decoder and encoder.data_ptr() != decoder.data_ptr():  # type: ignore[operator]
            raise ValueError(
                "encoder and decoder embed tokens differently here, so no embedding is the "
                "baseline of both: with include_generated=True give a token id as the baseline"
            )

    def forward(self, ids: Tensor, output_attentions: bool = False) -> Any:
        encoder_ids, decoder_ids = ids[:, : self.n_encoder], ids[:, self.n_encoder :]
        # One module embeds both halves, so that hooks read and replace them as one layer.
        with nullcontext() if self.embeddings is None else _embedded_as(self.embeddings, ids):
            mask = torch.ones_like(encoder_ids)
            options = {"output_attentions": True} if output_attentions else {}
            return self._run(encoder_ids, mask, decoder_ids, **options)

    def logits_after(self, prompts: Sequence[Tensor], fed: Tensor) -> Tensor:
        """The encoder's ids are padded on the right, and masked since all positions see them."""
        encoder_ids = [prompt[: len(prompt) - len(self.beginning)] for prompt in prompts]
        ids = pad_sequence(encoder_ids, batch_first=True)
        lengths = torch.tensor([len(row) for row in encoder_ids], device=ids.device)
        mask = (torch.arange(ids.size(1), device=ids.device) < lengths[:, None]).long()
        decoder_ids = torch.cat([fed.new_tensor(self.beginning), fed]).repeat(len(prompts), 1)
        logits: Tensor = self._run(ids, mask, decoder_ids).logits
        return logits[:, len(self.beginning) - 1 :]

    def _run(self, encoder_ids: Tensor, mask: Tensor, decoder_ids: Tensor, **options: Any) -> Any:
        return self.model(
            input_ids=encoder_ids,
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            use_cache=False,
            **options,
        )


class TokenEmbeddings(nn.Module):
    """The embeddings (rows, length, hidden) of whole rows: the encoder's, then the decoder's.

    encoder, decoder: the token embeddings of each, which may be one module.
    """

    @classmethod
    def of(cls, model: Any, n_encoder: int) -> TokenEmbeddings | None:
        """Those of a model, one module or two; None where a half does not name its own.

        Perturbation can do without them.
        """
        encoder = find_token_embedding(model.get_encoder())
        decoder = find_token_embedding(model.get_decoder())
        if encoder is None or decoder is None:
            return None
        return cls(encoder, decoder, n_encoder)

    def __init__(self, encoder: nn.Module, decoder: nn.Module, n_encoder: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.n_encoder = encoder, decoder, n_encoder
        self.training = encoder.training

    @property
    def num_embeddings(self) -> int | None:
        sizes = [getattr(half, "num_embeddings", None) for half in (self.encoder, self.decoder)]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def weight(self) -> Any:
        return self.encoder.weight

    def split(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return values[:, : self.n_encoder], values[:, self.n_encoder :]

    def forward(self, ids: Tensor) -> Tensor:
        encoder_ids, decoder_ids = self.split(ids)
        # No call of the modules: hooks of layers must see the calls of the model alone.
        halves = self.encoder.forward(encoder_ids), self.decoder.forward(decoder_ids)
        return torch.cat(halves, dim=1)


@contextmanager
def _embedded_as(embeddings: TokenEmbeddings, ids: Tensor) -> Iterator[None]:
    """Let the model take the embeddings of `ids` from one call of `embeddings`.

    One module may embed for both halves. The encoder runs first, so the first call is then its.
    """
    halves = (embeddings.encoder, embeddings.decoder)
    parts = embeddings.split(embeddings(ids))
    expected = list(zip(halves, embeddings.split(ids), parts, strict=True))

    def replace_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for i, (half, half_ids, half_embedded) in enumerate(expected):
            if half is module and args and is_ids(args[0], half_ids):
                del expected[i]
                return half_embedded
        return output

    with ExitStack() as stack:
        for module in dict.fromkeys(halves):
            stack.callback(module.register_forward_hook(replace_output, prepend=True).remove)
        yield
    if expected:
        raise ValueError(
            f"{type(expected[0][0]).__name__} does not embed the ids that the model is given, so "
            "nothing can be attributed to its input embeddings"
        )


BEGINNING_ARGS = ("decoder_start_token_id", "forced_bos_token_id", "decoder_input_ids")


def decoder_beginning(model: nn.Module, gen_args: Mapping[str, Any]) -> list[int]:
    """The ids after which the model writes: the start token, then a forced first token.

    That token is <s> for BART and the language for mBART, M2M100 and NLLB. The arguments of
    ``generate`` named in `BEGINNING_ARGS` change the beginning, as they do there.

    Raises:
        ValueError: neither the arguments nor the configurations name a start token.
    """
    start = _generation_setting(model, gen_args, "decoder_start_token_id")
    if start is None:
        config = getattr(owner_of(model, "config"), "config", None)
        start = getattr(config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        raise ValueError(
            f"{type(model).__name__} does not say which token its decoder starts with: set "
            "model.generation_config.decoder_start_token_id, or pass "
            'gen_args={"decoder_start_token_id": id} (of T5 it is the pad token, of BART the eos '
            "token, of mBART the target's language)"
        )
    ids = torch.as_tensor(gen_args.get("decoder_input_ids", [[start]]))[0].tolist()
    ids = ids if ids[0] == start else [start, *ids]
    forced = _generation_setting(model, gen_args, "forced_bos_token_id")
    return [*ids, forced] if len(ids) == 1 and forced is not None else ids


def _generation_setting(model: nn.Module, gen_args: Mapping[str, Any], name: str) -> Any:
    """A setting as ``generate`` reads it: the argument, else its config, else the model's."""
    if name in gen_args:
        return gen_args[name]
    owner = owner_of(model, "generation_config")
    configs = (gen_args.get("generation_config"), getattr(owner, "generation_config", None))
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def reached_forced_end(
    model: nn.Module, gen_args: Mapping[str, Any], beginning: Sequence[int], generated: Tensor
) -> bool:
    """Whether generation stopped at its limit with a last token that is forced there."""
    forced = _generation_setting(model, gen_args, "forced_eos_token_id")
    ends = forced if isinstance(forced, list) else [forced]
    most = _generation_setting(model, gen_args, "max_new_tokens")
    length = _generation_setting(model, gen_args, "max_length")
    n_new = len(beginning) - 1 + len(generated)
    return int(generated[-1]) in ends and n_new == ((length or 21) - 1 if most is None else most)
