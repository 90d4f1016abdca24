"""Text with `<image>` and `<video>` marks, images and videos -> the inputs of EVLM."""

import re

import torch
from PIL import Image, ImageOps
from transformers import BatchFeature, ProcessorMixin


class EVLMProcessor(ProcessorMixin):
    """
    Args:
      tokenizer: of the language model.
      image_size: pixels of the square that the vision tower takes.
      mean, std: of the tower, RGB.
      resize: "squash" stretches, "crop" cuts the middle square, "pad" fills the rest with the mean colour.
      media_tokens: length of the run that stands for an image.
      image_token_id: of which the run is made.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self, tokenizer=None, image_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash", media_tokens=16, image_token_id=0, **kwargs
    ):
        super().__init__(tokenizer, **kwargs)
        self.image_size, self.mean, self.std, self.resize = image_size, tuple(mean), tuple(std), resize
        self.media_tokens, self.image_token_id = media_tokens, image_token_id

    def __call__(self, text, images=(), videos=(), return_tensors="pt"):
        """
        Args:
          text: one prompt, or a list of prompts; each `<image>` takes the next image, each `<video>` the next video.
          images: PIL images of the prompt; for several prompts a list for each.
          videos: lists of PIL frames, likewise.
        Returns:
          input_ids, attention_mask [B, T], padded on the left; pixel_values [B, I, 3, h, w]; image_groups [B, I].
        Raises:
          ValueError: other than one mark for each image and video.
        """
        several = not isinstance(text, str)
        prompts = list(text) if several else [text]
        images, videos = (list(a) if several and len(a) else [list(a)] * len(prompts) for a in (images, videos))
        rows = [self._row(*row) for row in zip(prompts, images, videos, strict=True)]
        length, count = max(len(ids) for ids, _, _ in rows), max(len(frames) for _, frames, _ in rows)
        size = (3, self.image_size, self.image_size)
        input_ids, mask = torch.zeros((2, len(rows), length), dtype=torch.long)
        pixels, groups = torch.zeros((len(rows), count, *size)), -1 - torch.arange(count).repeat(len(rows), 1)
        for row, (ids, frames, numbers) in enumerate(rows):
            input_ids[row, length - len(ids) :], mask[row, length - len(ids) :] = torch.tensor(ids), 1
            if frames:
                pixels[row, : len(frames)], groups[row, : len(frames)] = torch.stack(frames), torch.tensor(numbers)
        data = {"input_ids": input_ids, "attention_mask": mask, "pixel_values": pixels, "image_groups": groups}
        return BatchFeature(data, tensor_type=return_tensors)

    def _row(self, text, images, videos):
        """Ids, frames and group numbers of one prompt."""
        visuals = {"<image>": iter([[image] for image in images]), "<video>": iter(videos)}
        if (found := [text.count(mark) for mark in visuals]) != [len(images), len(videos)]:
            raise ValueError(
                f"the text has {found[0]} <image> and {found[1]} <video>, given are {len(images)} images, {len(videos)} videos"
            )
        ids, frames, numbers = [], [], []
        for number, part in enumerate(re.split("(<image>|<video>)", text)):
            if part not in visuals:
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"] if part else []
                continue
            for frame in next(visuals[part]):
                ids += [self.image_token_id] * self.media_tokens
                frames.append(self._pixels(frame))
                numbers.append(number)
        return ids, frames, numbers

    def _pixels(self, image):
        """[3, h, w], normalised; transparency lies over white."""
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
        image, square, how = image.convert("RGB"), (self.image_size, self.image_size), Image.Resampling.BICUBIC
        if self.resize == "squash":
            image = image.resize(square, how)
        elif self.resize == "crop":
            image = ImageOps.fit(image, square, how)
        else:
            image = ImageOps.pad(image, square, how, color=tuple(round(255 * channel) for channel in self.mean))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(*square, 3).permute(2, 0, 1)
        channel = lambda values: torch.tensor(values)[:, None, None]
        return (pixels / 255 - channel(self.mean)) / channel(self.std)
