"""Points and weights on the straight path from baseline (0) to input (1)."""

from __future__ import annotations

from captum_llm_ext.compat import FIXED_RULES, approximation_parameters

ADAPTIVE = "adaptive"
FIRST_INTERVALS = 8  # of adaptive quadrature, each with a Gauss-Legendre rule
POINTS = 3  # of that rule
FEWEST_ROWS = FIRST_INTERVALS * POINTS
NEAR_START = 1e-4  # where the score is compared with that at the start, in search of a leap
LEAP = 0.01  # share of the score difference that makes it one: 100 times the mean slope


def fixed_rule(method: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Points in [0, 1] and weights that sum to 1, by one of Captum's quadrature rules."""
    check_steps(method, n_steps)
    weights, points = approximation_parameters(method)
    return points(n_steps), weights(n_steps)


def check_steps(method: str, n_steps: int) -> None:
    """Refuse rules that Captum does not have, and fewer steps than the rule needs."""
    if method not in FIXED_RULES:
        known = ", ".join([ADAPTIVE, *FIXED_RULES])
        raise ValueError(f"method must be one of {known}; got {method!r}")
    fewest = 1 if method == "gausslegendre" else 2
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < fewest:
        raise ValueError(f"n_steps must be an int >= {fewest} for {method!r}, got {n_steps!r}")
