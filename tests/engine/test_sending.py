"""What is sent to a device is what the host's memory held then, whatever is written into it afterwards."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import torch

import vllm_flow.engine
from vllm_flow.engine.worker.sending import OneCopy, sent, snapshot

CPU = torch.device("cpu")


def test_what_is_written_later_is_not_sent() -> None:
    """As vLLM's V1 runner does: it takes refused drafts off a step's lengths while the device still works."""
    lengths = torch.arange(6, dtype=torch.int32)
    some = lengths[:4]
    on_device, own = sent(some, CPU), snapshot(some, CPU)
    lengths -= 3
    assert on_device.tolist() == own.tolist() == [0, 1, 2, 3]
    assert on_device.dtype == torch.int32


def test_parts_of_one_copy_stand_where_they_were_added() -> None:
    """Empty ones, too, and each in memory that later writes do not reach."""
    arrays = [np.array([7, 8, 9]), np.array([], np.int64), np.array([-1], np.int32)]
    copy = OneCopy()
    parts = [copy.add(array) for array in arrays]
    copy.send(CPU)
    arrays[0][:] = 0
    assert [part.host.tolist() for part in parts] == [[7, 8, 9], [], [-1]]
    assert all(torch.equal(part.host, part.there) for part in parts)
    assert {part.there.dtype for part in parts} == {torch.int32}


def test_nobody_else_copies_asynchronously_to_a_device() -> None:
    """Or vLLM's own buffers might be read when they hold something else. To the host, an event says when."""
    found = set()
    engine = Path(vllm_flow.engine.__file__).parent
    for path in engine.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and any(k.arg == "non_blocking" for k in node.keywords):
                found.add((path.relative_to(engine).as_posix(), ast.unparse(node)))
    assert found == {
        ("worker/sending.py", "own.to(device, non_blocking=True)"),
        ("worker/attention/tap.py", "tensor.to('cpu', non_blocking=True)"),
        # Of a snapshot.
        (
            "worker/decode_graphs.py",
            "self._facts[:host.numel()].copy_(host.view(-1), non_blocking=True)",
        ),
    }
