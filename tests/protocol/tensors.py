"""Arrays of every datatype, for the tests of the codecs."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rayprism.core.tensors import Array, Datatype, numpy_dtype

SAMPLES: dict[Datatype, Array] = {
    Datatype.BOOL: np.array([[True, False, True]]),
    Datatype.UINT8: np.array([[0, 1, 255]], np.uint8),
    Datatype.UINT16: np.array([[0, 1, 65535]], np.uint16),
    Datatype.UINT32: np.array([[0, 1, 2**32 - 1]], np.uint32),
    Datatype.UINT64: np.array([[0, 1, 2**64 - 1]], np.uint64),
    Datatype.INT8: np.array([[-128, 0, 127]], np.int8),
    Datatype.INT16: np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    Datatype.INT32: np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    Datatype.INT64: np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    Datatype.FP16: np.array([[-65504.0, 0.1, 6e-8]], np.float16),
    Datatype.BF16: np.array([[-3.3e38, 0.1, 1e-30]], ml_dtypes.bfloat16),
    Datatype.FP32: np.array([[-3.4e38, 0.1, 1e-45]], np.float32),
    Datatype.FP64: np.array([[-1.7e308, 0.1, 5e-324]], np.float64),
    Datatype.BYTES: np.array([[b"", b"plain", "é€😀\n\0".encode()]], np.object_),
}


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple)


@st.composite
def arrays(draw: st.DrawFn, *, text_only: bool = False, finite: bool = False) -> Array:
    """An array of any datatype and shape; `text_only` where BYTES have to be UTF-8."""
    datatype = draw(st.sampled_from(list(Datatype)))
    shape = draw(shapes())
    if datatype is Datatype.BYTES:
        element: st.SearchStrategy[Any] = st.text(max_size=8).map(str.encode)
        if not text_only:
            element = element | st.binary(max_size=8)
        count = math.prod(shape)
        array = np.empty(count, np.object_)
        array[:] = draw(st.lists(element, min_size=count, max_size=count))
        return array.reshape(shape)
    if datatype is Datatype.BF16:
        # Every 16 bits are some bfloat16; NaN among them are made the one that survives JSON.
        array = draw(hnp.arrays(np.uint16, shape)).view(ml_dtypes.bfloat16)
        with np.errstate(invalid="ignore"):
            array = np.where(np.isnan(array), ml_dtypes.bfloat16(np.nan), array)
    else:
        array = draw(hnp.arrays(numpy_dtype(datatype), shape))
    if finite and datatype.is_float:
        array = np.where(np.isfinite(array), array, np.zeros((), array.dtype))
    return array


def assert_same(got: Array, want: Array) -> None:
    """Same dtype, shape and elements; NaN equals NaN."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if want.dtype == np.object_:
        assert got.tolist() == want.tolist()
        return
    if want.dtype == ml_dtypes.bfloat16:
        got, want = got.astype(np.float32), want.astype(np.float32)
    np.testing.assert_array_equal(got, want)
