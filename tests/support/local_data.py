"""A tiny data directory in the documented layout."""

import json
from pathlib import Path

from tiny_text import PROSE

SENTENCES = [text.strip() for text in PROSE.replace("\n\n", " ").split(". ") if len(text.split()) > 3]
WIKI = (
    " \n = First page = \n \n The committee met ; it @-@ ed on . \n \n = = A section = = \n \n More of it . \n \n"
    " = Second ( page ) = \n \n Another text , with 1 @,@ 000 ships . \n"
)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_local_data(folder: Path) -> Path:
    """Every file of the layout, with a dozen items or so in each."""
    write_lines(folder / "lambada/lambada_openai_test.jsonl", [{"text": sentence} for sentence in SENTENCES])
    (folder / "lambada/lambada_development_plain_text.txt").write_text(
        "`` i do n't know , '' she said\nthe captain 's ship ( a boat ) was ` gone ' ; but he waited\n"
    )
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/wiki.test.raw").write_text(WIKI, encoding="utf-8")
    arc = [
        {"id": f"q{i}", "question": f"{sentence}?", "choices": sentence.split()[:3], "gold": i % 3}
        for i, sentence in enumerate(SENTENCES)
    ]
    write_lines(folder / "arc_easy/arc_easy_test.jsonl", arc)
    hub = [
        {
            "id": f"v{i}",
            "question": "Where?",
            "choices": {"text": ["harbor", "ship"], "label": ["1", "2"]},
            "answerKey": "2",
        }
        for i in range(3)
    ]
    write_lines(folder / "arc_easy/arc_easy_validation.jsonl", hub)
    hellaswag = [
        {
            "ind": 100 + i,
            "query": f"Sailing: Ships: {sentence}",
            "choices": [" Step aside.", "waits.", "x y"],
            "gold": 1,
        }
        for i, sentence in enumerate(SENTENCES)
    ]
    write_lines(folder / "hellaswag/hellaswag_val_1000_olmes.jsonl", hellaswag)
    return folder
