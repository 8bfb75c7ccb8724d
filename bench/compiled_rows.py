"""What the kernels that work row by row take of a card, as compiled for it: no card is needed, and nothing is timed.

python -m bench.compiled_rows        registers of a thread, rows on a multiprocessor at once, warp instructions of a row
"""

from __future__ import annotations

from tests.kernels.test_compiled import AT_ONCE, ROWS, compiled
from wan_kernels.hardware import ARCHITECTURES


def table() -> str:
    """Return the table as Markdown."""
    lines = [f"| rows of 5,120 | {' | '.join(f'sm_{arch}' for arch in ARCHITECTURES)} |", "|---" * 5 + "|"]
    lines += [f"| {case} | {' | '.join(_cell(case, arch) for arch in ARCHITECTURES)} |" for case in AT_ONCE]
    return "\n".join(lines)


def _cell(case: str, arch: int) -> str:
    code = compiled(ROWS[case], arch)
    return f"{code.registers}, {code.programs_at_once}, {code.issued:,}"


if __name__ == "__main__":
    print(table())
