"""The trend over depth against SciPy, and by simulation: coverage of the interval, false trends without one."""

import math

import numpy as np
import pytest
from scipy import signal, stats

from preskip.stats.trends import arm_trends, autocorrelation, chance_band, null_band, trend

LAYERS = 12


def rows(values, documents=None, key="skip_norm"):
    found = [{"layer": layer, key: float(value)} for layer, value in enumerate(values)]
    if documents is not None:
        for row, above in zip(found, documents, strict=True):
            row[key] = float(np.mean(above))
            row["documents"] = {key: {"above": list(above), "below": [1.0] * len(above)}}
    return found


def runs(*tables):
    return [{"seed": seed, "layers": rows(table)} for seed, table in enumerate(tables)]


def nulls(*tables, **others):
    return {"noise": runs(*tables), **{name: runs(table) for name, table in others.items()}}


def noise(seed, layers=LAYERS):
    return np.random.default_rng(seed).normal(1.0, 0.01, layers)


def test_rho_is_spearmans_of_the_mean_over_seeds():
    generator = np.random.default_rng(3)
    seeds = {str(s): generator.normal(size=LAYERS).round(1) for s in range(3)}  # rounded: ties
    row = trend("skip_to_attention", {s: rows(v) for s, v in seeds.items()}, "skip_norm")
    expected = stats.spearmanr(np.arange(LAYERS), np.mean(list(seeds.values()), axis=0)).statistic
    assert row["rho"] == pytest.approx(expected)
    assert (row["seeds"], row["layers"], row["covers"]) == (3, LAYERS, "seeds")
    shuffled = {s: rows(v)[::-1] for s, v in seeds.items()}
    assert trend("skip_to_attention", shuffled, "skip_norm") == row  # the order of rows does not matter


def test_one_seed_without_documents_takes_layers_as_the_sample():
    values = np.arange(LAYERS) + np.random.default_rng(0).normal(0, 3, LAYERS)
    row = trend("skip_to_attention", {"1": rows(values)}, "skip_norm")
    rho = stats.spearmanr(np.arange(LAYERS), values).statistic
    error = math.sqrt((1 + rho**2 / 2) / (LAYERS - 3))
    assert row["low"] == pytest.approx(math.tanh(math.atanh(rho) - 1.959964 * error))
    assert row["high"] == pytest.approx(math.tanh(math.atanh(rho) + 1.959964 * error))
    assert row["covers"] == "layers"


def test_the_chance_band_is_the_two_sided_5_percent_point():
    # Exact critical value of Spearman's rho for n = 12 (Ramsey 1989): 0.587 at 5 % two-sided.
    assert chance_band(12)[1] == pytest.approx(0.587, abs=0.015)
    assert chance_band(30)[1] == pytest.approx(0.362, abs=0.01)
    assert chance_band(12)[0] == -chance_band(12)[1]


def test_the_null_of_a_norm_is_the_noise_widened_by_chance():
    up = np.arange(LAYERS)
    learned = {"1": rows(up + 5.0), "2": rows(up + 5.5)}
    without = trend("skip_norm", learned, "skip_norm")
    assert (without["null_low"], without["null_high"], without["verdict"]) == (None, None, "undecided")
    row = trend("skip_norm", learned, "skip_norm", nulls(noise(0), noise(1)))
    # A profile in order leaves nothing to wander: the band's autocorrelation is one standard error, 1 / √12.
    assert row["autocorrelation"] == 0.0
    assert (row["null_low"], row["null_high"]) == chance_band(LAYERS, 0.29)
    assert row["verdict"] == "later more"
    assert len(row["nulls"]["noise"]) == 2
    # Shuffled targets that rise as well, or noise: the norm shows nothing, however steep.
    row = trend("skip_norm", learned, "skip_norm", nulls(noise(0), shuffled=up))
    assert (row["nulls"]["shuffled"], row["verdict"]) == ([pytest.approx(1.0)], "undecided")
    row = trend("skip_norm", learned, "skip_norm", nulls(noise(0), up))
    assert row["null_high"] == pytest.approx(1.0)
    assert row["verdict"] != "later more"
    assert trend("skip_norm", {"1": rows(-up + 50.0)}, "skip_norm", nulls(noise(0)))["verdict"] == "later less"


