"""lm-eval on a live model object: its requests and its encoding, answered by `preskip.evaluate.likelihood`.

`RequestEncoder` turns lm-eval's requests into token windows exactly as lm-eval's own Hugging Face backend does (start
token, what counts as continuation, truncation from the left), and needs no model. `LiveModel` answers them with any
model object: the untouched base, a PEFT model, a baked one. lm-eval's own `peft=` path is never used, because it
resizes the embeddings where vocabulary and tokenizer differ in length.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from preskip.data.blocks import Window
from preskip.errors import PreskipError
from preskip.evaluate.likelihood import Score, score_sequences
from preskip.progress import Advance, no_progress

try:
    from lm_eval import utils
    from lm_eval.api.model import LM, TemplateLM
    from lm_eval.models.utils import resolve_max_length
except ModuleNotFoundError as error:
    raise PreskipError("lm-eval is not installed: pip install 'preskip[eval]'") from error
except ImportError as error:
    raise PreskipError(f"lm-eval is too old ({error}): pip install 'lm-eval>=0.4.13'") from error

GENERATED_AT_ONCE = 8


def model_context_length(model: nn.Module | None, tokenizer: Any) -> int:
    """Most tokens that lm-eval lets a model read: its positions (None has none), the tokenizer's limit, or 2048."""
    return int(resolve_max_length(getattr(model, "config", None), tokenizer))


