"""LLaVA-CAM of an answer: which patches of the picture raise its logits, seen at each layer.

Writes heat maps (cam.npz), overlays (overlays.png, .svg) and numbers (cam.csv); with --box also how
much of the heat is inside it by layer (convergence.png, .svg). `--model demo` is the embedded model.
Models that see the picture as tiles beside the picture whole get a second map of the latter, in files
named ..._whole; `vllm-flow models` says which families are read.

The picture is read as vLLM's server reads it: turned as its EXIF data says, what is transparent on white
(--background), one sentence where the server would refuse it. --box counts in the picture as shown.

A gradient-weighted view: it says what would raise the logit, not what the model needs. To see what
it needs, take the image away from a layer on (`vllm-flow demo`).

    python -m vllm_flow.demo_model.datasets --out data --tasks pope
    vllm-flow cam --image $(ls data/pope/val2014/*.jpg | head -1) --prompt "What is in this picture?" --layers 0:28:4
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_flow.analysis.cam_names import DEFAULT_HOOK, DTYPES, HOOKS
from vllm_flow.counts import counted
from vllm_flow.options import count, not_negative, positive, seed
from vllm_flow.pictures import WHITE, Colour, checked_background, read_picture
from vllm_flow.unread_options import refuse_unread
from vllm_flow.user_text import whole_number, whole_numbers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    from vllm_flow.analysis.cam_file import CamRecord
    from vllm_flow.analysis.vlm import Vlm


def layer_numbers(text: str) -> tuple[int, ...] | None:
    """`all` (None), `0,4,8`, or `0:30:2` with the last layer included, in order, each once."""
    if text == "all":
        return None
    found = whole_numbers(text)
    if not found:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of: all, a list like 0,4,8, a range like 0:30:2"
        )
    return found


def box_corners(text: str) -> tuple[float, float, float, float]:
    """`left,top,right,bottom` in the picture's pixels."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
        if not all(map(math.isfinite, (left, top, right, bottom))):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not left,top,right,bottom in pixels"
        ) from None
    return left, top, right, bottom


