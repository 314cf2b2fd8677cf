"""What every result can be stored and handed on as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from captum_llm_ext.results.export import read_json, write_json
from captum_llm_ext.results.frames import arrays, long_frame, wide_frame
from captum_llm_ext.results.values import FloatArray

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self


class StoredResult:
    """Data frames, arrays and JSON of the attributes that `export.FIELDS` lists for a class."""

    _computed: ClassVar[tuple[str, ...]] = ()  # stored attributes that are no arguments

    def to_dataframe(self, long: bool = False) -> DataFrame:
        """Pandas data frame of the attributions, float32; repeated tokens as in `seq_attr_dict`.

        Args:
            long: False (default): a row per input token, a column "sequence" and one per output
                token. True: a row per pair, with columns output_position, output_token,
                input_position, input_token and attribution; those of the sequence, the first
                n_input rows, have no output position and token.

        Of several layers: the frames of all layers under one another, with the layer's name as
        first level of the index, or as first column where long.

        Raises:
            ImportError: pandas is missing (``captum-llm-ext[export]``).

        Example:
            >>> result.to_dataframe()["sequence"].nlargest(2).index.tolist()
            ['The', 'Ġcapital']
        """
        return long_frame(self) if long else wide_frame(self)

    def to_numpy(self) -> dict[str, FloatArray]:
        """Every array by the name of its attribute, as `numpy.savez` takes them.

        What is None is left out; hidden attributions of layers are "hidden_attr.<layer>".
        """
        return arrays(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text of everything but `inp`, which holds the tokenizer; exact in float32.

        Args:
            path: a file to write the text to as well; None (default) for none.

        Raises:
            TypeError: a token that is no str, or a class of result made elsewhere.
        """
        text = write_json(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """The result that `to_json` stored, of the class it had, on the CPU and without `inp`.

        Args:
            source: the JSON text, or a pathlib.Path of a file with it.

        Raises:
            ValueError: damaged text, one of a newer version, or a result of another class.
            OSError: the file cannot be read.

        Example:
            >>> LLMAttributionResult.from_json(result.to_json()) == result
            True
        """
        kind, values = read_json(source)
        found = next((c for c in _with_subclasses(cls) if c.__name__ == kind), None)
        if found is None:
            raise ValueError(
                f"expected a stored {cls.__name__}, got a {kind}; use {kind}.from_json"
            )
        return found._restored(values)

    @classmethod
    def _restored(cls, values: Mapping[str, Any]) -> Self:
        """Of stored values, also those computed: the last bit of a mean depends on the device."""
        result = cls(**{name: v for name, v in values.items() if name not in cls._computed})
        for name in cls._computed:
            setattr(result, name, values[name])
        return result


def _with_subclasses(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(c for child in cls.__subclasses__() for c in _with_subclasses(child))]
