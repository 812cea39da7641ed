"""How much of a corpus without end a run from scratch reads for its tokens."""

from __future__ import annotations

import math
from typing import Any

from preskip.data.splits import DEVELOPMENT, Splits
from preskip.data.tables import Limit
from preskip.experiment.pretrain_options import PretrainConfig

# More than a token of the usual tokenizers has on average, in any script: as much text is read of a corpus without end.
CHARACTERS_PER_TOKEN = 6


def reading_limit(config: PretrainConfig, tokens: int) -> Limit:
    """How much of a table or a Hub data set is read: enough for so many training tokens and for the other two parts.

    Args:
        config: every option.
        tokens: of the arm that reads most.
    """
    training = (1 - config.heldout_fraction) * (1 - DEVELOPMENT)
    development = (1 - config.heldout_fraction) * DEVELOPMENT
    wanted = max(tokens / training, config.eval_blocks * config.seq_len / development)
    return Limit(
        reason=f"enough for {tokens:,} training tokens, at {CHARACTERS_PER_TOKEN} characters each",
        characters=math.ceil(CHARACTERS_PER_TOKEN * wanted),
        least_documents=math.ceil(config.eval_documents / config.heldout_fraction),
    )


def amount_read(splits: Splits) -> Any:
    """What run.json says of how much was read."""
    documents = [*splits.training, *splits.development, *splits.heldout]
    return {
        "documents_read": len(documents),
        "characters_read": sum(len(document.text) for document in documents),
        "read_whole": splits.whole,
    }
