"""Requests -> ids, pixels and groups, by the export's own processor.

A prompt has one mark for each image or video, an id beyond the vocabulary, until the pictures are
there and it is known how many media tokens stand in its place.
"""

import struct
import zlib
from collections.abc import Mapping
from contextlib import contextmanager
from uuid import uuid4

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.inputs.engine import MultiModalEncDecInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo
from vllm.multimodal.processing.dummy_inputs import BaseDummyInputsBuilder
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer

KINDS = ("image", "video")
DAMAGE = (SyntaxError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)
PICTURES = "image"  # the one modality of all pictures of a request: vLLM has one for an encoder


def marks(vocab: int) -> dict[str, int]:
    """{kind: the id that stands for one of it}."""
    return {kind: vocab + number for number, kind in enumerate(KINDS)}


def visual_tokens(config) -> int:
    """Keys of one picture."""
    vit = config.vit
    size = vit["image_size"]
    down, across = (size, size) if isinstance(size, int) else size
    patches = (down // vit["patch"]) * (across // vit["patch"])
    return patches + vit["class_token"] + vit["registers"]


@contextmanager
def refusing_damage():
    """Damaged files make the decoders raise errors of these kinds, for which vLLM blames itself."""
    try:
        yield
    except DAMAGE as error:
        raise ValueError(f"cannot read a picture: {error}") from error


class EVLMRenderer(HfRenderer):
    """Chats and texts -> ids with marks, as the export's processor spells them: what a user
    spells is never a special token.
    """

    @property
    def processor(self):
        """Of the export. Raises ValueError where it cuts pictures into tiles."""
        found = self.get_mm_processor().info.get_hf_processor()
        if getattr(found, "tiles", 0):  # exports before tiles have none
            raise ValueError(
                f"data.tiles = {found.tiles}: vLLM is not told of tiles; use `evlm chat`"
            )
        return found

    def _ids(self, prompt) -> list[int]:
        """Ids with marks; `prompt` is a text or what the processor's template gave."""
        processor, behind = self.processor, "nothing"
        mark = marks(self.model_config.get_vocab_size())
        ids = list(processor.text_start)
        for what, _ in processor._pieces(prompt):
            is_text = isinstance(what, str)
            if is_text:
                ids += processor.spell(what, behind)
            else:
                ids.append(what if isinstance(what, int) else mark[what.mark.strip("<>")])
            behind = "text" if is_text else "token"
        return ids

    def _tokenize_prompt(self, prompt, params):
        return self._build_tokens_prompt(self._ids(prompt["prompt"]), prompt)

    def _check_ids(self, prompt) -> None:
        """Raises ValueError where ids stand for pictures that are not there."""
        ids, image = prompt["prompt_token_ids"], self.model_config.hf_config.image_token_id
        if image in ids:
            raise ValueError(f"token {image} stands for an image: give chats or texts with images")
        if not prompt.get("multi_modal_data") and ids:
            if max(ids) >= self.model_config.get_vocab_size():
                raise ValueError("the prompt has marks <image> or <video>, and no picture is given")

    def _process_tokens(self, prompt, **kwargs):
        self._check_ids(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt, **kwargs):
        self._check_ids(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _process_multimodal(self, prompt, mm_data, *args, **kwargs):
        found = super()._process_multimodal(prompt, mm_data, *args, **kwargs)
        keys = found["mm_placeholders"][PICTURES][0].length
        most = self.config.scheduler_config.max_num_encoder_input_tokens
        if keys > most:
            raise ValueError(
                f"the last video has {keys} visual tokens, {most} are kept: give fewer frames, or"
                " start with a larger --max-num-batched-tokens"
            )
        return found

    def _get_skip_decoder_start_token(self):
        return True  # the processor begins the prompt

    def get_dec_start_token_id(self) -> int:
        """The token that is not put in front; vLLM asks for one, whether it is put or not."""
        return self.model_config.hf_config.image_token_id

    def _chat(self, params) -> dict:
        """Arguments of the parser. Raises ValueError for what the model was not trained with."""
        given = params.get_apply_chat_template_kwargs()
        wrong = [name for name in ("tools", "documents") if given.get(name)]
        if given.get("chat_template") not in (None, self.processor.chat_template):
            wrong.append("chat_template")
        if wrong:
            raise ValueError(f"the model was not trained with this {' or '.join(wrong)}")
        return {
            "content_format": "openai",
            "media_io_kwargs": params.media_io_kwargs,
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _rendered(self, parsed, params):
        """(conversation, prompt) as vLLM wants it of render_messages."""
        conversation, pictures, _ = parsed
        how = params.get_apply_chat_template_kwargs()
        names = ("add_generation_prompt", "continue_final_message")
        messages = [{name: turn[name] for name in ("role", "content")} for turn in conversation]
        text = self.processor._render(messages, **{name: how.get(name, False) for name in names})
        prompt = {"prompt_token_ids": self._ids(text), "prompt": str(text)}
        if pictures:
            prompt["multi_modal_data"] = pictures
        return conversation, prompt

    def render_messages(self, messages, params):
        """See HfRenderer."""
        with refusing_damage():
            parsed = parse_chat_messages(messages, self.model_config, **self._chat(params))
        return self._rendered(parsed, params)

    async def render_messages_async(self, messages, params):
        """See HfRenderer."""
        with refusing_damage():
            parsed = await parse_chat_messages_async(
                messages, self.model_config, **self._chat(params)
            )
        return self._rendered(parsed, params)


class EVLMProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about pictures."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of each kind; --limit-mm-per-prompt sets others.

        Raises:
          ValueError: an export that cuts pictures into tiles.
        """
        if getattr(self.get_hf_processor(), "tiles", 0):  # older exports have no such field
            raise ValueError("exports that cut pictures into tiles are not served")
        return dict.fromkeys(KINDS)

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts) -> Mapping[str, int]:
        """Keys of one picture, of the one modality that the scheduler sees."""
        return {PICTURES: visual_tokens(self.get_hf_config())}

    def get_data_parser(self):
        """Frames alone: which of a video they are was decided when it was read."""
        return MultiModalDataParser(video_needs_metadata=False)

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """None."""
        return {}


class EVLMDummyInputs(BaseDummyInputsBuilder[EVLMProcessingInfo]):
    """Pictures to warm up with."""

    def get_dummy_text(self, mm_counts) -> str:
        """A mark for each."""
        return "".join(f"<{kind}>" * count for kind, count in mm_counts.items())

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        """Black ones."""
        picture = Image.new("RGB", (32, 32))
        data = {"image": [picture], "video": [[picture, picture]]}
        return {kind: data[kind] * count for kind, count in mm_counts.items() if count}


class EVLMMultiModalProcessor(BaseMultiModalProcessor[EVLMProcessingInfo]):
    """All pictures of a request are one item: pixels [F, 3, h, w], groups [F], and a place in the
    cache for those that the answer will see, the last image or the frames of the last video.
    """

    def get_dummy_inputs(self, seq_len, mm_counts, mm_options=None):
        """Marks and pictures."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options or {})
        mark = marks(self.info.ctx.model_config.get_vocab_size())
        prompt = [mark[kind] for kind, items in data.items() for _ in items]
        return ProcessorInputs(prompt, self.info.parse_mm_data(data))

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        return {
            name: MultiModalFieldConfig.batched(PICTURES)
            for name in ("pixel_values", "image_groups")
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        return []  # `apply` has put media tokens into the prompt

    def apply(self, inputs, timing_ctx) -> MultiModalEncDecInput:
        """See BaseMultiModalProcessor.

        Raises:
          ValueError: other than one picture for each mark, or more frames than the cache takes.
        """
        ids, frames, groups = self._expanded(inputs.prompt, inputs.mm_data_items)
        pictures = {
            "pixel_values": torch.stack(frames)[None],
            "image_groups": torch.tensor([groups]),
        }
        fields = self._get_mm_fields_config(pictures, {})
        seen = visual_tokens(self.info.get_hf_config()) * groups.count(groups[-1])
        return MultiModalEncDecInput(
            type="multimodal",
            prompt_token_ids=ids,
            encoder_prompt_token_ids=[],
            mm_kwargs=MultiModalKwargsItems.from_hf_inputs(BatchFeature(pictures), fields),
            mm_hashes={PICTURES: [uuid4().hex]},  # nothing is shared between requests
            mm_placeholders={PICTURES: [PlaceholderRange(offset=0, length=seen)]},
        )

    def _expanded(self, prompt, items):
        """Ids with media tokens, pixels of all frames, and a number of its image or video for
        each.
        """
        processor, vocab = self.info.get_hf_processor(), self.info.ctx.model_config.get_vocab_size()
        kind_of = {mark: kind for kind, mark in marks(vocab).items()}
        queues = {kind: iter(items[kind] if kind in items else ()) for kind in KINDS}
        if "image" in items:  # files' own bytes, of which vLLM has made RGB in its own way
            raw = items["image"].get_all_items_for_hash()
            queues["image"] = (getattr(picture, "original_bytes", picture) for picture in raw)
        shown = [kind_of[i] for i in prompt if i in kind_of]
        for kind in KINDS:
            given = len(items[kind]) if kind in items else 0
            if shown.count(kind) != given:
                raise ValueError(
                    f"the prompt has {shown.count(kind)} marks <{kind}>, given are {given}"
                )
        run = [processor.image_token_id] * processor.media_tokens
        ids, frames, groups = [], [], []
        for token in prompt:
            if token not in kind_of:
                ids.append(token)
                continue
            picture = next(queues[kind_of[token]])
            new = list(picture) if kind_of[token] == "video" else [picture]
            if not new:
                raise ValueError("a video has no frames")
            ids += run * len(new)
            frames += [processor._pixels(frame) for frame in new]
            groups += [groups[-1] + 1 if groups else 0] * len(new)
        return ids, frames, groups
