"""The tables that measured rows become: the last row of a thing counts, and what is missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import gpu_table

WORLD = {"device": "NVIDIA H200", "capability": "sm_90", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0",
         "commit": "abc1234"}  # fmt: skip
LENGTH, SHAPE = [32_760, 40, 128], [32_760, 5120, 13_824]


def speed(op: str, path: str = "own", **numbers: Any) -> dict[str, Any]:
    return {"stage": "kernel_speed", "world": WORLD, "path": path, "op": op, **numbers}


def step(who: str, size: str, seconds: float) -> dict[str, Any]:
    return {"stage": "int8_step", "world": WORLD, "who": who, "size": size, "median_seconds": seconds,
            "peak_bytes": 2**35}  # fmt: skip


ROWS = [
    {"stage": "kernels", "world": WORLD, "path": "own", "errors": {"rms_rope": 0.3, "linear_int8": 2.0}, "failed": {}},
    {"stage": "kernels", "world": WORLD, "path": "own", "errors": {"rms_rope": 0.3}, "failed": {"linear_int8": "no"}},
    speed("attention_int8, fp16 values", shape=LENGTH, tera_a_second=1.0),
    speed("attention_int8, fp16 values", shape=LENGTH, tera_a_second=444.4),
    speed("attention_int8, fp16 values", "consumer", shape=LENGTH, tera_a_second=333.3),
    speed("torch sdpa, flash", shape=LENGTH, tera_a_second=555.5),
    speed("linear_int8", shape=SHAPE, tera_a_second=900.0),
    speed("torch._int_mm", shape=SHAPE, tera_a_second=1000.0),
    speed("gelu_quantize", tokens=32_760, gigabytes_a_second=3400.0, share_of_copy=0.81),
    speed("tune linear_int8 large", launch=[128, 256, 64, 8, 3], milliseconds=4.5),
    speed("tune linear_int8 large", launch=[128, 128, 64, 8, 3], milliseconds=None),
    speed("torch sdpa, cudnn", shape=LENGTH, failed="Traceback\nRuntimeError: no plan"),
    speed("torch._int_mm", shape=[75_600, 5120, 5120], skipped="42 s were spent before it"),
    step("diffusers eager", "832x480", 2.9),
    step("diffusers eager", "1280x720", 11.25),
    step("wan_local fused", "832x480", 2.5),
    {"stage": "vae", "world": WORLD},
]


def test_measured_rows_become_tables_and_the_last_of_each_counts() -> None:
    told = gpu_table.text(ROWS)
    assert "**NVIDIA H200** (sm_90, driver 580.1, torch 2.11.0, triton 3.6.0, commit abc1234" in told
    assert "| own | 1 of 2 | `rms_rope`: 0.3 | linear_int8 |" in told
    assert "| 32,760 | 444 |  | 333 |  | 556 |  |" in told
    assert "| 32,760 x 5,120 x 13,824 | 900 |  | 1000 |  | 90% |" in told
    assert "| `gelu_quantize` | 32,760 | 3,400 | 81% |" in told
    assert "| diffusers eager | 2.90 s, 32.0 GiB | 11.25 s, 32.0 GiB |" in told
    assert "| wan_local fused | 2.50 s, 32.0 GiB |  |" in told
    assert "128x256x64x8x3 | 4.50 ms" in told and "128x128x64x8x3 | does not fit, or is wrong" in told


def test_what_was_not_measured_is_said_with_its_reason() -> None:
    told = gpu_table.text(ROWS)
    assert "- `torch sdpa, cudnn` [32760, 40, 128], own path: RuntimeError: no plan" in told
    assert "- `torch._int_mm` [75600, 5120, 5120], own path: 42 s were spent before it" in told


def test_tables_go_between_their_marks_and_without_rows_it_says_so(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{gpu_table.BEGIN}\nold\n{gpu_table.END}\nafter\n")
    gpu_table.write(ROWS, readme)
    assert "444" in readme.read_text() and "old" not in readme.read_text()
    gpu_table.write([], readme)
    assert readme.read_text() == f"before\n{gpu_table.BEGIN}\n{gpu_table.NOTHING}\n{gpu_table.END}\nafter\n"


def test_the_readme_has_the_tables_of_the_rows_that_are_kept() -> None:
    files = [file for file in sorted(gpu_table.RESULTS.glob("gpu*.jsonl")) if "on_cpu" not in file.name]
    told = gpu_table.README.read_text(encoding="utf-8")
    assert f"{gpu_table.BEGIN}\n{gpu_table.text(gpu_table.read_rows(files))}\n{gpu_table.END}" in told
