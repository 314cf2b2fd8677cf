"""Whether the token that stands for an absent one hides what stands before it.

A document separator does so: the model ignores much of what precedes it, and a token of the prompt
seems to matter as much as all tokens up to it. What a token does is measured. Put into the middle
of the prompt it costs more than dropping the token there; the question is how far it goes towards
the cost of dropping everything before it as well.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedModel

from captum_llm_ext.model.suitability import unwrapped
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.warning import warn

PLACES = (1 / 3, 1 / 2, 2 / 3)  # of the prompt
LEAST_DROP = 1.0  # that everything before a place is worth on average, in nats
# The share of that worth from which on it warns, by the number of features: in a short prompt any
# token takes away more.
HIDDEN = {8: 0.5, 16: 0.25}


def warn_of_hiding_stand_in(masked: MaskedPrompts) -> None:
    """Warn where one id stands for every absent token and hides the tokens before it."""
    ids = getattr(masked.inp, "baseline_ids", None)
    forcing = masked.scorer.forcing
    if (
        ids is None
        or not isinstance(unwrapped(forcing.model), PreTrainedModel)
        or not masked.is_causal
    ):
        return
    shares = [share for fewest, share in HIDDEN.items() if ids.numel() >= fewest]
    if not shares or len(ids.unique()) > 1:
        return
    stand_in = int(ids[0, 0])
    question = "hides", stand_in, shares[-1]
    if (share := forcing.checks.get(question)) is None:
        worth, hidden = _worth_and_hidden(masked, stand_in)
        if worth <= LEAST_DROP:
            return  # this prompt does not tell
        share = forcing.checks[question] = hidden / worth
    if share > shares[-1]:
        token = masked.tokenizer.convert_ids_to_tokens([stand_in])[0]
        warn(
            f"the baseline {token!r} (id {stand_in}) hides what stands before it from the model: "
            f"in the prompt where this was measured it takes away {share:.0%} of what all tokens "
            "before it are worth, beside the token that it replaces. Attributions grow towards the "
            "end of the prompt for that reason. Choose another, such as baselines='remove' or 'pad'"
        )


def _worth_and_hidden(masked: MaskedPrompts, stand_in: int) -> tuple[float, float]:
    """What all tokens before a place of the prompt are worth, and how much of it is hidden."""
    prompt = tuple(masked.scorer.reference.tolist())
    prompts = [prompt]
    for place in PLACES:
        i = round(place * len(prompt))
        prompts += [
            (*prompt[:i], stand_in, *prompt[i + 1 :]),
            (*prompt[:i], *prompt[i + 1 :]),
            (stand_in, *prompt[i + 1 :]),
        ]
    # By a scorer of its own: what is asked once must not change which prompts share a pass later.
    log_probs = replace(masked.scorer).scores(prompts)[:, 1, 0].cpu()
    replaced, dropped, beheaded = (log_probs[0] - log_probs[1:]).view(-1, 3).T
    return float((beheaded - dropped).mean()), float((replaced - dropped).mean())
