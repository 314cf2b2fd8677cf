"""Export of results: data frames, arrays and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from captum_llm_ext.results.frames import long_frame, named_arrays, wide_frame
from captum_llm_ext.results.json_format import read_json, write_json
from captum_llm_ext.results.values import FloatArray

if TYPE_CHECKING:
    from pandas import DataFrame
    from typing_extensions import Self


class ExportMixin:
    """Data frames, arrays and JSON of the attributes in `json_format.FIELDS`."""

    _computed: ClassVar[tuple[str, ...]] = ()  # attributes in FIELDS that are not arguments

    def to_dataframe(self, long: bool = False) -> DataFrame:
        """Pandas data frame of the attributions, float32; repeated tokens as in `seq_attr_dict`.

        The frame of several layers holds the frames of all layers, with the name of the layer as
        first level of the index, or as first column where `long`.

        Args:
            long: False (default): a row for each input token, a column "sequence" and one for
                each output token. True: a row for each pair, with the columns output_position,
                output_token, input_position, input_token and attribution. The first n_input rows
                are the sequence's, without an output position and token.

        Raises:
            ImportError: pandas is missing (``captum-llm-ext[export]``).

        Example:
            >>> result.to_dataframe()["sequence"].nlargest(2).index.tolist()
            ['The', 'capital']
        """
        return long_frame(self) if long else wide_frame(self)

    def to_numpy(self) -> dict[str, FloatArray]:
        """Each array by the name of its attribute, ready for `numpy.savez`.

        Attributes that are None are left out; the hidden attribution of a layer is named
        "hidden_attr.<layer>".
        """
        return named_arrays(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text of everything but `inp`, which holds the tokenizer; exact in float32.

        Args:
            path: a file to write the text to as well; None (default) for none.

        Raises:
            TypeError: a token is not a str, or the class of the result is not this package's.
        """
        text = write_json(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """The result that `to_json` stored, of its class, on the CPU and without `inp`.

        Args:
            source: the JSON text, which begins with "{", or the path of a file with it.

        Raises:
            ValueError: no such file, damaged text, a newer version of the format, or a result of
                another class.
            OSError: the file cannot be read.

        Example:
            >>> LLMAttributionResult.from_json(result.to_json()) == result
            True
        """
        kind, values = read_json(source)
        classes = {c.__name__: c for c in reversed(_with_subclasses(cls))}
        if kind not in classes:
            raise ValueError(
                f"expected a stored {cls.__name__}, got a {kind}; use {kind}.from_json"
            )
        return classes[kind]._restored(values)

    @classmethod
    def _restored(cls, values: Mapping[str, Any]) -> Self:
        """A result with the stored values, computed ones too: a mean's last bit can differ."""
        result = cls(**{name: v for name, v in values.items() if name not in cls._computed})
        for name in cls._computed:
            setattr(result, name, values[name])
        return result


def _with_subclasses(cls: type[Any]) -> list[type[Any]]:
    return [cls, *(c for child in cls.__subclasses__() for c in _with_subclasses(child))]
