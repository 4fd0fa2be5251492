"""What the results of the public functions have in common in Python: a short `repr`, a cell in a notebook, tables.

In: a result. Out: texts and tables, made by `lora_probe.render` when they are wanted: the core draws nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Presented:
    """A result of `lora_probe.inspect`, `check`, `trace`, `compare`, `parity`, `cost`, `diff` or `open_trace`."""

    def __repr__(self) -> str:
        """The verdict in one line."""
        text: str = _render().short(self)
        return text

    def _repr_html_(self) -> str:
        """The parts of the page of `--format html`, for a notebook."""
        text: str = _render().html(self)
        return text

    def to_dict(self, **options: Any) -> dict[str, Any]:
        """The same as `--format json`. `norms=True` reads the values of an adapter, as `inspect --norms` does.

        Raises:
            TypeError: an option that this kind of result does not have.
        """
        data: dict[str, Any] = _render().as_dict(self, **options)
        return data

    def tables(self, **options: Any) -> dict[str, dict[str, npt.NDArray[np.generic]]]:
        """The lists of `to_dict` as columns, by name: `pandas.DataFrame(result.tables()["modules"])`.

        A column has one value for each row: numbers as float64 (NaN where there is none) or int64, texts as objects.
        `options` are those of `to_dict`.
        """
        columns: dict[str, dict[str, npt.NDArray[np.generic]]] = _render().tables(self, **options)
        return columns


def _render() -> Any:
    return import_module("lora_probe.render.objects")
