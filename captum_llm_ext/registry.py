"""Every attribution method, one row each: what it is called, what runs it, what it takes.

`explain`, the command line, the wrappers' supported methods and the tables of the documentation
read these rows. The module imports neither torch nor captum, so that a command line can list the
methods at once. A new method is one class in its folder and one row here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

GRADIENT, PERTURBATION, ATTENTION = "gradient", "perturbation", "attention"


@dataclass(frozen=True)
class Wrapper:
    """A class with `attribute`, by import path, and what it is made with besides the method.

    has_layers: whether layers can be chosen; reads_attention: whether it serves only models whose
    attention can be read; sequence_only: the options of `attribute` that leave out the rows per
    target token, which is cheaper.
    """

    path: str
    settings: tuple[str, ...] = ("attr_target",)
    has_layers: bool = True
    reads_attention: bool = False
    sequence_only: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A method by its name.

    path: import path of its class, or of a function that makes it from the model (and layers).
    wrapper: key of `WRAPPERS`.
    help: one line for the command line and the documentation.
    driver: import path of the `GradientMethod` that runs a class of Captum; None for a class that
        runs itself.
    settings: keywords that the class is made with.
    fixed: settings of the wrapper that make this method.
    renamed: names that `explain` has for options of `attribute`.
    takes_baselines: whether something stands in the place of absent features.
    """

    path: str
    wrapper: str
    help: str
    driver: str | None = None
    settings: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    takes_baselines: bool = True

    @property
    def wrapped_by(self) -> Wrapper:
        return WRAPPERS[self.wrapper]


WRAPPERS: dict[str, Wrapper] = {
    GRADIENT: Wrapper(
        "captum_llm_ext.gradients.wrapper:LLMGradientAttribution",
        sequence_only={"include_per_token_attr": False},
    ),
    PERTURBATION: Wrapper("captum_llm_ext.perturbations.wrapper:LLMAttribution", has_layers=False),
    ATTENTION: Wrapper(
        "captum_llm_ext.attention.wrapper:LLMAttentionAttribution",
        ("heads", "reduction"),
        reads_attention=True,
        sequence_only={"include_per_token_attr": False},
    ),
}

_PATH_OPTIONS = {"quadrature": "method"}

METHODS: dict[str, Method] = {
    "saliency": Method(
        "captum_llm_ext.gradients.saliency:LayerSaliency",
        GRADIENT,
        "norm of the gradient",
        settings=("norm",),
        takes_baselines=False,
    ),
    "ig": Method(
        "captum_llm_ext.gradients.integrated_gradients:layer_integrated_gradients",
        GRADIENT,
        "integrated gradients",
        "captum_llm_ext.gradients.integrated_gradients:IntegratedGradients",
        renamed=_PATH_OPTIONS,
    ),
    "gradxact": Method(
        "captum.attr:LayerGradientXActivation",
        GRADIENT,
        "gradient x activation",
        "captum_llm_ext.gradients.gradient_x_activation:GradientXActivation",
        takes_baselines=False,
    ),
    "gradshap": Method(
        "captum.attr:LayerGradientShap",
        GRADIENT,
        "gradient SHAP",
        "captum_llm_ext.gradients.gradient_shap:GradientShap",
    ),
    "conductance": Method(
        "captum.attr:LayerConductance",
        GRADIENT,
        "conductance of layers, along the path of the embeddings",
        "captum_llm_ext.gradients.conductance:Conductance",
        renamed=_PATH_OPTIONS,
    ),
    "relevance": Method(
        "captum_llm_ext.gradients.relevance:LayerRelevance",
        GRADIENT,
        "layer-wise relevance, with attention weights constant or by AttnLRP's rules",
        settings=("rules",),
        takes_baselines=False,
    ),
    "ablation": Method(
        "captum.attr:FeatureAblation",
        PERTURBATION,
        "score without each feature",
    ),
    "two_stage": Method(
        "captum_llm_ext.perturbations.two_stage:TwoStageAblation",
        PERTURBATION,
        "ablation in the whole prompt and in what matters of it",
    ),
    "guided": Method(
        "captum_llm_ext.perturbations.guided:GuidedAblation",
        PERTURBATION,
        "ablation on a budget, where a one-pass method says that it matters",
        settings=("max_evaluations", "guide"),
    ),
    "surrogate": Method(
        "captum_llm_ext.perturbations.surrogate:SparseSurrogate",
        PERTURBATION,
        "a linear surrogate over random masks, for each target token",
        settings=("n_masks", "guide"),
    ),
    "shapley": Method("captum.attr:ShapleyValues", PERTURBATION, "Shapley values, exact"),
    "shapley_sampling": Method(
        "captum.attr:ShapleyValueSampling", PERTURBATION, "Shapley values, sampled"
    ),
    "lime": Method("captum.attr:Lime", PERTURBATION, "a linear surrogate near the prompt"),
    "kernelshap": Method(
        "captum.attr:KernelShap", PERTURBATION, "Shapley values by a linear surrogate"
    ),
    "attention": Method(
        "captum_llm_ext.attention.wrapper:LLMAttentionAttribution",
        ATTENTION,
        "attention weights",
        takes_baselines=False,
    ),
    "flow": Method(
        "captum_llm_ext.attention.wrapper:LLMAttentionAttribution",
        ATTENTION,
        "information flow routes, in one pass",
        fixed={"reduction": "flow"},
        takes_baselines=False,
    ),
    "flow_rollout": Method(
        "captum_llm_ext.attention.wrapper:LLMAttentionAttribution",
        ATTENTION,
        "information flow, multiplied through the layers",
        fixed={"reduction": "flow_rollout"},
        takes_baselines=False,
    ),
}

