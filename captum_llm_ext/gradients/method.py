"""A gradient method: the points of a path that it needs, and what it makes of the gradients there.

A new method is a class in a file of its own and a row in `registry.py`. A class that Captum has
already is driven by a `GradientMethod` beside it; a class of ours is one itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from captum_llm_ext.compat import GradientAttribution, LayerAttribution
from captum_llm_ext.gradients.input_point import InputPoint
from captum_llm_ext.model.layers import Site
from captum_llm_ext.registry import GRADIENT, load, methods_of

if TYPE_CHECKING:
    from captum_llm_ext.gradients.totals import LayerTotal, Plan
    from captum_llm_ext.gradients.trace import Trace
    from captum_llm_ext.inputs.baselines import PathStart

DIFFERENCE = "difference"  # of the scores at the ends of a path


class GradientMethod:
    """How one method makes attributions of gradients, for one run.

    As it stands it takes gradient times value at the input itself; a subclass says what differs.

    options: keywords of `attribute` that belong to the method. norm: how the hidden units of a
    token combine, a key of `NORMS`. multiplies: whether gradients are multiplied by the layer's
    value, or by its difference along the path. sums_to: `DIFFERENCE` where attributions ought to
    sum to a difference of scores, which is then checked; None where they sum to nothing in
    particular. has_path: whether there is a path, and so a baseline. moves_layers: whether the
    layers themselves walk it. is_random: whether another run gives other attributions. n_points:
    the most points of the path whose gradients one layer takes. divides: whether parts of the
    target can be attributed one after the other.
    """

    options: ClassVar[tuple[str, ...]] = ()
    norm: str = "sum"
    multiplies: bool = True
    sums_to: str | None = None
    has_path: bool = False
    moves_layers: bool = True
    is_random: bool = False
    n_points: int = 1
    divides: bool = True

    @classmethod
    def of(cls, attr_method: Any, **options: Any) -> GradientMethod:
        """The method of one run.

        Args:
            attr_method: what the user made.
            **options: the keywords of `attribute` that belong to the method.
        """
        del options
        method: GradientMethod = attr_method
        return method

    def surround(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Entered around every forward and backward pass: the place of changed backward rules.

        Everything that it patches is as before when it is left. A method that overrides this is
        never run in forward mode.
        """
        del model
        return nullcontext()

    @property
    def changes_backward(self) -> bool:
        return type(self).surround is not GradientMethod.surround

    def sites(self, sites: Sequence[Site], model: nn.Module) -> Sequence[Site]:
        """The layers that are traced: those that the caller chose, and what the path needs.

        Args:
            sites: the chosen layers.
            model: the model.
        """
        del model
        return sites

    def checked(self, sites: Iterable[Site], model: nn.Module) -> list[Site]:
        """The layers whose sums are checked against the scores.

        Args:
            sites: all layers.
            model: the model.
        """
        del model
        return list(sites)

    def paths(
        self,
        trace: Trace,
        start: PathStart | None,
        plan: Plan,
        totals: Mapping[Site, LayerTotal],
    ) -> Iterator[Any]:
        """The paths to run, each over some of the layers that see the tokens (`Trace.alive`).

        Args:
            trace: the model's pass at the input.
            start: where paths start, or None.
            plan: the caller's options.
            totals: what the paths add to.
        """
        del start
        yield InputPoint(trace, self, plan, totals)

    def run(self, path: Any) -> None:
        """Add the gradients of one path at the points that the method needs."""
        path.add_gradients()


class LayerMethod(LayerAttribution, GradientAttribution, GradientMethod):
    """Base of our own methods: made with a model and layers, as Captum's layer methods are."""

    def __init__(self, forward_func: Callable[..., Any], layer: Any) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)


class SupportedMethods:
    """The classes that `LLMGradientAttribution` takes, read from the registry each time."""

    def __get__(self, instance: object, owner: type) -> tuple[type, ...]:
        ours = (load(row.path) for row in methods_of(GRADIENT).values() if row.driver is None)
        return (*_drivers(), *ours, LayerMethod)


def gradient_method(
    driver: type[GradientMethod], attr_method: GradientAttribution, options: Mapping[str, Any]
) -> GradientMethod:
    """The driver of a method, with the options of one call of `attribute`.

    Raises:
        TypeError: an option that the method does not have.
    """
    if unknown := sorted(set(options) - set(driver.options)):
        names = ", ".join(driver.options) or "none"
        raise TypeError(
            f"{type(attr_method).__name__} does not take {', '.join(unknown)} "
            f"(its own options: {names})"
        )
    return driver.of(attr_method, **options)


def driver_of(attr_method: GradientAttribution) -> type[GradientMethod]:
    """The class that drives a method: its own, or that of the registry for a class of Captum."""
    if isinstance(attr_method, GradientMethod):
        return type(attr_method)
    return next(driver for kind, driver in _drivers().items() if isinstance(attr_method, kind))


def _drivers() -> dict[type, type[GradientMethod]]:
    """Class of Captum → what drives it."""
    paths = [method.driver for method in methods_of(GRADIENT).values() if method.driver]
    drivers: list[Any] = [load(path) for path in dict.fromkeys(paths)]
    return {driver.drives: driver for driver in drivers}


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(-1),
    "l1": lambda values: values.abs().sum(-1),
    "l2": lambda values: values.norm(dim=-1),
    "linf": lambda values: values.abs().amax(-1),
}
