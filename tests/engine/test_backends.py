"""Backends whose builders hand out one metadata at a time are refused, and still do so in this vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import vllm
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.utils import AttentionGroup

from vllm_flow.engine import backends

FOLDER = Path(vllm.__file__).parent / "v1" / "attention" / "backends"


def group(name: str, kernel_block_size: int | None = None) -> list[list[SimpleNamespace]]:
    latent = name.endswith("MLA")
    backend = type(
        "SomeBackend",
        (),
        {"get_name": staticmethod(lambda: name), "is_mla": staticmethod(lambda: latent)},
    )
    return [[SimpleNamespace(backend=backend, kernel_block_size=kernel_block_size)]]


@pytest.mark.parametrize("name", sorted(backends.ONE_AT_A_TIME))
def test_they_are_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"backend {name}, which .* --attention-backend FLASH_ATTN"
    ):
        backends.check(group(name))
    assert name in AttentionBackendEnum.__members__, "renamed upstream"


@pytest.mark.parametrize(
    "name",
    [
        "CPU_ATTN",
        "FLASH_ATTN",
        "TRITON_ATTN",
        "TRITON_FLASH_ATTN",
        "CPU_MLA",
        "FLASHINFER",
        "TRITON_FLASHINFER",
    ],
)
def test_others_are_not(name: str) -> None:
    backends.check(group(name))


LATENT = sorted(
    name
    for name, found in AttentionBackendEnum.__members__.items()
    if name.endswith("MLA") and "CUSTOM" not in name
)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_is_tested_on_a_cpu_alone(name: str) -> None:
    if name in backends.TESTED_LATENT:
        backends.check(group(name))
        return
    with pytest.raises(ValueError, match=f"with CPU_MLA, .* has {name}: set untested_models"):
        backends.check(group(name))
    backends.check(group(name), untested=True)


def test_divided_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="FLASH_ATTN where its kernels divide .*--block-size 64"):
        backends.check(group("FLASH_ATTN", 64))
    one = AttentionGroup(None, [], None, 0)  # what vLLM's own say
    assert one.kernel_block_size is None and hasattr(one, "kernel_block_table")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("flashinfer.py", "self._prefill_wrapper is None"),  # one of all prefills
        (
            "flashinfer.py",
            "cum_seq_lens_kv=paged_kv_indptr_prefill_gpu",
        ),  # of the builder's, without a plan
        ("flashinfer.py", "self.enable_cuda_graph\n"),
        ("flashinfer.py", "self.use_trtllm_decode_attention = "),
        ("flashinfer.py", "self.global_hyperparameters = "),
        ("../../worker/gpu/attn_utils.py", "set_workspace_buffer(attn_backend_workspace)"),
        ("composite.py", "def _builders(self)"),
    ],
)
def test_flashinfers_builder_is_as_variants_need_it(file: str, text: str) -> None:
    """See :mod:`vllm_flow.engine.worker.variant_builders`."""
    assert text in (FOLDER / file).read_text()


@pytest.mark.parametrize(
    ("file", "memory"),
    [
        ("flex_attention.py", "seq_lens=self.persistent_seq_lens"),
    ],
)
def test_the_reason_still_holds(file: str, memory: str) -> None:
    """Once it does not, the refusal can go."""
    assert memory in (FOLDER / file).read_text()