# What `explain` takes where no method is named: the first that serves the model and takes the
# options (`choosing.py`). The last serves every model and every call.
AUTOMATIC = ("flow", "saliency")

# Options of `attribute` that change how the work is done, and not its results.
WITHOUT_EFFECT = ("internal_batch_size", "perturbations_per_eval", "show_progress", "check")

# The values of each option that takes one of a few. The modules that implement them import torch,
# so the names stand here as well; `tests/cli/test_starts_at_once.py` holds the two together.
CHOICES: dict[str, tuple[str, ...]] = {
    "attr_target": ("log_prob", "prob", "logit", "rank"),
    "by": ("token", "message", "word", "sentence", "line", "paragraph", "part"),
    "by_output": ("token", "sentence"),
    "layer_mode": ("independent", "joint"),
    "norm": ("l1", "l2", "linf"),
    "quadrature": (
        "adaptive",
        "riemann_left",
        "riemann_right",
        "riemann_middle",
        "riemann_trapezoid",
        "gausslegendre",
    ),
    "quantization": ("nf4", "int8"),
    "reduction": ("mean", "max", "rollout", "value_norm", "flow", "flow_rollout"),
    "rules": ("cp", "attnlrp"),
    "task": ("causal", "seq2seq", "qa"),
}


def did_you_mean(got: object, names: Iterable[object]) -> str:
    """ "; did you mean 'x'?" where one of the names is close to what came, else "".

    >>> did_you_mean("ablatoin", METHODS)
    "; did you mean 'ablation'?"
    """
    known = {str(name).lower(): str(name) for name in names}
    close = get_close_matches(str(got).lower(), known, n=1, cutoff=0.6)
    return f"; did you mean {known[close[0]]!r}?" if close else ""


def method_named(name: str) -> Method:
    """The row of a method.

    Raises:
        ValueError: no method has this name; the message lists them.
    """
    if name not in METHODS:
        raise ValueError(
            f"expected method to be one of {', '.join(METHODS)}; got {name!r}"
            + did_you_mean(name, METHODS)
        )
    return METHODS[name]


def methods_of(*wrappers: str) -> dict[str, Method]:
    """The rows of some wrappers, by name."""
    return {name: method for name, method in METHODS.items() if method.wrapper in wrappers}


def load(path: str) -> Any:
    """What an import path "package.module:name" names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
