"""Whether the token that stands for an absent one hides everything before it.

A document separator does so: the model ignores what stands before it, and every token of the prompt
seems to matter as much as all tokens up to it. What a token does is measured: put into the middle
of the prompt, its score drops are compared with those of dropping the token there, and with those
of dropping everything up to there.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.warning import warn

FEWEST_FEATURES = 16  # in shorter prompts there is little to hide
PLACES = (1 / 3, 1 / 2, 2 / 3)  # of the prompt
LEAST_DROP = 1.0  # mean drop without everything up to a place, in nats: less would tell nothing


def warn_of_hiding_stand_in(masked: MaskedPrompts) -> None:
    """Warn where one id stands for every absent token and hides the tokens before it."""
    ids = getattr(masked.inp, "baseline_ids", None)
    forcing = masked.scorer.forcing
    if ids is None or not isinstance(forcing.model, PreTrainedModel) or not masked.is_causal:
        return
    if ids.numel() < FEWEST_FEATURES or len(ids.unique()) > 1:
        return
    stand_in, prompt = int(ids[0, 0]), tuple(masked.scorer.reference.tolist())
    prompts = [prompt]
    for place in PLACES:
        i = round(place * len(prompt))
        prompts += [
            (*prompt[:i], stand_in, *prompt[i + 1 :]),
            (*prompt[:i], *prompt[i + 1 :]),
            prompt[i + 1 :],
        ]
    log_probs = masked.scorer.scores(prompts)[:, 1, 0].cpu()
    replaced, dropped, beheaded = (log_probs[0] - log_probs[1:]).view(-1, 3).T
    from_dropped = (replaced - dropped).abs().sum()
    from_beheaded = (replaced - beheaded).abs().sum()
    if beheaded.mean() > LEAST_DROP and 2 * from_beheaded < from_dropped:
        token = masked.tokenizer.convert_ids_to_tokens([stand_in])[0]
        warn(
            f"the baseline {token!r} (id {stand_in}) hides what stands before it from the model, "
            "so attributions are those of everything up to a token: its score drops follow those "
            f"of dropping all of it (off by {from_beheaded / 3:.2f}) and not those of dropping the "
            f"token (off by {from_dropped / 3:.2f}). Choose another, such as baselines='remove' or "
            "'pad'"
        )
