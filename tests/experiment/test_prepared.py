"""Workers, tasks on Ray and followers prepare a run anew: from the same inputs as its main process, or not at all."""

from pathlib import Path

import pytest

from preskip.errors import PreskipError
from preskip.experiment.cell import opened
from preskip.experiment.run import finish_run, start_run
from small_probe import small_probe


def test_a_process_that_reads_another_corpus_than_the_run_is_refused(tmp_path):
    config = small_probe(tmp_path, steps=2, last_word_items=0, lr_mode="default", seeds=(1,))
    run = start_run(config, tmp_path / "run", ["test"])
    finish_run(run, quiet=True)
    assert opened(run.path).run.path == run.path
    opened.cache_clear()
    corpus = Path(config.corpus)
    corpus.write_text(corpus.read_text(encoding="utf-8").replace("the", "thy", 1), encoding="utf-8")
    with pytest.raises(PreskipError, match=r"corpus .* has changed since this run began"):
        opened(run.path)
