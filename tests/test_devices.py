"""Memory counters tell the truth about what happened between two looks."""

from __future__ import annotations

import sys

import pytest
import torch

from lopt_lite.devices import PeakMemory, host_rss_bytes

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a process's peak")
def test_the_cpu_peak_includes_what_was_freed_before_the_look():
    peak = PeakMemory(torch.device("cpu"))
    before = host_rss_bytes()
    block = torch.ones(256 * MIB, dtype=torch.uint8)
    del block
    assert peak.read() >= before + 200 * MIB
    assert host_rss_bytes() < before + 200 * MIB
