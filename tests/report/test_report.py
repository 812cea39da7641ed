"""The report page: its numbers, safety, size and errors, and the page itself in a browser where there is one."""

from __future__ import annotations

import builtins
import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preskip.errors import PreskipError
from preskip.report import build_report, plots, verdicts

LAYERS = 30
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_run(run: Path, *, seeds: tuple[int, ...] = (42, 43), steps: int = 60, corpus: str = "sotu") -> Path:
    """A synthetic run directory of schema 1 with the arms none, preskip and lora."""
    arms: dict[str, dict[str, Any]] = {
        "none": {
            "description": "the pretrained model as it is",
            "trainable_parameters": 0,
            "learning_rate": None,
            "settings": {},
        },
        "preskip": {
            "description": "pre-projection and content skip",
            "trainable_parameters": 34_836_480,
            "learning_rate": 0.001,
            "adapter_dtype": "float32",
            "settings": {"expansion": 1.25, "activation": "silu", "init_weights": "identity"},
        },
        "lora": {
            "description": "LoRA on q, k, v, o",
            "trainable_parameters": 34_790_400,
            "learning_rate": 0.0003,
            "adapter_dtype": "float32",
            "settings": {"r": 302},
        },
    }
    record = {
        "schema_version": 1,
        "preskip_version": "0.1.0",
        "status": "finished",
        "created": "2026-05-04T09:12:31+00:00",
        "finished": "2026-05-04T09:18:02+00:00",
        "command": ["preskip", "probe", "--seeds", "42,43", "--out", "runs/my run"],
        "config": {"steps": steps, "batch_size": 8, "seq_len": 128},
        "model": {
            "name": "smollm2",
            "type": "llama",
            "parameters": 134_515_008,
            "layers": LAYERS,
            "hidden_size": 576,
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "source": "SmolLM2-135M-Instruct, Apache-2.0",
            "sha256": "b1" * 32,
        },
        "corpus": {
            "name": corpus,
            "training_documents": 220,
            "training_tokens": 98_304,
            "heldout_documents": 25,
            "source": "Gerhard Peters and John T. Woolley, The American Presidency Project",
            "sha256": "f7" * 32,
        },
        "environment": {
            "python": "3.11.7",
            "platform": "Linux-6.1",
            "processor": "x86_64",
            "cores": 2,
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "device": "cpu",
            "memory_bytes": 24 * 2**30,
        },
        "arms": arms,
        "seeds": list(seeds),
        "timings": {"load": 1.2, "train": 272.4, "evaluate": 41.7, "total": 331.0},
        "peak_memory_bytes": 2_812_000_000,
    }

    def interval(value: float, half: float) -> dict[str, float]:
        return {"value": value, "low": value - half, "high": value + half}

    bits = {"none": 1.0473, "preskip": 0.9951, "lora": 1.0012}
    results: dict[str, Any] = {
        "schema_version": 1,
        "evaluation": {
            "context_length": 128,
            "stride": 128,
            "documents": 25,
            "tokens": 12_000,
            "bytes": 52_000,
            "words": 9_000,
            "last_word_items": 120,
            "last_word_name": "last word (SOTU)",
        },
        "arms": {
            name: {
                "trainable_parameters": arm["trainable_parameters"],
                "learning_rate": arm["learning_rate"],
                "seeds": list(seeds),
                "metrics": {
                    "bits_per_byte": interval(bits[name], 0.0312),
                    "word_perplexity": interval(math.exp(bits[name] * 4), 3.9),
                    "last_word_accuracy": interval({"none": 0.3833, "preskip": 0.4083, "lora": 0.3667}[name], 0.087),
                },
                "final_training_loss": None if name == "none" else 2.71,
                "seconds_per_step": None if name == "none" else {"preskip": 4.61, "lora": 5.02}[name],
                "peak_memory_bytes": 2_500_000_000,
            }
            for name, arm in arms.items()
        },
        "comparisons": [],
        "depth": {},
    }
    for arm, reference, shift, gained, lost in (
        ("preskip", "none", -0.0522, 9, 6),
        ("lora", "none", -0.0461, 5, 7),
        ("preskip", "lora", -0.0061, 8, 3),
    ):
        shared = {"arm": arm, "reference": reference, "confidence": 0.95, "seeds": len(seeds)}
        results["comparisons"] += [
            {
                "metric": "bits_per_byte",
                "difference": shift,
                "low": shift - 0.0052,
                "high": shift + 0.0055,
                "units": 25,
                "unit": "document",
                "p_value": None,
                **shared,
            },
            {
                "metric": "last_word_accuracy",
                "difference": (gained - lost) / 120,
                "low": (gained - lost) / 120 - 0.031,
                "high": (gained - lost) / 120 + 0.033,
                "units": 120,
                "unit": "item",
                "clusters": 25,
                "gained": gained,
                "lost": lost,
                "p_value": 0.27,
                **shared,
            },
        ]
    for name in ("preskip", "lora"):
        results["depth"][name] = {}
        for seed in seeds:
            generator = np.random.default_rng(seed)
            depth = np.linspace(0, 1, LAYERS)
            results["depth"][name][str(seed)] = [
                {
                    "layer": layer,
                    "skip_norm": 0.0 if name == "lora" else float(0.35 + 0.5 * x**3 + 0.01 * generator.random()),
                    "up_norm": 3.1,
                    "down_norm": 0.8,
                    "skip_to_attention": None
                    if name == "lora"
                    else float(0.1 + 0.4 * x**2 + 0.01 * generator.random()),
                    "enrichment": None if name == "lora" else float(0.3 * (1 - x) + 0.05),
                }
                for layer, x in enumerate(depth)
            ]
            folder = run / "arms" / name / f"seed-{seed}"
            folder.mkdir(parents=True)
            lines = [
                {
                    "step": step,
                    "loss": float(2.65 + 0.7 * math.exp(-step / 15) + 0.06 * generator.standard_normal()),
                    "learning_rate": 1e-3,
                    "grad_norm": 0.9,
                    "tokens": 1024,
                    "seconds": 4.6,
                }
                for step in range(1, steps + 1)
            ]
            (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "run.json").write_text(json.dumps(record))
    (run / "results.json").write_text(json.dumps(results))
    return run


