"""No text that is trained on is scored, nor any that is scored trained on."""

import json

from preskip.experiment.heldout import load_corpora
from preskip.experiment.probe_options import ProbeConfig


def write(path, texts, name):
    path.write_text(
        "".join(
            json.dumps({"id": f"{name}{place}", "group": f"{name}{place}", "text": text}) + "\n"
            for place, text in enumerate(texts)
        )
    )
    return path


def test_texts_of_the_training_corpus_are_left_out_of_other_sets(tmp_path, capsys):
    own = write(tmp_path / "own.jsonl", [f"Own text {place}." for place in range(40)], "d")
    shared = [f"Own text {place}." for place in range(40)] + [f"Other text {place}." for place in range(40)]
    other = write(tmp_path / "other.jsonl", shared, "e")
    config = ProbeConfig(corpus=str(own), eval_corpora=(f"{other}:50x9",), arms=("none", "preskip"))
    home, beside = load_corpora(config, tmp_path, quiet=False)
    texts = {part: {document.text for document in getattr(home.splits, part)} for part in ("training", "heldout")}
    scored = texts["heldout"] | {document.text for document in home.splits.development}
    assert len(texts["training"] | scored) == 40
    held = {document.text for document in beside.splits.heldout}
    assert held & texts["training"] == set()
    assert {document.text for document in beside.splits.development} & texts["training"] == set()
    assert {document.text for document in beside.splits.training} & scored == set()
    assert sum(text.startswith("Other") for text in held) + len(held & texts["heldout"]) == len(held)
    left_out = 16 - len(held)  # of 80 a fifth is held out
    assert left_out > 0
    assert f"other.jsonl: {left_out} held-out documents are left out, they are trained on" in " ".join(
        capsys.readouterr().err.split()
    )
