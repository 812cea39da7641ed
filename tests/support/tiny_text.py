"""Tiny tokenizers and texts for the tests of the data modules, trained on the fly."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PROSE = (
    "The committee met on Monday to discuss the harbor. Ships had waited there for weeks, and the merchants "
    "complained about the delay. Nobody knew when the storm would end, but every captain hoped for a calm "
    "morning. At last the wind fell, the sky cleared, and the whole town walked down to see the harbor. "
    "Children ran ahead of their parents. An old sailor told them that he had never seen such a crowd of ships "
    "before that quiet and most welcome morning.\n\n"
    "In the second year the council voted a new tax. Farmers paid it in grain, and merchants paid it in "
    "silver. Mr. Smith of the U.S. Treasury wrote that the farmers had given more than their share of the "
    "whole burden. He asked the council to think again about the price of grain and to lower the tax. After a "
    "long debate nobody was content, and the members went home to speak with the farmers.\n\n"
)


def tiny_tokenizer(bos: bool = True, eos: bool = True, lead: bool = False) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; `lead` makes it put its start token before a text by itself."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PROSE], trainer)
    if lead:
        from tokenizers import processors

        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
    )