class RequestEncoder(TemplateLM):
    """An lm-eval "model" whose answers are the token windows that a model would have to score.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context_length: most tokens read at once; longer requests lose tokens on the left.
        add_bos_token: whether to put the start token before a text; None leaves it to the tokenizer.

    Attributes:
        left_out_system: whether a chat lost its system message, which the template refused.
    """

    def __init__(self, tokenizer: Any, context_length: int, *, add_bos_token: bool | None = None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = context_length
        self.add_bos_token = add_bos_token
        self.left_out_system = False
        if self.prefix_token_id is None:
            raise PreskipError("the tokenizer has neither start nor end token: lm-eval needs one before a text")

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by: the start token, for want of one the end token."""
        start = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as lm-eval's caches want it."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; a start token written out at its beginning is not doubled."""
        if add_special_tokens is None:
            written_out = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if written_out else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """The window of each context and continuation; the start token stands for a context without tokens."""
        for context, continuation in (request.args for request in requests):
            # Of these lm-eval reads the first token, before it asks for windows.
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise _nothing_to_score((context, continuation))
        return super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Any]:
        return [self._window(context, continuation, text) for text, context, continuation in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """The windows of each text: every token is scored once, windows do not overlap but for the last.

        The start token stands before a text once, also where the tokenizer adds it by itself or the text begins with
        it; lm-eval's own backend scores a second one there.
        """
        options = {"prefix_token": self.prefix_token_id, "max_seq_len": self.max_length, "context_len": 1}
        windows = []
        for text in (request.args[0] for request in requests):
            overlapping = utils.get_rolling_token_windows(token_list=self._without_start(text), **options)
            pairs = [utils.make_disjoint_window(pair) for pair in overlapping]
            windows.append([self._window(context, continuation, text) for context, continuation in pairs])
        return windows

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Not for an encoder."""
        raise NotImplementedError("generation needs a model: use LiveModel")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat; where the template refuses a system message, without it (`left_out_system`).

        Raises:
            PreskipError: the tokenizer has no chat template.
        """
        from jinja2.exceptions import TemplateError

        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        if not self.chat_template(True):
            raise PreskipError("the tokenizer has no chat template: leave out --apply-chat-template")
        try:
            return apply(chat_history)
        except TemplateError:
            prompt = apply([message for message in chat_history if message["role"] != "system"])
            self.left_out_system = True
            return prompt

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, None where it has none."""
        return getattr(self.tokenizer, "chat_template", None) and self.tokenizer.get_chat_template()

    def _without_start(self, text: str) -> list[int]:
        ids = self.tok_encode(text, add_special_tokens=False)
        return ids[1:] if ids[:1] == [self.prefix_token_id] else ids

    def _window(self, context: list[int], continuation: list[int], text: Any) -> Window:
        if not continuation:
            raise _nothing_to_score(text)
        if len(continuation) > self.max_length:
            raise PreskipError(
                f"a continuation of {len(continuation)} tokens exceeds the context length {self.max_length}: raise it"
            )
        # lm-eval moves a context's spaces to the continuation, and of a blank one leaves nothing.
        ids = ((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :]
        return Window(array("i", ids), len(ids) - len(continuation))


def _nothing_to_score(text: Any) -> PreskipError:
    return PreskipError(f"an empty continuation cannot be scored: {text!r:.120}")


class LiveModel(RequestEncoder):
    """An lm-eval model over a live model object.

    Log-likelihoods are computed by `score_sequences` (output head at scored positions only, right padding, logits in
    fp32); generation is lm-eval's own Hugging Face backend on the same object.

    Args:
        model: a causal language model, also a PEFT model.
        tokenizer: its Hugging Face tokenizer.
        context_length: most tokens read at once; None takes the model's own.
        add_bos_token: whether to put the start token before a text; None leaves it to the tokenizer.
        batch_tokens: see `score_sequences`.
        batch_size: texts that are generated at once.
        advance: progress over scored sequences.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        context_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_tokens: int | None = None,
        batch_size: int = GENERATED_AT_ONCE,
        advance: Advance = no_progress,
    ) -> None:
        length = model_context_length(model, tokenizer) if context_length is None else context_length
        super().__init__(tokenizer, length, add_bos_token=add_bos_token)
        self.model = model
        self.batch_tokens = batch_tokens
        self.batch_size = batch_size
        self.advance = advance

    def score(self, windows: Sequence[Window]) -> list[Score]:
        """Score windows in the given order; see `score_sequences`."""
        return score_sequences(self.model, windows, batch_tokens=self.batch_tokens, advance=self.advance)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Any]:
        return [(-score.nll, score.greedy) for score in self.score(super()._loglikelihood_tokens(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihood of each text in nats, summed over its windows."""
        windows = super().loglikelihood_rolling(requests)
        scores = iter(self.score([window for text in windows for window in text]))
        return [-sum(next(scores).nll for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated text of each request, `batch_size` at once, with the K/V cache."""
        try:
            return self._backend().generate_until(list(requests), disable_tqdm=disable_tqdm)
        except AssertionError as error:  # max_gen_toks leaves no room for a prompt
            raise PreskipError(
                f"lm-eval cannot generate: {error} Raise --context-length, or lower max_gen_toks"
            ) from None

    def _backend(self) -> Any:
        import logging

        from lm_eval.models import huggingface

        live = self

        class Backend(huggingface.HFLM):
            """lm-eval's, which decides by the first prompt of a batch whether all of it begins with a start token."""

            def tok_batch_encode(
                self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
            ) -> tuple[Any, Any]:
                ids = [live.tok_encode(text) or [live.prefix_token_id] for text in strings]
                rows = [row[-(left_truncate_len or 0) :] for row in ids]
                batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
                return batch["input_ids"], batch["attention_mask"]

        # It warns that a live object was passed, which is the point.
        logger = huggingface.eval_logger
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return Backend(
                pretrained=self.model,
                tokenizer=self.tokenizer,
                backend="causal",
                max_length=self.max_length,
                add_bos_token=self.add_bos_token,
                batch_size=self.batch_size,
            )
        finally:
            logger.setLevel(level)


class Answers(LM):
    """An lm-eval model that has its answers already, but for texts to generate.

    Args:
        live: what generates.
        answers: log-likelihoods in lm-eval's form, by `id` of the request.
    """

    def __init__(self, live: LiveModel, answers: Mapping[int, Any]) -> None:
        super().__init__()
        self.live, self.answers = live, answers

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, as lm-eval's caches want it."""
        return self.live.tokenizer_name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Any]:
        """Of continuations, or of whole texts."""
        return [self.answers[id(request)] for request in requests]

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated text of each request."""
        return self.live.generate_until(requests, disable_tqdm=True)
