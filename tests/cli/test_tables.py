import pytest

from preskip.cli.tables import print_results

ARM = {"trainable_parameters": 34_836_480, "learning_rate": 5e-4, "seeds": [1], "seconds_per_step": 5.69}
INTERVAL = {"difference": -0.0730, "low": -0.0797, "high": -0.0657, "confidence": 0.95}


def results(perplexity: float) -> dict:
    metrics = {
        "bits_per_byte": {"value": 0.9546, "low": 0.9, "high": 1.0},
        "word_perplexity": {"value": perplexity, "low": 1.0, "high": 1e9},
        "last_word_accuracy": {"value": 0.5625, "low": 0.4, "high": 0.7},
    }
    comparison = {"metric": "bits_per_byte", "arm": "preskip-lowrank", "reference": "preskip-gated", "p_value": None}
    return {
        "evaluation": {
            "documents": 50,
            "tokens": 8436,
            "context_length": 256,
            "last_word_items": 80,
            "last_word_name": "last word (SOTU)",
        },
        "arms": {"preskip-lowrank": {**ARM, "metrics": metrics, "peak_memory_bytes": 3 * 2**30}},
        "comparisons": [{**comparison, **INTERVAL, "units": 50, "unit": "document", "seeds": 1}],
    }


@pytest.mark.parametrize("columns", ["40", "80", "120"])
@pytest.mark.parametrize(("perplexity", "shown"), [(53.547, "53.55"), (1781061.9, "1.78e+06")])
def test_no_figure_is_cut_at_any_width(monkeypatch, capsys, tmp_path, columns, perplexity, shown):
    monkeypatch.setenv("COLUMNS", columns)
    print_results(results(perplexity), tmp_path, None)
    out = capsys.readouterr().out
    for figure in (
        "34.836M",
        "0.0005",
        "0.9546",
        shown,
        "56.2%",
        "5.69",
        "3.00",
        "-0.0730 [-0.0797, -0.0657]",
        "better",
    ):
        assert figure in out
    assert "…" not in out
