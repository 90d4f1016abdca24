"""Prompts or chats, images and videos -> the inputs of EVLM, called as transformers' own processors
are.
"""

from inspect import signature

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BatchFeature, ProcessorMixin

from .chats_evlm import IMAGE, VIDEO, Piece, Rendered, Visual, lay_out, rendered, split_marks
from .pictures_evlm import fitted, is_picture, read_picture, tagged
from .spelling_evlm import Speller


class EVLMProcessor(ProcessorMixin):
    """
    Args:
      tokenizer: of the language model.
      image_size: pixels that the vision tower takes: the side of a square, or height and width.
      mean, std: of the tower, RGB.
      resize: "squash" stretches, "crop" cuts the middle square, "pad" fills the rest with the mean
        colour.
      media_tokens: length of the run that stands for an image.
      image_token_id: of which the run is made.
      template: of chats, "chatml" | "plain" | "own", the tokenizer's.
      turn_start, turn_end: ids around a turn; plain has only the one that ends an answer.
      text_start: ids in front of every prompt, a BOS where the vocabulary has one.
      tiles: most tiles of a picture, each an image of its own behind the whole picture.
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
        tiles=0,
        **kwargs,
    ):
        super().__init__(tokenizer, **kwargs)
        self.chat_template = self.chat_template or tokenizer.chat_template
        self.image_size, self.resize = image_size, resize
        self.mean, self.std = tuple(mean), tuple(std)
        self.media_tokens, self.image_token_id = media_tokens, image_token_id
        self.template, self.text_start = template, list(text_start)
        self.turn_start, self.turn_end, self.tiles = turn_start, turn_end, tiles
        # A copy: what the tokenizer is told elsewhere (truncation, padding) does not change what is
        # spelled here.
        self.spell = Speller(Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str()))

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", "image_groups"]

    def __call__(
        self,
        text=None,
        images=None,
        videos=None,
        text_kwargs=None,
        images_kwargs=None,
        common_kwargs=None,
        **kwargs,
    ):
        """
        Args:
          text: a prompt, as it is; or what `apply_chat_template` gives; or a chat, [{"role":
            "user", "content": "<image>What?"}, ..], which the answer continues; or a list of
            prompts. Each `<image>` of a text takes the next image, each `<video>` the next video.
            What text spells is never a special token.
          images: one, or a list, or a list of lists, one for each prompt; each as
            pictures_evlm.read_picture takes it.
          videos: lists of frames, likewise; or arrays [F, h, w, C].
          kwargs: padding, padding_side, pad_to_multiple_of, truncation, max_length, return_tensors,
            return_assistant_tokens_mask: as `_batch` has them. Others raise TypeError.
        Returns:
          input_ids, attention_mask [B, T], padded on the left; pixel_values [B, I, 3, h, w];
          image_groups [B, I].
        Raises:
          ValueError: other than one mark for each image and video, a text that lost its special
            tokens, a picture that cannot be read, or truncation that would cut an image.
        """
        if text is None:
            raise ValueError(
                "a prompt is missing: give text with a mark <image> for each image, or a chat"
            )
        several = isinstance(text, (list, tuple)) and not (text and isinstance(text[0], dict))
        prompts = [self._pieces(prompt) for prompt in (text if several else [text])]
        if not prompts:
            raise ValueError("a list without prompts")
        queues = {
            mark: self._share(prompts, mark, given)
            for mark, given in ((IMAGE, images), (VIDEO, videos))
        }
        rows = [
            self._row(pieces, {mark: iter(queue[i]) for mark, queue in queues.items()})
            for i, pieces in enumerate(prompts)
        ]
        return self._batch(
            rows,
            **{**(common_kwargs or {}), **(images_kwargs or {}), **(text_kwargs or {}), **kwargs},
        )

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        add_generation_prompt=False,
        continue_final_message=False,
        tokenize=False,
        return_dict=False,
        return_tensors="pt",
        processor_kwargs=None,
        images=None,
        videos=None,
        **kwargs,
    ):
        """A chat, or a list of chats, whose contents are strings with marks or lists of parts; as a
        string with its special tokens, or with `tokenize` as ids, or with `return_dict` as the
        model's inputs. Other arguments are `__call__`'s.

        Raises:
          ValueError: as `__call__`; another template than the one that the model was trained with;
            a message that is not understood.
        """
        if wrong := [name for name in ("tools", "documents") if kwargs.pop(name, None)]:
            raise ValueError(
                f"the model was not trained with {' and '.join(wrong)}: leave them out"
            )
        if chat_template not in (None, self.chat_template):
            raise ValueError(
                "the model was trained with one template of chats: leave chat_template out"
            )
        several = not (conversation and isinstance(conversation[0], dict))
        how = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        chats = [
            self._render(chat, **how) for chat in (conversation if several else [conversation])
        ]
        if not tokenize:
            signature(self._batch).bind([], **kwargs, **(processor_kwargs or {}))  # or TypeError
            return chats if several else chats[0]
        return_tensors = "pt" if return_tensors == "auto" else return_tensors
        kwargs = {
            "images": images,
            "videos": videos,
            "return_tensors": return_tensors,
            **kwargs,
            **(processor_kwargs or {}),
        }
        inputs = self(chats if several else chats[0], **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def _render(self, messages, **how):
        pieces = lay_out(messages, self, **how)
        name = self.tokenizer.convert_ids_to_tokens

        def spell(what):
            return (
                what
                if isinstance(what, str)
                else what.mark
                if isinstance(what, Visual)
                else name(what)
            )

        return rendered(
            "".join([*map(name, self.text_start), *(spell(piece.what) for piece in pieces)]), pieces
        )

    def _pieces(self, prompt):
        """Pieces of a prompt in any form."""
        if isinstance(prompt, (list, tuple)):
            prompt = self._render(prompt, add_generation_prompt=True)
        if isinstance(prompt, Rendered):
            return prompt.pieces
        if not isinstance(prompt, str):
            raise ValueError(
                f"a prompt is a text or a chat, not {type(prompt).__name__}; give text= and images="
                " by name"
            )
        specials = [i for i in (*self.text_start, self.turn_start) if i is not None]
        if start := next(
            (
                name
                for name in self.tokenizer.convert_ids_to_tokens(specials)
                if prompt.startswith(name)
            ),
            None,
        ):
            raise ValueError(
                f"the text begins with {start!r}, whose letters are no special token: give the"
                " chat, or what apply_chat_template returned"
            )
        return [Piece(part) for part in split_marks(prompt)]

    def _share(self, prompts, mark, given):
        """For every prompt a list of the images (videos) that its marks take.

        Raises:
          ValueError: more or fewer of them than marks.
        """

        def open_marks(what):
            return isinstance(what, Visual) and what.mark == mark and what.source is None

        wanted = [sum(open_marks(piece.what) for piece in pieces) for pieces in prompts]
        given, depth = _nested(given)
        depth -= (mark == VIDEO) * (depth > 0)
        if depth == 2:
            lists = given
        else:
            given = ([] if given is None else [given]) if depth == 0 else given
            starts = [sum(wanted[:i]) for i in range(len(wanted))]
            lists = [given[start : start + n] for start, n in zip(starts, wanted)]
            lists[-1] = given[starts[-1] :]
        if [len(one) for one in lists] != wanted:
            counts = (
                [len(one) for one in lists]
                if len(lists) == len(wanted)
                else f"lists for {len(lists)} prompts"
            )
            raise ValueError(f"the prompts have {wanted} marks {mark}, given are {counts}")
        return lists

    def _row(self, pieces, queues):
        """Ids, which of them an assistant says, frames and group numbers of one prompt."""
        ids, told = list(self.text_start), [0] * len(self.text_start)
        frames, numbers, behind = [], [], "nothing"
        for number, (what, said) in enumerate(pieces):
            if isinstance(what, Visual):
                source = next(queues[what.mark]) if what.source is None else what.source
                visual, depth = _nested(source)
                if depth != (what.mark == VIDEO):
                    raise ValueError(
                        "an image is one picture, a video a list of its frames or an array [F, h,"
                        " w, C]: no file of a video"
                    )
                new, said = [], False
                for tag, picture in tagged(visual, self.image_size, self.tiles):
                    new += self.spell(tag, "token") if tag else []
                    new += [self.image_token_id] * self.media_tokens
                    frames.append(self._pixels(picture))
                    numbers.append(number)
            else:
                new = [what] if isinstance(what, int) else self.spell(what, behind)
            behind = "text" if isinstance(what, str) else "token"
            ids, told = ids + new, told + [int(said)] * len(new)
        return ids, told, frames, numbers

    def _pixels(self, picture):
        """[3, h, w], normalised."""
        fill = tuple(round(255 * channel) for channel in self.mean)
        image = fitted(read_picture(picture), self.image_size, self.resize, fill)
        pixels = (
            torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            .reshape(image.height, image.width, 3)
            .permute(2, 0, 1)
        )

        def channel(values):
            return torch.tensor(values)[:, None, None]

        return (pixels / 255 - channel(self.mean)) / channel(self.std)

    def _batch(
        self,
        rows,
        padding=True,
        padding_side="left",
        pad_to_multiple_of=None,
        truncation=False,
        max_length=None,
        return_tensors="pt",
        return_assistant_tokens_mask=False,
    ):
        """
        Args:
          padding: True or "longest", "max_length", or False.
          padding_side: "left", as generation needs it, or "right".
          truncation: keep the first `max_length` tokens.
          return_tensors: "pt", "np", or None for lists.
          return_assistant_tokens_mask: also assistant_masks [B, T], 1 where training learns the
            token.
        """
        if _is_cut(padding, padding_side, truncation, max_length, return_tensors):
            rows = [(*self._cut(ids, told, max_length), *pictures) for ids, told, *pictures in rows]
        length = _length(rows, padding, max_length)
        length += -length % (pad_to_multiple_of or 1)

        def pad(values, filler):
            gap = (
                [] if padding in (False, None, "do_not_pad") else [filler] * (length - len(values))
            )
            return gap + values if padding_side == "left" else values + gap

        data = {"input_ids": [pad(row[0], self.tokenizer.pad_token_id) for row in rows]}
        data["attention_mask"] = [pad([1] * len(row[0]), 0) for row in rows]
        if return_assistant_tokens_mask:
            data["assistant_masks"] = [pad(row[1], 0) for row in rows]
        if return_tensors and len({len(row) for row in data["input_ids"]}) > 1:
            raise ValueError(
                "prompts of several lengths make no tensor: leave padding=False out, or give"
                " return_tensors=None"
            )
        return BatchFeature(data | self._pictures(rows), tensor_type=return_tensors)

    def _pictures(self, rows):
        """pixel_values and image_groups, padded behind the images of each row."""
        count, size = max(len(row[2]) for row in rows), self.image_size
        size = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros((len(rows), count, 3, *size))
        groups = -1 - torch.arange(count).repeat(len(rows), 1)
        for row, (_, _, frames, numbers) in enumerate(rows):
            if frames:
                pixels[row, : len(frames)] = torch.stack(frames)
                groups[row, : len(frames)] = torch.tensor(numbers)
        return {"pixel_values": pixels, "image_groups": groups}

    def _cut(self, ids, told, max_length):
        if self.image_token_id in ids[max_length:]:
            raise ValueError(
                f"max_length = {max_length} of {len(ids)} tokens would cut an image off: give more,"
                " or fewer images"
            )
        return ids[:max_length], told[:max_length]


def _is_cut(padding, padding_side, truncation, max_length, return_tensors):
    """Whether prompts are cut. Raises ValueError for options of `_batch` that do not exist."""
    if return_tensors not in ("pt", "np", None) or padding_side not in ("left", "right"):
        raise ValueError(
            'return_tensors is "pt", "np" or None, padding_side "left" or "right"; not'
            f" {return_tensors}, {padding_side}"
        )
    if truncation not in (True, False, None, "longest_first", "only_first", "do_not_truncate"):
        raise ValueError(f"truncation is True or False, not {truncation!r}")
    if padding not in (True, False, None, "longest", "max_length", "do_not_pad"):
        raise ValueError(f'padding is True, "longest", "max_length" or False, not {padding!r}')
    cut = truncation not in (False, None, "do_not_truncate")
    if (max_length is None) == (cut or padding == "max_length"):
        raise ValueError(
            'max_length goes with truncation=True or padding="max_length", and they with max_length'
        )
    return cut


def _length(rows, padding, max_length):
    """Tokens of a padded row."""
    length = max(len(row[0]) for row in rows)
    if padding != "max_length":
        return length
    if length > max_length:
        raise ValueError(
            f"a prompt has {length} tokens, max_length is {max_length}: give more, or"
            " truncation=True"
        )
    return max_length


def _nested(value):
    """(the value, arrays of pictures as lists; how many lists stand around a picture).

    Lists without any picture are None.
    """
    if value is None or is_picture(value):
        return value, 0
    if (
        not isinstance(value, (list, tuple, np.ndarray, torch.Tensor))
        or getattr(value, "ndim", 4) < 2
    ):
        raise ValueError(
            f"{type(value).__name__} is no picture: give PIL images, arrays, files, or lists of"
            " them"
        )
    parts, depths = zip(*map(_nested, value)) if len(value) else ((), ())
    depths = {depth for part, depth in zip(parts, depths) if part is not None}
    if any(part is None for part in value) or len(depths) > 1:
        raise ValueError(
            "pictures are one, a list, or a list of lists for several prompts; none of them None"
        )
    return (
        ([[] if part is None else part for part in parts], 1 + depths.pop())
        if depths
        else (None, 0)
    )
