"""No text that is trained on is scored, nor any that is scored trained on."""

import json
from types import SimpleNamespace

import pytest

from preskip.errors import PreskipError
from preskip.experiment.heldout import load_corpora, prepare_heldout
from preskip.experiment.probe_options import ProbeConfig
from tiny_text import tiny_tokenizer


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
    assert held & {document.text for document in home.splits.development} == set()
    assert sum(text.startswith("Other") for text in held) + len(held & texts["heldout"]) == len(held)
    left_out = 16 - len(held)  # of 80 a fifth is held out
    assert left_out > 0
    told = f"other.jsonl: {left_out} held-out documents are left out, {own} trains or chooses rates on them"
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_text_that_is_given_with_two_extents_is_refused(tmp_path):
    own, other = (write(tmp_path / f"{name}.jsonl", [f"{name} {n}." for n in range(40)], name) for name in ("a", "b"))
    for twice in (own, other):
        given = (f"{twice}:50x9", f"{twice}:4x9")
        config = ProbeConfig(corpus=str(own), eval_corpora=given, arms=("none", "preskip"))
        with pytest.raises(PreskipError, match=f"--eval-corpora names {twice} twice: leave one out"):
            load_corpora(config, tmp_path, quiet=True)
    config = ProbeConfig(corpus=str(own), eval_corpora=(f"{own}:4x9", f"{own}:4x9"), arms=("none", "preskip"))
    assert load_corpora(config, tmp_path, quiet=True)[0].documents == 4


def test_sets_beside_the_training_corpus_are_kept_apart_from_each_other_and_from_its_held_out_texts(tmp_path):
    """No rate is chosen on what any corpus holds out; what `--keep-weight` reads is neither scored nor chosen on."""
    pool = [f"Shared text {place}." for place in range(60)]
    own = write(tmp_path / "own.jsonl", [*pool[:20], *(f"Own text {place}." for place in range(40))], "d")
    first, second = (
        write(tmp_path / f"{name}.jsonl", pool[::step], name) for name, step in (("first", 1), ("second", -1))
    )
    for seed in range(3):
        given = {"corpus": str(own), "eval_corpora": (str(first), str(second)), "split_seed": seed}
        corpora = load_corpora(ProbeConfig(**given, arms=("none", "preskip")), tmp_path, quiet=True)
        texts = [
            {
                part: {document.text for document in getattr(one.splits, part)}
                for part in ("training", "development", "heldout")
            }
            for one in corpora
        ]
        final = set.union(*(one["heldout"] for one in texts))
        chosen = set.union(*(one["development"] for one in texts))
        assert final & chosen == set()
        assert all(one["training"] & (final | chosen) == set() for one in texts)
        assert all(one["heldout"] for one in texts)


def test_a_folder_above_the_corpus_says_nothing_of_what_it_is(tmp_path, monkeypatch):
    """As on a resume elsewhere, where the corpus is named by its whole path."""
    sets = {"wikitext": {"domain": "out"}}
    monkeypatch.setattr("preskip.evaluate.tasks.TaskSuite", lambda *_, **__: SimpleNamespace(sets=sets))
    for path, domain in (("wikitext-x/texts.jsonl", "out"), ("texts/wikitext-x.jsonl", "in")):
        (tmp_path / path).parent.mkdir()
        corpus = write(tmp_path / path, [f"Own text {place}." for place in range(40)], "d")
        config = ProbeConfig(corpus=str(corpus), tasks=("wikitext",), last_word_items=0)
        corpora = load_corpora(config, tmp_path, quiet=True)
        found = prepare_heldout(config, corpora, tiny_tokenizer(), None, None)
        assert found.sets["wikitext"]["domain"] == domain
