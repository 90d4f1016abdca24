"""An exported directory (`evlm convert export --format hf`) under lmms-eval, through transformers;
no JAX computes here.
"""

from collections.abc import Sequence

import torch
from PIL import Image

from evlm_jax.convert.torch_model.modeling_evlm import EVLMForCausalLM
from evlm_jax.convert.torch_model.processing_evlm import EVLMProcessor
from evlm_jax.data import video
from evlm_jax.data.samples import MARKER, ImageRef
from evlm_jax.evals.answer import prompt_text
from evlm_jax.evals.lmms.requests import Requests
from evlm_jax.evals.task import Question

VIDEO = "<video>"  # the processor's mark


class EvlmHf(Requests):
    """`--model evlm_hf --model_args pretrained=DIR,frames=16`.

    Run by this package's classes, not by the directory's own code.
    """

    def __init__(
        self,
        pretrained: str,
        frames: int = 16,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size=None,
    ):
        """`max_batch_size` is lmms-eval's and stays unused."""
        super().__init__(frames, batch_size)
        self.place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.net = EVLMForCausalLM.from_pretrained(pretrained).to(self.place).eval()
        self.processor = EVLMProcessor.from_pretrained(pretrained)

    def answer(
        self, questions: Sequence[Question], tokens: int, temperature: float, top_p: float
    ) -> list[str]:
        """See `Requests.answer`."""
        how = (
            {"do_sample": True, "temperature": temperature, "top_p": top_p}
            if temperature
            else {"do_sample": False}
        )
        inputs = self._inputs(questions)
        with torch.inference_mode():
            told = self.net.generate(**inputs, max_new_tokens=tokens, **how)[
                :, inputs["input_ids"].shape[1] :
            ]
        return [
            text.strip()
            for text in self.processor.tokenizer.batch_decode(told, skip_special_tokens=True)
        ]

    def losses(self, asked: Sequence[tuple[Question, str]]) -> list[tuple[float, bool]]:
        """See `Requests.losses`; questions are computed one by one."""
        found = []
        for question, answer in asked:
            said = " " * (self.processor.template == "plain") + answer
            new = torch.tensor([self.processor.spell(said, "text")], device=self.place)
            inputs = self._inputs([question])
            for name, more in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
                inputs[name] = torch.cat([inputs[name], more], 1)
            with torch.inference_mode():
                log_probs = (
                    self.net(**inputs).logits[0, -new.shape[1] - 1 : -1].float().log_softmax(-1)
                )
            loss = -log_probs.gather(1, new[0][:, None]).sum()
            found.append((float(loss), bool((log_probs.argmax(-1) == new[0]).all())))
        return found

    def _inputs(self, questions: Sequence[Question]):
        """The processor's batch of the questions as chats of one turn."""
        chats, images, videos = [], [], []
        for question in questions:
            clips = [visual[0].frame is not None for visual in question.visuals]
            first, *others = prompt_text(question, self.processor.template).split(MARKER)
            text = first + "".join(
                (VIDEO if clip else MARKER) + part for clip, part in zip(clips, others, strict=True)
            )
            chats.append([{"role": "user", "content": text}])
            images.append(
                [
                    Image.open(visual[0].path)
                    for visual, clip in zip(question.visuals, clips)
                    if not clip
                ]
            )
            videos.append(
                [_frames(visual) for visual, clip in zip(question.visuals, clips) if clip]
            )
        return self.processor(chats, images=images, videos=videos).to(self.place)


def _frames(visual: Sequence[ImageRef]) -> list[Image.Image]:
    return [
        Image.fromarray(frame)
        for frame in video.decode(visual[0].path, [ref.frame for ref in visual])
    ]