def change(path: Path, edit: Any) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


class Page(HTMLParser):
    """Visible text, scripts by type, and every attribute that could load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.scripts: dict[str, str] = {}
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self._inside = (given.get("id") or f"script-{len(self.scripts)}") if tag == "script" else None
        if tag == "style":
            self._inside = "style"
        for name, value in given.items():
            if name in ("src", "srcset", "data", "action", "poster") or (name == "href" and tag != "a"):
                self.loads.append((tag, value or ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[self._inside] = self.scripts.get(self._inside, "") + data
        else:
            self.text.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    run = write_run(tmp_path_factory.mktemp("run"))
    path = build_report(run)
    assert path == run / "report.html"
    return run, Page(path.read_text(encoding="utf-8"))


def test_the_page_states_the_results(built: tuple[Path, Page]) -> None:
    _, page = built
    for text in (
        "preskip lowers held-out bits per byte by 0.0522 [0.0467, 0.0574] against none.",
        "lora lowers held-out bits per byte by 0.0461 [0.0406, 0.0513] against none.",
        "preskip lowers held-out bits per byte by 0.0061 [0.0006, 0.0113] against lora.",
        "preskip and none cannot be told apart on last-word accuracy: the difference is +2.5 [−0.6, +5.8] points",
        "2 seeds: the intervals cover both documents and training randomness.",
        "34,836,480",
        "34,790,400",
        "0.995 [0.964, 1.026]",
        "38.3 % [29.6, 47.0]",
        "4.61 s",
        "context 128",
        "9 gained, 6 lost",
        "0.27",
        "120 items in 25 documents",
        "120 items of last word (SOTU)",
        "Gerhard Peters and John T. Woolley, The American Presidency Project",
        "preskip probe --seeds 42,43 --out 'runs/my run'",
        "preskip probe --resume ",
        "no null band",
        "134,515,008",
        "4 min 32 s",
    ):
        assert text in page.visible, text


def test_plots_and_download_hold_the_stored_numbers(built: tuple[Path, Page]) -> None:
    run, page = built
    results = json.loads((run / "results.json").read_text())
    stored = json.loads(page.scripts["data"])
    assert stored == {"run": json.loads((run / "run.json").read_text()), "results": results}
    specs = json.loads(page.scripts["specs"])
    assert list(specs) == [
        "forest-bits_per_byte",
        "forest-last_word_accuracy",
        "training",
        "depth-skip_to_attention",
        "depth-enrichment",
        "depth-skip_norm",
    ]
    bits = [entry for entry in results["comparisons"] if entry["metric"] == "bits_per_byte"]
    drawn = specs["forest-bits_per_byte"]["data"]["values"]
    assert [(d["difference"], d["low"], d["high"]) for d in drawn] == [
        (e["difference"], e["low"], e["high"]) for e in bits
    ]
    accuracy = specs["forest-last_word_accuracy"]["data"]["values"][0]
    assert accuracy["difference"] == pytest.approx(100 * 3 / 120)
    log = [json.loads(line) for line in (run / "arms/lora/seed-43/train.jsonl").read_text().splitlines()]
    curve = [r for r in specs["training"]["data"]["values"] if (r["arm"], r["seed"]) == ("lora", "43")]
    assert [(r["step"], r["loss"]) for r in curve] == [(line["step"], round(line["loss"], 5)) for line in log]
    # LoRA has no skip: its zeros are not drawn.
    assert {r["arm"] for r in specs["depth-skip_norm"]["data"]["values"]} == {"preskip"}


def test_the_page_is_small_and_loads_nothing(built: tuple[Path, Page]) -> None:
    run, page = built
    text = (run / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 3_000_000
    assert page.loads == [("link", "data:,")]
    assert not re.search(r"url\(|@import", page.scripts["style"])
    assert "default-src 'none'" in text
    assert list(run.glob(".report-*")) == []
    # A long run with many seeds stays small: curves are thinned.
    long = write_run(run.parent / "long", seeds=tuple(range(8)), steps=3000)
    assert build_report(long).stat().st_size < 3_000_000


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    run = write_run(tmp_path / "run", corpus=evil)

    def rename(results: dict[str, Any]) -> None:
        results["arms"]["<b>lora</b>"] = results["arms"].pop("lora")
        results["comparisons"][2]["arm"] = "</script><!--"

    change(run / "results.json", rename)
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert page.tags.count("script") == 4
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert f"smollm2 on {evil}" in html.unescape(page.visible)
    assert json.loads(page.scripts["data"])["run"]["corpus"]["name"] == evil
    assert (
        json.loads(page.scripts["specs"])["forest-bits_per_byte"]["data"]["values"][1]["pair"] == "</script><!-- − none"
    )


def test_one_seed_and_unfinished_runs_say_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", seeds=(42,))
    change(run / "run.json", lambda record: record.update(status="interrupted", finished=None))
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert "One seed: the intervals cover documents only, not training randomness." in page.visible
    assert "This run is interrupted, not finished." in page.visible


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def strip(results: dict[str, Any]) -> None:
        results["comparisons"], results["depth"] = [], {}
        results["arms"] = {"none": results["arms"]["none"]}
        del results["arms"]["none"]["metrics"]["last_word_accuracy"]
        results["evaluation"]["last_word_items"] = 0

    change(run / "results.json", strip)
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert "Nothing was compared" in page.visible
    assert "Learned skip by layer" not in page.visible
    assert json.loads(page.scripts["specs"]) == {}


def test_a_nan_loss_is_a_gap(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10)
    log = run / "arms/lora/seed-42/train.jsonl"
    log.write_text(log.read_text() + '{"step": 11, "loss": NaN}\n')
    specs = json.loads(Page(build_report(run).read_text(encoding="utf-8")).scripts["specs"])
    last = [r for r in specs["training"]["data"]["values"] if (r["arm"], r["seed"]) == ("lora", "42")][-1]
    assert (last["step"], last["loss"]) == (11, None)


def test_errors_are_one_line_and_leave_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    build_report(run)
    before = (run / "report.html").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(PreskipError, match=message) as caught:
            build_report(run)
        assert "\n" not in str(caught.value)
        assert (run / "report.html").read_bytes() == before

    results = (run / "results.json").read_text()
    for text, message in (
        (results[:200], "results.json is not valid JSON"),
        ("[1]", "holds a list, not an object"),
        (results.replace("0.9951", "NaN"), "NaN is not a number"),
        (results.replace('"schema_version": 1', '"schema_version": 2'), "has schema_version 2"),
        (results.replace('"tokens": 12000', '"tokens": "many"'), "lacks what the report needs .ValueError"),
        (results.replace("0.9951", "1e999"), "lacks what the report needs"),
        ('{"schema_version": 1}', "lacks what the report needs .*'arms'"),
    ):
        (run / "results.json").write_text(text)
        refused(message)
    (run / "results.json").unlink()
    refused("results.json is missing: finish the run with `preskip probe --resume")
    (run / "results.json").write_text(results)
    log = run / "arms/preskip/seed-42/train.jsonl"
    log.write_text(log.read_text() + '{"step": 61, "lo')
    refused("train.jsonl line 61 is damaged")
    log.unlink()  # a missing log is no error: the curve is left out
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused("cannot be written .*No space left")
    assert list(run.glob(".report-*")) == []
    with pytest.raises(PreskipError, match="is not a directory"):
        build_report(tmp_path / "nowhere")


@pytest.mark.parametrize("package", ["altair", "jinja2", "vl_convert"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preskip.report import page

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    run = write_run(tmp_path / "run")
    page._vega_bundle.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PreskipError, match=rf"needs {package}, .*pip install 'preskip\[report\]'"):
        build_report(run)
    assert not (run / "report.html").exists()


def comparison(metric: str, difference: float, low: float, high: float) -> dict[str, Any]:
    return {"metric": metric, "arm": "a", "reference": "b", "difference": difference, "low": low, "high": high}


@pytest.mark.parametrize(
    ("entry", "outcome", "text"),
    [
        (
            ("bits_per_byte", -0.052, -0.057, -0.047),
            "better",
            "a lowers held-out bits per byte by 0.0520 [0.0470, 0.0570]",
        ),
        (
            ("bits_per_byte", 0.2, 0.1, 0.3),
            "worse",
            "a raises held-out bits per byte by 0.200 [0.100, 0.300] against b",
        ),
        (("bits_per_byte", 0.1, 0.0, 0.2), "undecided", "+0.100 [0.000, +0.200], and that interval includes 0"),
        (
            ("last_word_accuracy", 0.05, 0.01, 0.09),
            "better",
            "raises last-word accuracy by 5.0 [1.0, 9.0] points against b",
        ),
        (("last_word_accuracy", -0.05, -0.09, -0.01), "worse", "lowers last-word accuracy by 5.0 [1.0, 9.0] points"),
    ],
)
def test_verdicts(entry: tuple[str, float, float, float], outcome: str, text: str) -> None:
    assert verdicts.outcome(comparison(*entry)) == outcome
    assert text in verdicts.sentence(comparison(*entry))


def test_an_accuracy_needs_the_exact_test_too() -> None:
    entry = comparison("last_word_accuracy", 0.075, 0.013, 0.149)
    assert verdicts.outcome({**entry, "p_value": 0.04}) == "better"
    assert verdicts.outcome({**entry, "p_value": 0.0703}) == "undecided"
    assert "but the exact McNemar p is 0.07" in verdicts.sentence({**entry, "p_value": 0.0703})


def test_smoothing_is_unbiased_and_skips_gaps() -> None:
    assert plots.smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    # keep = 0.8: (0.8·0.2·1 + 0.2·3) / (0.8·0.2 + 0.2)
    assert plots.smoothed([1.0, 3.0]) == pytest.approx([1.0, 0.76 / 0.36])
    assert plots.smoothed([None, 1.0, None]) == [None, pytest.approx(1.0), pytest.approx(1.0)]


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_is_wcag_aa_in_both_themes() -> None:
    style = (Path(plots.__file__).parent / "templates" / "report.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*--page[^}]*)\}", style)
    assert len(blocks) == 3
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        surfaces = [colours[name] for name in ("page", "surface", "tint")]

        def contrast(name: str, surface: str, colours: dict[str, str] = colours) -> float:
            a, b = sorted((luminance(colours[name]), luminance(surface)), reverse=True)
            return (a + 0.05) / (b + 0.05)

        for surface in surfaces:
            for name in ("ink", "muted", "accent", "better", "worse", "undecided"):
                assert contrast(name, surface) >= 4.5, (name, surface)
        for name in ("control", *(f"arm-{n}" for n in range(1, 7))):
            assert contrast(name, colours["surface"]) >= 3, name


PROBE = """
<script>
addEventListener("error", (e) => { document.title = "ERROR " + e.message; });
const saved = [];
URL.createObjectURL = (blob) => { saved.push(blob.type + (blob.size > 200 ? "" : " empty")); return "blob:none"; };
HTMLAnchorElement.prototype.click = () => {};
const wait = setInterval(() => {
  if (document.documentElement.dataset.drawn !== "true") return;
  clearInterval(wait);
  const out = {};
  out.plots = document.querySelectorAll(".plot svg").length;
  out.overflow = document.documentElement.scrollWidth - innerWidth;
  out.width = innerWidth;
  const heading = document.querySelectorAll("#arms thead button")[3];
  const names = () => Array.from(document.querySelectorAll("#arms tbody th")).map((th) => th.dataset.sort).join();
  heading.click(); out.up = names();
  heading.click(); out.down = names();
  out.sort = heading.parentElement.getAttribute("aria-sort");
  const step = document.querySelectorAll("#arms thead button")[6];
  step.click(); out.unmeasured = names();
  document.querySelectorAll(".tools")[1].querySelectorAll("button").forEach((button) => button.click());
  document.getElementById("download").click();
  const finish = setInterval(() => {
    if (saved.length < 4) return;
    clearInterval(finish);
    out.saved = saved.sort();
    const before = getComputedStyle(document.body).backgroundColor;
    document.getElementById("theme").click();
    out.themed = getComputedStyle(document.body).backgroundColor !== before;
    document.title = JSON.stringify(out);
  }, 50);
}, 50);
</script>
"""


def chromium(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --hide-scrollbars"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(built: tuple[Path, Page], tmp_path: Path) -> None:
    run, _ = built
    result = chromium(run / "report.html", tmp_path / "profile", "--virtual-time-budget=20000", "--dump-dom")
    assert 'data-drawn="true"' in result.stdout, result.stderr[-2000:]
    console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    # The page's policy forbids added scripts, so the probing copy goes without it; a frame gives it a phone's width.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (run / "report.html").read_text("utf-8"))
    probed = tmp_path / "probed.html"
    body, end = text.rsplit("</body>", 1)
    probed.write_text(body + PROBE + "</body>" + end, encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        '<iframe id="f" src="probed.html" width="390" height="2000" style="border:0"></iframe>'
        "<script>setInterval(() => { document.title = f.contentDocument.title; }, 50)</script>"
    )
    result = chromium(
        frame, tmp_path / "profile2", "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"
    )
    found = re.search(r"<title>(\{.*?\})</title>", result.stdout)
    assert found, result.stdout[:500] + result.stderr[-2000:]
    assert json.loads(html.unescape(found.group(1))) == {
        "plots": 6,
        "overflow": 0,
        "width": 390,
        "up": "preskip,lora,none",
        "down": "none,lora,preskip",
        "sort": "descending",
        "unmeasured": "preskip,lora,none",
        "themed": True,
        "saved": ["application/json", "application/json", "image/png", "image/svg+xml"],
    }
