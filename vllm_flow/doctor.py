"""Says what is installed and whether vLLM would serve with the extension; with a model, whether that one.

Reads what is installed; with --probe or --model it also imports vLLM and asks it, which takes 15 seconds of
processor time. Starts no engine and loads no weights. Exit status 1 where serving would not work, with the
reason.

    vllm-flow doctor
    vllm-flow doctor --probe
    vllm-flow doctor --model llava-hf/llava-1.5-7b-hf --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict

from vllm_flow.demo_model.naming import resolve_model
from vllm_flow.engine.diagnosis import Diagnosis, diagnose
from vllm_flow.engine.process import hush
from vllm_flow.exits import CommandError
from vllm_flow.model_names import UnreadModel
from vllm_flow.remote_code import add_option as add_trust
from vllm_flow.unread_options import refuse_unread

WIDTH = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "--probe", action="store_true", help="import vLLM: its device, model runner and attention"
    )
    parser.add_argument("--model", help="the same, for this model: a folder, a hub name, or demo")
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print an object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 1 where serving would not work."""
    # vLLM logs how it comes to its choices, which would drown what is said here.
    hush()
    if args.model is None:
        refuse_unread(args, ("trust_remote_code",), "without --model")
    try:
        model = None if args.model is None else resolve_model(args.model)
    except UnreadModel as error:
        raise CommandError(str(error)) from error
    found = diagnose(model, probe=args.probe, trust_remote_code=args.trust_remote_code)
    if args.json:
        print(json.dumps({"serves": not found.problems, **asdict(found)}, indent=2))
    else:
        print("\n".join(lines(found)))
    return 1 if found.problems else 0


def lines(found: Diagnosis) -> Iterator[str]:
    """The diagnosis as it is printed."""
    yield ", ".join(f"{name} {version}" for name, version in found.versions.items())
    yield ""
    for finding in found.findings:
        text = " ".join(finding.text.split())  # of foreign errors, which may have many lines
        yield f"{'PROBLEM' if finding.problem else 'ok':9}{finding.topic:{WIDTH}}{text}"
    yield ""
    if found.problems:
        first = found.problems[0]
        yield f"Serving would not work: {first.topic}: {' '.join(first.text.split())}"
    elif found.probed:
        yield "Serving with vLLM-Flow works here, as far as can be seen without starting it."
    else:
        yield "Nothing is in the way of serving with vLLM-Flow; --probe imports vLLM and asks it."
