"""The code that a checkpoint of Molmo 2 brings in the tests: ours, as small as vLLM allows.

vLLM writes a picture's tokens itself, by the attributes that the processors have: what they give is pixels, and
which patches become which token.
"""

CONFIGURATION = '''
from transformers import PretrainedConfig


class Molmo2TextConfig(PretrainedConfig):
    """Whatever is in the file."""

    model_type = "molmo2_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]


class Molmo2Config(PretrainedConfig):
    """Text, tower, and what is between them."""

    model_type = "molmo2"
    sub_configs = {"text_config": Molmo2TextConfig}

    def __init__(self, text_config=None, vit_config=None, adapter_config=None, **others):
        self.text_config = Molmo2TextConfig(**(text_config or {}))
        self.vit_config = PretrainedConfig(**(vit_config or {}))
        self.adapter_config = PretrainedConfig(**(adapter_config or {}))
        super().__init__(**others)
'''

PROCESSING = '''
import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from vllm.model_executor.models.molmo2 import select_tiling

SIDE, PATCH = 56, 14


def patches(pixels):
    """Of a square, [patches, pixels of one]."""
    pixels = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 127.5 - 1
    return torch.nn.functional.unfold(pixels[None], PATCH, stride=PATCH)[0].T


def pooled(places, rows, columns):
    """Places of patches [high, wide] -> those that become a token [tokens, rows * columns], and tokens high and
    wide; -1 where a token at an edge has fewer."""
    high, wide = places.shape
    more = (0, -wide % columns, 0, -high % rows)
    places = torch.nn.functional.pad(places, more, value=-1)
    places = places.unfold(0, rows, rows).unfold(1, columns, columns)
    return places.flatten(2).flatten(0, 1), places.shape[:2]


class Molmo2ImageProcessor(BaseImageProcessor):
    """The picture whole, then tiles that do not overlap, 4 x 4 patches each."""

    model_input_names = ["pixel_values"]
    max_crops = 2
    overlap_margins = (0, 0)
    patch_size = PATCH
    size = {"height": SIDE, "width": SIDE}
    pooling_size = [2, 2]

    def preprocess(self, images, **others):
        crops, places, grids, counts = [], [], [], []
        each = SIDE // PATCH
        for image in images:
            image = image.convert("RGB")
            rows, columns = map(int, select_tiling(
                height=image.height, width=image.width, patch_size=SIDE, max_num_patches=self.max_crops
            ))
            crops.append(patches(image.resize((SIDE, SIDE))))
            whole = image.resize((columns * SIDE, rows * SIDE))
            for top in range(0, rows * SIDE, SIDE):
                for left in range(0, columns * SIDE, SIDE):
                    crops.append(patches(whole.crop((left, top, left + SIDE, top + SIDE))))
            counts.append(1 + rows * columns)
            small, of_small = pooled(torch.arange(each**2).view(each, each), *self.pooling_size)
            tiles = torch.arange(each**2, counts[-1] * each**2).view(rows, columns, each, each)
            large, of_large = pooled(tiles.transpose(1, 2).reshape(rows * each, -1), *self.pooling_size)
            places += [small, large]
            grids.append([*of_small, *of_large])
        return dict(
            pixel_values=torch.stack(crops),
            image_token_pooling=torch.cat(places),
            image_grids=torch.tensor(grids),
            image_num_crops=torch.tensor(counts),
        )


class VideoProcessor:
    """Four patches high and wide a frame, of which three by three become a token: four of them, of which three lie
    at an edge."""

    patch_size = PATCH
    size = {"height": SIDE, "width": SIDE}
    pooling_size = [3, 3]
    num_frames = 4
    frame_sample_mode = "uniform_last_frame"
    max_fps = sampling_fps = 2

    def preprocess(self, frames):
        from PIL import Image

        each = SIDE // PATCH
        shown = [Image.fromarray(frame).convert("RGB").resize((SIDE, SIDE)) for frame in frames]
        own, grid = pooled(torch.arange(each**2).view(each, each), *self.pooling_size)
        places = [torch.where(own < 0, own, own + number * each**2) for number in range(len(shown))]
        return dict(
            pixel_values_videos=torch.stack([patches(frame) for frame in shown]),
            video_token_pooling=torch.cat(places),
            video_grids=torch.tensor([[len(shown), *grid]]),
        )


class Molmo2Processor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    image_use_col_tokens = True
    use_single_crop_col_tokens = False
    use_single_crop_start_token = True
    video_use_col_tokens = False
    use_frame_special_tokens = True

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)
        self.video_processor = VideoProcessor()

    def __call__(self, text=None, images=None, videos=None, **others):
        found = {"input_ids": torch.tensor([self.tokenizer.encode(text, add_special_tokens=False)])}
        if images is not None:
            found |= self.image_processor.preprocess(images)
        if videos is not None:
            ((frames,),) = videos
            found |= self.video_processor.preprocess(frames)
        return BatchFeature(found)
'''
