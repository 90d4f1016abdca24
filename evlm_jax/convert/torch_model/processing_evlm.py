"""Text or chats with `<image>` and `<video>` marks, images and videos -> the inputs of EVLM."""

import re

import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from transformers import BatchFeature, ProcessorMixin

from .spelling_evlm import Speller


class EVLMProcessor(ProcessorMixin):
    """
    Args:
      tokenizer: of the language model.
      image_size: pixels of the square that the vision tower takes.
      mean, std: of the tower, RGB.
      resize: "squash" stretches, "crop" cuts the middle square, "pad" fills the rest with the mean colour.
      media_tokens: length of the run that stands for an image.
      image_token_id: of which the run is made.
      template: of chats, "chatml" | "plain".
      turn_start, turn_end: ids around a turn; plain has only the one that ends an answer.
      text_start: ids in front of every prompt, a BOS where the vocabulary has one.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer=None,
        image_size=224,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        resize="squash",
        media_tokens=16,
        image_token_id=0,
        template="plain",
        turn_start=None,
        turn_end=None,
        text_start=(),
        **kwargs,
    ):
        super().__init__(tokenizer, **kwargs)
        self.image_size, self.mean, self.std, self.resize = image_size, tuple(mean), tuple(std), resize
        self.media_tokens, self.image_token_id = media_tokens, image_token_id
        self.template, self.turn_start, self.turn_end, self.text_start = template, turn_start, turn_end, list(text_start)
        # A copy: what the tokenizer is told elsewhere (truncation, padding) does not change what is spelled here.
        self.spell = Speller(Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()))

    def __call__(self, text, images=(), videos=(), return_tensors="pt"):
        """
        Args:
          text: a string, as it is; or a chat, [{"role": "user", "content": "<image>What is this?"}, ...], which the answer continues; or a
            list of prompts, all of one kind. Each `<image>` takes the next image, each `<video>` the next video. What text spells is
            never a special token.
          images: PIL images of the prompt; for several prompts a list for each.
          videos: lists of PIL frames, likewise.
        Returns:
          input_ids, attention_mask [B, T], padded on the left; pixel_values [B, I, 3, h, w]; image_groups [B, I].
        Raises:
          ValueError: other than one mark for each image and video.
        """
        several = not (isinstance(text, str) or isinstance(text[0], dict))
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
        pieces = [text] if isinstance(text, str) else self._chat(text)
        visuals = {"<image>": iter([[image] for image in images]), "<video>": iter(videos)}
        found = [sum(piece.count(mark) for piece in pieces if isinstance(piece, str)) for mark in visuals]
        if found != [len(images), len(videos)]:
            raise ValueError(
                f"the text has {found[0]} <image> and {found[1]} <video>, given are {len(images)} images, {len(videos)} videos"
            )
        ids, frames, numbers, behind = list(self.text_start), [], [], "nothing"
        parts = (part for piece in pieces for part in (re.split("(<image>|<video>)", piece) if isinstance(piece, str) else [piece]))
        for number, part in enumerate(parts):
            if part not in visuals:
                ids += [part] if isinstance(part, int) else self.spell(part, behind)
                behind = "token" if isinstance(part, int) else "text" if part else behind
                continue
            behind = "token"
            for frame in next(visuals[part]):
                ids += [self.image_token_id] * self.media_tokens
                frames.append(self._pixels(frame))
                numbers.append(number)
        return ids, frames, numbers

    def _chat(self, messages):
        """Texts, and ids of special tokens, of a chat up to where the answer begins."""
        pieces = []
        for i, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role not in ("user", "assistant"):
                raise ValueError(f"unknown role {role!r}; use user or assistant")
            if self.template == "chatml":
                said = [f"user\n{content}"] if role == "user" else ["assistant\n", content]
                pieces += ["\n"] * (i > 0) + [self.turn_start, *said, self.turn_end]
            else:
                pieces += [f"{content} Answer:"] if role == "user" else [" " * (i > 0) + content, self.turn_end]
        return pieces + (["\n", self.turn_start, "assistant\n"] if self.template == "chatml" else [])

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
