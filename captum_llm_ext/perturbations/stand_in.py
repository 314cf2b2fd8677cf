"""Whether the token that stands for an absent one hides what stands before it.

A document separator does so: the model ignores much of what precedes it, and a token of the prompt
seems to matter as much as all tokens up to it. What a token does is measured. Put into the middle
of the prompt it costs more than dropping the token there; the question is how far it goes towards
the cost of dropping everything before it as well.
"""

from __future__ import annotations

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
    stand_in, prompt = int(ids[0, 0]), tuple(masked.scorer.reference.tolist())
    prompts = [prompt]
    for place in PLACES:
        i = round(place * len(prompt))
        prompts += [
            (*prompt[:i], stand_in, *prompt[i + 1 :]),
            (*prompt[:i], *prompt[i + 1 :]),
            (stand_in, *prompt[i + 1 :]),
        ]
    log_probs = masked.scorer.scores(prompts)[:, 1, 0].cpu()
    replaced, dropped, beheaded = (log_probs[0] - log_probs[1:]).view(-1, 3).T
    worth, hidden = (beheaded - dropped).mean(), (replaced - dropped).mean()
    if worth > LEAST_DROP and hidden > shares[-1] * worth:
        token = masked.tokenizer.convert_ids_to_tokens([stand_in])[0]
        warn(
            f"the baseline {token!r} (id {stand_in}) hides what stands before it from the model: "
            f"in the middle of this prompt it takes away {hidden / worth:.0%} of what all tokens "
            "before it are worth, beside the token that it replaces. Attributions grow towards the "
            "end of the prompt for that reason. Choose another, such as baselines='remove' or 'pad'"
        )
