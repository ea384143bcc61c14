"""Runs of the profile that go by one name: each a few command lines, named too."""

from __future__ import annotations

PARTS = ("prefill", "load", "capacity", "decode", "peers")
POLICIES = "baseline,cliff=2,cliff=L/4,cliff=L/2"
"""Measured where none are named."""
TINY_LLAMA = "layers=22,hidden=2048,heads=32,kv_heads=4,mlp=5632"

_LLAVA_16 = "--shape layers=16,hidden=1024,heads=16,kv_heads=16,mlp=2816 --block-size 32"

_SHAPE_7B = "layers=32,hidden=4096,heads=32,kv_heads=32,mlp=11008"
_AS_SERVED = "--execution default --prefix-caching --rounds 3 --kv-cache-gib 18 --block-size 16"
_LLAVA_7B = f"--shape {_SHAPE_7B} {_AS_SERVED}"
_CUDA_POLICIES = "baseline,cliff=2,cliff=L/4,cliff=L/2,0:1/4 uniform"

PRESETS: dict[str, tuple[tuple[str, str], ...]] = {
    # Sized for 15 to 20 minutes on two cores.
    "cpu": (
        (
            "llava-16",
            f"{_LLAVA_16} --parts prefill,load --rounds 2 --batch 4 --requests 2,8,32 "
            "--kv-cache-gib 1.25 --ttft-ms 20000 --tpot-ms 1000",
        ),
        ("capacity", f"{_LLAVA_16} --parts capacity --kv-cache-gib 0.5"),
        (
            "decode",
            f"{_LLAVA_16} --parts decode --decode-image-tokens 576,2880 --decode-batch 2 "
            "--policies baseline,cliff=2,cliff=L/4 --rounds 2 --output-tokens 24 --kv-cache-gib 1",
        ),
        (
            "tinyllama-22",
            f"--shape {TINY_LLAMA} --parts prefill --batch 1 --rounds 2 --group-layers 2 "
            "--block-size 32 --kv-cache-gib 0.25",
        ),
        # float32, so that greedy tokens of two libraries can be compared.
        ("peers", f"{_LLAVA_16} --parts peers --rounds 1 --dtype float32 --kv-cache-gib 1"),
    ),
    # As many image tokens as a short video has; prefill takes most of its minutes.
    "long": (
        (
            "decode-10k",
            f"{_LLAVA_16} --parts decode --decode-image-tokens 10368 --decode-batch 1 "
            "--policies baseline,cliff=2,cliff=L/4 --rounds 2 --output-tokens 24 --kv-cache-gib 1",
        ),
    ),
    # What an operator runs: both engines compiled. What requests without a policy pay shows here, in as many rounds
    # as an interval of a ratio close to 1 needs.
    "default": (
        (
            "default",
            "--shape layers=8,hidden=512,heads=8,kv_heads=8,mlp=1408 --block-size 32 "
            "--execution default --prefix-caching --parts prefill,decode --policies baseline,cliff=2,cliff=L/2 "
            "--rounds 15 --batch 4 --decode-batch 4 --output-tokens 48 --kv-cache-gib 0.5",
        ),
    ),
    # On a CUDA device with 80 GB, each a few minutes: LLaVA-1.5-7B's shape, then LLaVA-1.6's image length.
    "cuda": (
        (
            "llava-7b",
            f"{_LLAVA_7B} --parts prefill,load,decode --concurrency 1,64 --requests 8,128 "
            "--decode-image-tokens 576,2880 --decode-batch 8 --ttft-ms 1000 --tpot-ms 60 "
            f"--policies '{_CUDA_POLICIES}'",
        ),
        # What requests without a policy pay, in as many rounds as an interval needs.
        (
            "llava-7b-baseline",
            f"{_LLAVA_7B} --parts prefill,load,decode --concurrency 64 --requests 128 --decode-batch 8 "
            "--rounds 15 --policies baseline",
        ),
        # The same with LLaVA-1.5's own tower, whose time nothing saves.
        (
            "llava-7b-tower",
            f"--shape {_SHAPE_7B},tower_layers=24,tower_hidden=1024 {_AS_SERVED} --parts load "
            "--concurrency 64 --requests 128 --policies baseline,cliff=2,cliff=L/2",
        ),
        (
            "llava-7b-2880",
            f"{_LLAVA_7B} --parts prefill,load,capacity --image-tokens 2880 --batch 4 "
            f"--concurrency 1,16 --requests 4,32 --policies '{_CUDA_POLICIES}'",
        ),
    ),
    # A minute for continuous integration: no figures to quote, only gross regressions. In float32, since older
    # processors emulate bfloat16.
    "guard": (
        (
            "guard",
            "--shape layers=8,hidden=256,heads=4,kv_heads=4,mlp=704,image_tokens=576,vocab=500 "
            "--parts prefill,load,capacity --policies baseline,cliff=2 --concurrency 4 --requests 8 "
            "--rounds 3 --batch 4 --block-size 32 --kv-cache-gib 0.05 --dtype float32 --guard",
        ),
    ),
    "quick": (
        (
            "quick",
            "--shape layers=8,hidden=256,heads=4,kv_heads=4,mlp=704,image_tokens=144,vocab=2000 "
            f"--parts {','.join(PARTS)} --concurrency 1,4 --requests 2,8 --rounds 2 --batch 4 "
            "--decode-image-tokens 144,720 --kv-cache-gib 0.05",
        ),
    ),
}
