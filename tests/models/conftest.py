"""The skips of transformers' own model tests, each with why it may stand; a skip that is not listed here is a failure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

MAY_SKIP = {
    "test requires accelerator": "no test of this project needs a GPU (offload and devices on the CPU: test_promises.py)",
    "test requires multiple accelerators": "as above",
    "test requires Flash Attention": "GPU only",
    "test requires MPS": "Apple's GPUs only",
    "test requires deepspeed": "not used here",
    "test requires the kernels library": "kernels from the hub: GPU, and code that is fetched at run time",
    "test is slow": "torch.compile for training: minutes, and no stage compiles",
    "composite": "a model of several models",
    "No subconfigs": "as above",
    "does not support SDPA": "as above: the check of a composite model's parts; sdpa itself is tested",
    "No sequence-to-sequence": "an encoder-decoder's head",
    "partial rope": "OLMoE turns whole heads",
    "does not have position embeddings": "OLMoE's positions are rotary, a table of them does not exist",
    "no axial RoPE": "a vision model's",
    "sliding window": "OLMoE attends to everything before",
    "the sdist holds no generation tests": "ours are in test_promises.py",
}
"""Part of the reason that is given -> why that is right."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Turn a skip that is not listed into a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not any(part in str(report.longrepr) for part in MAY_SKIP):
        report.outcome, report.longrepr = "failed", f"a skip that conftest.py does not list: {report.longrepr}"
