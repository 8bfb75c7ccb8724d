"""The scales of quantized weights, read and checked without torch: one that is NaN or zero spoils a layer silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from wan_local.errors import CorruptModel
from wan_local.header import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCALES = (".scale_weight", ".weight_scale", ".weight._scale")  # Comfy's older name, its newer and ours, quanto's
_MOST_BYTES = 64 * 2**20  # of all scales; a 14B transformer with one for each row has 7 MB


def is_scale(name: str) -> bool:
    """Tell whether a tensor is what another one is multiplied by."""
    return name.endswith(SCALES)


def check_scales(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CorruptModel for a scale that is negative, NaN, infinite or zero; a row may be zero, and so its scale.

    Those of a pickle that do not lie side by side in their file are looked at when they are used.
    """
    if not any(is_scale(name) for name in tensors):
        return  # most files: without them numpy is half of the time that an inspection takes
    import numpy as np

    left = _MOST_BYTES
    for name, info in tensors.items():
        left -= info.nbytes if is_scale(name) else 0
        if not is_scale(name) or left < 0 or info.dtype not in ("F32", "F16", "BF16") or info.strides is not None:
            continue
        numbers = _read(info)
        zero = numbers.size == 1 and not numbers.all()
        if zero or not np.isfinite(numbers).all() or (numbers < 0).any():
            raise CorruptModel(
                f"the scale {name!r} in {info.file.name!r} is negative, NaN, infinite or zero: what it scales is lost. "
                "Download it again."
            )


def _read(info: TensorInfo) -> NDArray[np.floating]:
    import numpy as np

    with info.file.open("rb") as stream:
        stream.seek(info.offset)
        content = stream.read(info.nbytes)
    if info.dtype == "BF16":
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(content, np.float32 if info.dtype == "F32" else np.float16)
