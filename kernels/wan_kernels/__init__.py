"""GPU kernels of wan_local, each beside its plain PyTorch reference; none has landed yet (see kernels/README.md)."""

from __future__ import annotations

__all__: list[str] = []
