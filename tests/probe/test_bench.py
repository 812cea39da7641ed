"""What is set aside to choose learning rates on."""

from preskip.data.corpus import Document
from preskip.probe.bench import _without


def test_development_text_that_the_papers_protocol_scores_is_left_out():
    paragraph = "A paragraph of fifty characters or more, scored by the paper's protocol."
    heading = " = = History = = "
    documents = [
        Document("a", f"{heading}\n {paragraph} \nMore.", "a"),
        Document("b", f"{heading}\nOther text.", "b"),  # headings are shared by many pages
    ]
    assert [document.id for document in _without(documents, [f" {paragraph} \n", f"{heading}\n"])] == ["b"]
    assert _without(documents, []) == documents