def spoken(text: str) -> str:
    """A text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; write a question")
    return text


def device(text: str) -> str:
    """`cpu`, `cuda` or `cuda:1`, and a device that is there."""
    name, colon, number = text.partition(":")
    if name not in ("cpu", "cuda") or (colon and whole_number(number) is None):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: write cpu, cuda or cuda:1")
    if name == "cuda":
        import torch

        there = torch.cuda.device_count()
        if int(number or 0) >= there:
            raise argparse.ArgumentTypeError(
                f"{text!r}: torch sees {counted(there, 'CUDA device')} here; leave --device out"
            )
    return text


def colour(text: str) -> Colour:
    """`red,green,blue`, each from 0 to 255."""
    try:
        return checked_background([whole_number(part) for part in text.split(",")])
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no colour: write red,green,blue, each from 0 to 255"
        ) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``vllm-flow cam``."""
    add = parser.add_argument
    add("--model", default="demo", help="folder, hub name, or demo (default)")
    add("--image", type=Path, required=True, help="the picture")
    add(
        "--prompt",
        type=spoken,
        required=True,
        help="the question, or the whole prompt with the image token",
    )
    add("--answer", help="the answer to explain (default: the model's own, greedy)")
    add("--word", help="explain this word of the answer only (default: the whole answer)")
    add("--layers", type=layer_numbers, default=None, help="all (default), 0,4,8 or 0:30:2")
    add("--samples", type=count, default=8, help="noisy copies (default 8); 0: the picture itself")
    add("--sigma", type=not_negative, default=0.1, help="noise, as a share of the pixels' range")
    add("--seed", type=seed, default=0, help="of the noise")
    add("--hook", choices=HOOKS, default=DEFAULT_HOOK, help="which features (default %(default)s)")
    add(
        "--box",
        type=box_corners,
        help="left,top,right,bottom in pixels of the picture as shown, EXIF orientation applied",
    )
    add(
        "--background",
        type=colour,
        default=WHITE,
        metavar="R,G,B",
        help="behind transparent pixels, as a server's rgba_background_color (default: white)",
    )
    add("--max-tokens", type=positive, default=32, help="longest answer of the model's own")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", type=device, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--batch", type=positive, default=4, help="copies at a time; less saves memory")
    add(
        "--checkpointing",
        action="store_true",
        help="keep one hidden state per layer and run each layer twice: slower, less memory",
    )
    add("--out", type=Path, default=Path("out/cam"), help="where results go (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Load, explain, write, say where; the exit status."""
    from vllm_flow.exits import Refused
    from vllm_flow.outputs import check_folder

    if not args.samples:
        refuse_unread(args, ("sigma", "seed", "batch"), "with --samples 0, which makes no copies")
    if args.answer is not None:
        refuse_unread(args, ("max_tokens",), "with --answer")
    check_folder(args.out)
    from vllm_flow.analysis.loading import load
    from vllm_flow.analysis.maps import check_box

    try:
        image = read_picture(args.image, args.background)
        if args.box is not None:
            check_box(args.box, image.size)
    except ValueError as error:  # before the model is loaded
        raise Refused(str(error)) from error
    vlm = load(args.model, args.dtype, args.device)
    try:
        records = explain(vlm, args, image)
    except ValueError as error:
        raise Refused(str(error)) from error
    record = records[0]
    print(f"answer: {record.answer}")
    if len(record.explained) < len(record.answer_tokens):
        print(f"explained: {record.word}")
    for each in records:
        for path in write(each, args.out):
            print(f"  {path}")
    return 0


def explain(vlm: Vlm, args: argparse.Namespace, image: Image) -> list[CamRecord]:
    """The CAM of `image` that the arguments ask for: a record per part in which the model sees it."""
    import numpy as np

    from vllm_flow.analysis.cam import Settings, heat_maps
    from vllm_flow.analysis.cam_file import CamRecord
    from vllm_flow.analysis.vlm import tokens_of

    settings = Settings(
        layers=args.layers or tuple(range(len(vlm.layers))),
        samples=args.samples,
        sigma=args.sigma,
        seed=args.seed,
        hook=args.hook,
        batch=args.batch,
        checkpointing=args.checkpointing,
    )
    prompt = vlm.prompt(args.prompt)
    encoded = vlm.encode(prompt, image)
    if args.answer is None:
        answer = vlm.generate(encoded, args.max_tokens)
        if not answer:
            raise ValueError("the model's answer is empty: give one with --answer")
    else:
        answer = vlm.answer_ids(prompt, args.answer)
    words = vlm.words(answer)
    explained = list(range(len(answer))) if args.word is None else tokens_of(words, args.word)
    masks = None if args.box is None else vlm.box_in_views(args.box, image)
    heats, views = heat_maps(vlm, encoded, answer, settings, explained), vlm.views(encoded)
    return [
        CamRecord(
            model=args.model,
            prompt=prompt,
            answer_tokens=tuple(words),
            answer_ids=tuple(answer),
            explained=tuple(explained),
            layers=settings.layers,
            heat=heats[number],
            view=np.asarray(views[number]),
            hook=settings.hook,
            samples=settings.samples,
            sigma=settings.sigma,
            seed=settings.seed,
            coverage=None if masks is None else part.shares(masks[number]),
            box=None if masks is None else corners(masks[number]),
            part=part.name,
        )
        for number, part in enumerate(encoded.parts)
    ]


def corners(mask: NDArray[np.float64]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of what is set in a mask [H, W]; None where nothing is."""
    if mask.max() == 0:
        return None
    rows, columns = (mask > min(0.5, mask.max() / 2)).nonzero()  # small boxes fade in a thumbnail
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


def write(record: CamRecord, out: Path) -> list[Path]:
    """Write every result; return the paths."""
    from vllm_flow.analysis.cam_file import write_rows
    from vllm_flow.analysis.figure_cam import draw_convergence, draw_overlays

    end = f"_{record.part}" if record.part else ""
    paths = [record.save(out / f"cam{end}.npz"), write_rows(record.rows(), out / f"cam{end}.csv")]
    paths += draw_overlays([record], out / f"overlays{end}")
    if record.box is not None:
        paths += draw_convergence(record, out / f"convergence{end}")
    return paths
