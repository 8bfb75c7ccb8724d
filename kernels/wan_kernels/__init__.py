"""GPU kernels of wan_local, each beside its plain PyTorch reference: on a card Triton runs, on a CPU the reference.

Importing needs neither Triton nor a card.
"""

from __future__ import annotations

from wan_kernels.attention_int8 import HEAD_DIMS, KEY_BLOCK, attention_int8
from wan_kernels.decode_int4 import INT4_GROUP, decode_int4_
from wan_kernels.gate_norm_modulate import gate_norm_modulate_, gate_norm_modulate_quantize_
from wan_kernels.gelu_quantize import gelu_quantize
from wan_kernels.language import HAS_TRITON, TRITON_LACKING, TRITON_VERSION, KernelUnavailable
from wan_kernels.linear_int8 import linear_int8, linear_int8_residual_
from wan_kernels.quantize_rows import ROTATION_GROUP, quantize_rows, rotate_reference
from wan_kernels.rms_rope import quantize_keys_reference, rms_rope, rms_rope_quantize, rms_rope_quantize_keys
from wan_kernels.values import quantize_values, scale_values_, scale_values_reference

__all__ = [
    "HAS_TRITON",
    "HEAD_DIMS",
    "INT4_GROUP",
    "KEY_BLOCK",
    "ROTATION_GROUP",
    "TRITON_LACKING",
    "TRITON_VERSION",
    "KernelUnavailable",
    "attention_int8",
    "decode_int4_",
    "gate_norm_modulate_",
    "gate_norm_modulate_quantize_",
    "gelu_quantize",
    "linear_int8",
    "linear_int8_residual_",
    "quantize_keys_reference",
    "quantize_rows",
    "quantize_values",
    "rms_rope",
    "rms_rope_quantize",
    "rms_rope_quantize_keys",
    "rotate_reference",
    "scale_values_",
    "scale_values_reference",
]
