"""A sketch: a few numbers in place of a long row, by a fixed random projection that keeps lengths and distances.

In: the width of a row. Out: the matrix that turns a row into SKETCH numbers. It is the same in every process and
engine, so the distance between rows of two runs can be computed from their traces.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

SKETCH = 32
"""Numbers in a sketch. A length computed from it is accurate to about 1/sqrt(2·SKETCH) = 12 % (one standard
deviation)."""


@lru_cache(maxsize=64)
def projection(width: int) -> npt.NDArray[np.float32]:
    """`[width, SKETCH]` of ±1/sqrt(SKETCH), so that ‖row @ projection‖² is ‖row‖² in expectation.

    Achlioptas, Database-friendly random projections (2003). Philox is counter-based and specified, so the signs of a
    width are the same everywhere.
    """
    bits = np.random.Generator(np.random.Philox(width)).integers(0, 2, (width, SKETCH), dtype=np.int8)
    signs: npt.NDArray[np.float32] = ((2 * bits - 1) / np.sqrt(SKETCH)).astype(np.float32)
    signs.flags.writeable = False
    return signs