def test_documents_and_seeds_are_both_resampled():
    generator = np.random.default_rng(1)
    truth = np.linspace(0, 1, LAYERS)

    def seed_rows(spread_seed, spread_document):
        seed = truth + generator.normal(0, spread_seed, LAYERS)
        return rows(seed, seed[:, None] + generator.normal(0, spread_document, (LAYERS, 20)))

    quiet = trend("skip_norm", {str(s): seed_rows(0.01, 0.01) for s in range(3)}, "skip_norm", nulls(noise(0)))
    seeds = trend("skip_norm", {str(s): seed_rows(0.5, 0.01) for s in range(3)}, "skip_norm", nulls(noise(0)))
    documents = trend("skip_norm", {str(s): seed_rows(0.01, 3.0) for s in range(3)}, "skip_norm", nulls(noise(0)))
    one = trend("skip_norm", {"1": seed_rows(0.01, 3.0)}, "skip_norm", nulls(noise(0)))
    assert quiet["high"] - quiet["low"] < 0.1
    assert seeds["high"] - seeds["low"] > 0.3
    assert documents["high"] - documents["low"] > 0.1
    assert [row["covers"] for row in (quiet, one)] == ["seeds and documents", "documents"]
    # A ratio of sums per document, not a mean of ratios.
    weighted = [{"layer": i, "x": 0.0, "documents": {"above": [i, 0.0], "below": [1.0, 9.0 - i]}} for i in range(6)]
    assert trend("ablation_skip", {"1": weighted}, "x")["rho"] == pytest.approx(1.0)


def test_a_flat_profile_has_no_trend_and_noise_is_not_called_one():
    """Layers that really differ, in no order: 'no trend' when measured well, hardly ever a trend."""
    verdicts = []
    for trial in range(200):
        generator = np.random.default_rng(trial)
        truth = 8 + generator.normal(size=LAYERS)
        seeds = {
            str(s): rows(
                truth, truth[:, None] + generator.normal(0, 0.3, (LAYERS, 1)) + generator.normal(0, 0.5, (LAYERS, 10))
            )
            for s in range(3)
        }
        verdicts.append(trend("skip_to_attention", seeds, "skip_norm")["verdict"])
    trends = sum(verdict.startswith("later") for verdict in verdicts)
    assert trends / len(verdicts) <= 0.05
    assert verdicts.count("no trend") > 20


@pytest.mark.parametrize(("likeness", "most"), [(0.5, 0.07), (0.7, 0.11)])
def test_layers_that_resemble_each_other_are_not_called_a_trend(likeness, most):
    """AR(1) profiles of 30 layers without a trend, from a filter of SciPy's: random orders call a fourth of them.

    Where layers are more alike their likeness is underestimated, and the band is too narrow, as docs/depth.md says.
    """
    noise_ = np.random.default_rng(0).standard_normal((1_000, 130))
    profiles = signal.lfilter([1.0], [1.0, -likeness], noise_, axis=1)[:, 100:]
    rho = np.array([stats.spearmanr(np.arange(30), profile).statistic for profile in profiles])
    bands = [
        trend("ablation_skip", {"1": [{"layer": i, "x": x} for i, x in enumerate(profile)]}, "x")["null_high"]
        for profile in profiles
    ]
    assert np.mean(abs(rho) > chance_band(30)[1]) > 0.2
    assert np.mean(abs(rho) > bands) <= most
    found = np.mean([autocorrelation(profile) for profile in profiles])
    assert found == pytest.approx(likeness, abs=0.06 if likeness == 0.5 else 0.15)


def test_a_size_whose_rest_is_all_but_nothing_has_no_limits():
    layers = [1.0, -1.0 + 1e-4, 1.0, -1.0, 0.5, 0.5]
    found = trend("ablation_skip", {"1": [{"layer": i, "x": x} for i, x in enumerate(layers)]}, "x")
    assert found["size"] == pytest.approx(0.5 / (1e-4 / 4))
    assert found["size_low"] is found["size_high"] is None


