"""One of two engines that compute a model's experts for one another: asks, and compares with the oracle.

``python -m tests.families.sharing_experts RANK PORT FOLDER NAME``; ends with how many steps were told rows by
layer, and how many layers ran on nobody's row. vLLM 0.32 has no gathering of rows on a CPU: what CUDA has is done
here with torch's own collectives, by the same numbers.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from tests.engine import v2_cpu
from tests.engine.fixtures import prepare_process

OF_RANK = (
    ((None, 0, 1, 2, 3, 4), 9),
    ((None, 3, 2), 4),
)
"""Cliffs that an engine is asked about, and how long its answers are: the second is done first, and keeps up."""


def prepare(rank: int, port: int) -> None:
    """Before vLLM is imported."""
    prepare_process()
    if v2_cpu.wanted():
        v2_cpu.install()
    for name, value in {
        "RANK": rank,
        "RANK_LOCAL": rank,
        "SIZE": 2,
        "MASTER_IP": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        os.environ[f"VLLM_DP_{name}"] = str(value)
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def gather_rows() -> None:
    """Give a CPU's communicator what CUDA's has."""
    import torch
    import torch.distributed as dist
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    def all_gatherv(self: Any, tensors: Any, dim: int = 0, sizes: Any = None) -> Any:
        assert dim == 0
        if not isinstance(tensors, list):
            return all_gatherv(self, [tensors], dim, sizes)[0]
        return [_gathered(self, tensor, sizes) for tensor in tensors]

    def _gathered(self: Any, tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        assert len(tensor) == sizes[self.rank_in_group]
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded, group=self.device_group)
        return torch.cat([of[:size] for of, size in zip(found, sizes, strict=True)])

    def reduce_scatterv(
        self: Any, tensor: torch.Tensor, dim: int = -1, sizes: Any = None
    ) -> torch.Tensor:
        assert dim == 0 and len(tensor) == sum(sizes)
        summed = tensor.contiguous().clone()
        dist.all_reduce(summed, group=self.device_group)
        return summed.split(sizes)[self.rank_in_group].clone()

    CpuCommunicator.all_gatherv = all_gatherv
    CpuCommunicator.reduce_scatterv = reduce_scatterv


def main(rank: int, folder: Path, name: str) -> None:
    from tests.families.asking import every_cliff, prompts_of
    from tests.families.checkpoints import build
    from tests.families.running import Engine, Judge, close_all
    from vllm_flow.engine.worker.passes import eager_pass, shared_experts

    gather_rows()
    checkpoint = build(name, folder)
    engine = Engine(
        checkpoint,
        1,
        max_num_batched_tokens=16,  # a prompt by itself has steps of image tokens alone
        max_num_seqs=8,
        enable_prefix_caching=True,
        distributed_executor_backend="uni",
    )
    judge, (cliffs, tokens) = Judge(engine), OF_RANK[rank]
    asks = every_cliff(checkpoint, cliffs)
    if rank == 0:
        asks += [replace(prompts_of(checkpoint)[0], stages="0:50% uniform, 2:0")]
    with (
        mock.patch.object(
            shared_experts, "LayerRows", side_effect=shared_experts.LayerRows
        ) as told,
        mock.patch.object(eager_pass, "nobodys_row", side_effect=eager_pass.nobodys_row) as kept_up,
    ):
        alone = every_cliff(checkpoint, [1])[:1]
        judge.assert_exact(alone, engine.run(alone, 2))
        for _ in ("computed", "from the prefix cache"):
            judge.assert_exact(asks, engine.run(asks, tokens))
            engine.check_idle()
    print("STEPS", told.call_count, "KEPT UP", kept_up.call_count)
    close_all()


if __name__ == "__main__":
    prepare(int(sys.argv[1]), int(sys.argv[2]))
    main(int(sys.argv[1]), Path(sys.argv[3]), sys.argv[4])
