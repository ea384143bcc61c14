"""The code that checkpoints of Phi-3-vision and Phi-4-multimodal bring in the tests: ours, as small as vLLM allows."""

CONFIGURATION = '''
from transformers import Phi3Config


class {name}Config(Phi3Config):
    """Phi-3's, and whatever else is in the file."""

    model_type = "{kind}"
'''

PROCESSING = """
from types import SimpleNamespace

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor


class {name}Processor(ProcessorMixin):
    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"
    img_tokens = [f"<|image_{{number}}|>" for number in range(1, 9)]

    def __init__(self, image_processor=None, tokenizer=None, **others):
        super().__init__(image_processor, tokenizer)
        self.audio_processor = SimpleNamespace(sampling_rate=16000)

    def calc_num_image_tokens_from_image_size(self, width, height):
        rows, columns = self.image_processor.tiles(width, height)
        return 12 * rows * (12 * columns + 1) + 1 + 12 * 13

    def __call__(self, text=None, images=None, **others):
        return self.image_processor.preprocess(images)


class {name}ImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]
    dynamic_hd = 1

    def __init__(self, side=336, **others):
        super().__init__(**others)
        self.side = side

    def _pixels(self, image, width, height):
        image = image.convert("RGB").resize((width, height))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

    def _fitting(self, image, width, height):
        ratio = min(width / image.width, height / image.height)
        return int(image.width * ratio), int(image.height * ratio)

    def _padded(self, image, width, height):
        inner_width, inner_height = self._fitting(image, width, height)
        padded = torch.ones(3, height, width)
        padded[:, :inner_height, :inner_width] = self._pixels(image, inner_width, inner_height)
        return padded

{rest}"""

PHI3 = """
    def tiles(self, width, height):
        return (1, 2) if width >= 2 * height else (2, 1) if height >= 2 * width else (1, 1)

    def preprocess(self, images, **others):
        parts, sizes, side = [], [], self.side
        for image in images:
            rows, columns = self.tiles(*image.size)
            whole = self._padded(image, columns * side, rows * side)
            tiles = [
                whole[:, side * row : side * (row + 1), side * column : side * (column + 1)]
                for row in range(rows)
                for column in range(columns)
            ]
            tiles += [torch.zeros(3, side, side)] * (2 - len(tiles))
            parts.append(torch.stack([self._pixels(image, side, side), *tiles]))
            sizes.append([rows * side, columns * side])
        found = {"pixel_values": torch.stack(parts), "image_sizes": torch.tensor(sizes)}
        return BatchFeature(found)
"""

PHI4 = """
    def preprocess(self, images, **others):
        found = {"input_image_embeds": [], "image_attention_mask": [], "image_sizes": []}
        side, patch = self.side, 14
        for image in images:
            width, height = self._fitting(image, side, side)
            tile = self._padded(image, side, side)
            mask = torch.zeros(side // patch, side // patch)
            mask[: len(mask) - (side - height) // patch, : len(mask) - (side - width) // patch] = 1
            whole = self._pixels(image, side, side)
            found["input_image_embeds"].append(torch.stack([whole, tile]))
            found["image_attention_mask"].append(torch.stack([torch.ones_like(mask), mask]))
            found["image_sizes"].append([side, side])
        stacked = {name: torch.stack(found[name]) for name in list(found)[:2]}
        return BatchFeature(stacked | {"image_sizes": torch.tensor(found["image_sizes"])})
"""