def test_a_profile_that_is_loud_in_its_last_layers_does_not_read_no_trend():
    # Falling slightly at first, and the last five of 30 nearly three times as loud: ρ is near 0.
    profile = np.concatenate([np.linspace(1.1, 0.9, 25), np.linspace(2.6, 2.8, 5)])
    profile[:5] += 1.0
    seeds = {str(s): rows(profile * (1 + 0.01 * s), np.tile(profile[:, None], (1, 8))) for s in range(3)}
    row = trend("skip_to_attention", seeds, "skip_norm")
    assert abs(row["rho"]) < 0.36
    assert row["size"] == pytest.approx(profile[20:].mean() / profile[:20].mean(), rel=1e-6)
    assert row["size_low"] <= row["size"] <= row["size_high"]
    assert row["size"] > 1.4
    assert row["verdict"] == "undecided"


def test_the_size_of_a_trend_has_no_figure_where_it_has_no_sense():
    falling = [{"layer": i, "x": 1.0 - i} for i in range(6)]
    row = trend("ablation_skip", {"1": falling}, "x")
    assert (row["size"], row["size_low"], row["size_high"]) == (None, None, None)
    even = [{"layer": i, "x": 2.0 + (i % 2)} for i in range(9)]
    row = trend("ablation_skip", {"1": even}, "x")
    assert row["size"] == pytest.approx((7 / 3) / (15 / 6))  # 2, 3, 2, 3, 2, 3 before 2, 3, 2


def test_the_interval_covers_the_rho_of_the_true_profile():
    """Coverage for a true rho of 0.69, three seeds, twenty documents; attenuation keeps it from being exact."""
    truth = np.array([0.1, 0.9, 0.4, 0.2, 0.8, 0.7, 0.5, 1.4, 1.0, 0.6, 1.6, 1.2])
    rho = stats.spearmanr(np.arange(LAYERS), truth).statistic
    inside = 0
    for trial in range(150):
        generator = np.random.default_rng(trial)
        seeds = {}
        for s in range(3):
            seed = truth + generator.normal(0, 0.1, LAYERS)
            seeds[str(s)] = rows(seed, seed[:, None] + generator.normal(0, 0.5, (LAYERS, 20)))
        row = trend("skip_norm", seeds, "skip_norm", nulls(noise(0)))
        inside += row["low"] <= rho <= row["high"]
    assert 0.93 <= inside / 150 <= 1.0


def test_arm_trends_takes_what_an_arm_has():
    depth = {
        "1": [
            {"layer": i, "skip_norm": 1.0 + i, "skip_to_attention": 0.5 - 0.01 * i, "enrichment": 0.1} for i in range(8)
        ]
    }
    ablation = {
        "1": [
            {"layer": i, "part": part, "difference": sign * i * i}
            for i in range(8)
            for part, sign in (("skip", 1), ("enrichment", -1))
        ]
    }
    found = arm_trends(depth, ablation, nulls(noise(0, 8)))
    assert [row["measure"] for row in found] == ["skip_norm", "skip_to_attention", "ablation_skip"]
    assert [round(row["rho"]) for row in found] == [1, -1, 1]
    assert [row["measure"] for row in arm_trends(depth)] == ["skip_norm", "skip_to_attention"]
    *_, equal = arm_trends(depth, equal_step={"1": depth["1"]})
    assert (equal["measure"], round(equal["rho"])) == ("equal_step_skip_to_attention", -1)
    absent = {"1": [{"layer": i, "skip_norm": 0.0, "skip_to_attention": None} for i in range(8)]}
    assert arm_trends(absent) == []
    assert arm_trends({"1": []}) == []
    few = arm_trends({"1": depth["1"][:3]}, None, nulls(noise(0, 3)))
    assert [(row["verdict"], row["low"], row["high"]) for row in few] == [("undecided", -1.0, 1.0)] * 2


def test_null_band():
    tables = [noise(seed) for seed in range(4)]
    band = null_band(runs(*tables))
    low, high = np.quantile(np.concatenate(tables), [0.025, 0.975])
    assert band == [{"layer": layer, "low": pytest.approx(low), "high": pytest.approx(high)} for layer in range(LAYERS)]
    by_layer = null_band(runs(*tables), pooled=False)
    values = np.array(tables)[:, 5]
    margin = stats.t.ppf(0.975, 3) * values.std(ddof=1) * math.sqrt(1.25)
    assert by_layer[5] == {
        "layer": 5,
        "low": pytest.approx(values.mean() - margin),
        "high": pytest.approx(values.mean() + margin),
    }
    (line, *_) = null_band(runs(tables[0]), pooled=False)
    assert line["low"] == line["high"] == pytest.approx(tables[0][0])
    assert null_band([]) == []
