"""Corpora as people have them, with what must be read of each: every form, odd texts, broken files, folders, names."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PROSE = [
    f"Record {n} begins here. The river carried small boats past old mills in the winter of {n}." for n in range(6)
]
FORMS = ("jsonl", "ndjson", "jsonl.gz", "json", "json.gz", "csv", "tsv", "csv.gz", "parquet", "arrow")
CONTENTS: dict[str, list[Any]] = {
    "prose": PROSE,
    "a null": [*PROSE[:2], None, *PROSE[2:]],
    "a blank": [*PROSE[:1], " \t", *PROSE[1:]],
    "Chinese": [f"第{n}條河流載著小船經過老磨坊，農夫在橋邊數著羊群，孩子們唱著歌。" for n in range(4)],
    "Japanese": [f"これは{n}番目の文章です。川は小さな舟を運んでいます。" for n in range(4)],
    "Thai": [f"แม่น้ำพาเรือลำเล็กผ่านโรงสีเก่าครั้งที่ {n} ในฤดูหนาว" for n in range(4)],
    "mixed scripts": [f"{text} 河流 река ποταμός 강" for text in PROSE],
    "emoji": [f"{text} 👩‍👩‍👧‍👦🇩🇪" for text in PROSE],
    "zero width": [f"\u200b{text.replace(' ', chr(0x200B) + ' ')}\ufeff" for text in PROSE],
    "line ends": [text.replace(". ", ".\r\nNext\r") for text in PROSE],
    "tabs and quotes": [f'{text}\t"quoted", a;b|c\n\n\ttail' for text in PROSE],
    "one long line": [*PROSE, "boats and mills " * 3000],
    "numbers": ["1", "2.5", *PROSE],
    "words for nothing": ["NA", "null", "None", "nan", *PROSE],
}


@dataclass(frozen=True)
class Odd:
    """One corpus: how to make it in an empty folder, what to ask for, and the texts that it has (None: broken)."""

    name: str
    make: Callable[[Path], Path]
    texts: list[str] | None
    options: tuple[str, ...] = ()


def read(content: list[Any]) -> list[str]:
    """What must be read of texts: those that are neither null nor blank, their line ends as one."""
    return [text.replace("\r\n", "\n").replace("\r", "\n") for text in content if text and text.strip()]


def write(path: Path, texts: list[Any], column: str = "text", number: str = "n") -> Path:
    """Write texts and their numbers as a table in the form that the name says, with pyarrow or the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    form = path.name.removesuffix(".gz").rsplit(".", 1)[-1]
    rows = [{column: text, number: count} for count, text in enumerate(texts)]
    if form in ("parquet", "arrow"):
        table = pa.table({column: texts, number: list(range(len(texts)))})
        if form == "parquet":
            pq.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        return path
    if form in ("csv", "tsv"):
        buffer = io.StringIO(newline="")
        writer = csv.writer(buffer, delimiter="\t" if form == "tsv" else ",")
        writer.writerows([[column, number], *([row[column] or "", row[number]] for row in rows)])
        content = buffer.getvalue()
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        content = json.dumps(rows) if form == "json" else "\n".join(lines) + "\n"
    raw = content.encode()
    path.write_bytes(gzip.compress(raw, mtime=0) if path.name.endswith(".gz") else raw)
    return path


def of_bytes(name: str, content: bytes, texts: list[str] | None, *options: str) -> Odd:
    """A file of these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return Odd(f"{name}: {content[:24]!r}", make, texts, options)


def every() -> Iterator[Odd]:
    """All of them."""
    for form in FORMS:
        for title, content in CONTENTS.items():
            yield Odd(f"{form}, {title}", lambda at, f=form, c=content: write(at / f"a.{f}", c), read(content))
        yield Odd(f"{form}, empty", lambda at, f=form: _raw(at / f"a.{f}", b""), None)
        yield Odd(f"{form}, noise", lambda at, f=form: _raw(at / f"a.{f}", random.Random(f).randbytes(300)), None)
        yield Odd(f"{form}, a usual name", lambda at, f=form: write(at / f"a.{f}", PROSE, "content"), PROSE)
        yield Odd(f"{form}, another name", lambda at, f=form: write(at / f"a.{f}", PROSE, "body"), PROSE)
        asked = ("--text-column", "body")
        yield Odd(f"{form}, asked", lambda at, f=form: write(at / f"a.{f}", PROSE, "body"), PROSE, asked)
        yield Odd(f"{form}, none such", lambda at, f=form: write(at / f"a.{f}", PROSE), None, ("--text-column", "x"))
    yield from texts()
    yield from lines()
    yield from tables()
    yield from folders()
    yield from names()
    yield from broken()


def _raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def texts() -> Iterator[Odd]:
    """Plain text files."""
    joined = "\f".join(PROSE)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        yield of_bytes("a.txt", joined.encode(encoding), PROSE)
    yield of_bytes("b.txt", joined.replace(" ", "\r\n").encode(), [text.replace(" ", "\n") for text in PROSE])
    yield of_bytes("c.txt", "naïve".encode("latin-1"), None)
    yield of_bytes("d.txt", "Ship.".encode("utf-16-le"), None)
    yield of_bytes("e.txt", b"", None)
    yield of_bytes("f.txt", b" \n\n\t", None)
    yield of_bytes("g.md", joined.encode(), PROSE)
    packed = gzip.compress(joined.encode(), mtime=0)
    yield of_bytes("h.txt.gz", packed, PROSE)
    for bad in (packed[:-20], packed[:40] + b"x" + packed[41:], joined.encode(), b""):
        yield of_bytes("h.md.gz", bad, None)
    yield of_bytes("i.pdf", b"%PDF-1.4", None)


def lines() -> Iterator[Odd]:
    """JSON lines and JSON."""
    good = [json.dumps({"text": text}) for text in PROSE]
    jsonl = lambda *more: "\n".join([*good, *more]).encode()  # noqa: E731
    for suffix in ("jsonl", "json"):
        for encoding in ("utf-8-sig", "utf-16"):
            yield of_bytes(f"a.{suffix}", "\n".join(good).encode(encoding), PROSE)
        yield of_bytes(f"b.{suffix}", "\r\n".join(good).encode(), PROSE)
        yield of_bytes(f"c.{suffix}", jsonl('{"text": "Fine \\ud83d end."}'), [*PROSE, "Fine \ufffd end."])
        yield of_bytes(f"d.{suffix}", jsonl('{"text": "Fine \\ud83d\\ude00 end."}'), [*PROSE, "Fine 😀 end."])
        yield of_bytes(f"e.{suffix}", jsonl('{"id": 3}'), PROSE)
        yield of_bytes(f"f.{suffix}", jsonl("{}"), PROSE)
        for bad in (
            '{"text": 5}',
            '{"text": ["a"]}',
            '{"text": {"a": "b"}}',
            '{"text": true}',
            "[1]",
            "5",
            '"a"',
            "null",
        ):
            yield of_bytes(f"g.{suffix}", jsonl(bad), None)
        yield of_bytes(f"h.{suffix}", jsonl('{"text": "cut'), None)
        yield of_bytes(f"i.{suffix}", jsonl('{"text": "\x00"}'), None)
        yield of_bytes(f"j.{suffix}", jsonl('{"text": ' + "[" * 100_000), None)
        yield of_bytes(f"k.{suffix}", jsonl('{"text": NaN}'), PROSE)
        yield of_bytes(f"l.{suffix}", jsonl('{"n": ' + "9" * 5000 + "}"), None)
    for suffix in ("jsonl", "jsonl.gz", "json"):
        twice = b'{"text": "one", "id": 1}\n{"text": "two", "id": 1}'
        yield of_bytes(f"m.{suffix}", gzip.compress(twice, mtime=0) if suffix.endswith("gz") else twice, None)
    yield of_bytes("n.json", json.dumps(PROSE).encode(), PROSE)
    yield of_bytes("o.json", json.dumps([*PROSE, {"text": "mixed"}]).encode(), None)
    yield of_bytes("p.json", json.dumps([{"text": "a b"}, {"text": 5}, {"text": "c"}]).encode(), None)
    yield of_bytes("q.json", json.dumps({"version": 1, "data": [{"text": text} for text in PROSE]}).encode(), PROSE)
    yield of_bytes("r.json", json.dumps({"text": PROSE, "n": [*range(6)]}).encode(), PROSE)
    yield of_bytes("s.json", json.dumps({"text": dict(enumerate(PROSE))}).encode(), PROSE)
    yield of_bytes("t.json", json.dumps({"text": PROSE, "n": [1]}).encode(), None)
    yield of_bytes("u.json", json.dumps([{"doc": {"text": text}} for text in PROSE]).encode(), None)
    yield of_bytes("v.json", b"[]", None)
    yield of_bytes("w.json", b"3", None)


def tables() -> Iterator[Odd]:
    """CSV, and Parquet with columns that are no texts."""
    for name, separator in (("a.csv", ";"), ("b.csv", "\t"), ("c.csv", "|"), ("d.tsv", ","), ("e.csv.gz", ";")):
        rows = [f"n{separator}text", *(f'{n}{separator}"{text}"' for n, text in enumerate(PROSE))]
        raw = "\n".join(rows).encode()
        yield of_bytes(name, gzip.compress(raw, mtime=0) if name.endswith("gz") else raw, PROSE)
    yield of_bytes("f.csv", "\n".join(f"{n},{text}" for n, text in enumerate(PROSE)).encode(), None)
    yield of_bytes("g.csv", "\n".join(PROSE).encode(), None)
    yield of_bytes("h.csv", b"text\nHello, world\nFoo", None)
    yield of_bytes("i.csv", b"n,text\n1,a b,c\n2,d", None)
    yield of_bytes("j.csv", b"n,text\n1,a b\n2", None)
    yield of_bytes("k.csv", b"text,text\na,b", None)
    yield of_bytes("l.csv", b"text\n", None)
    yield of_bytes("m.csv", b'text\n"open', None)
    yield of_bytes("n.csv", ("\ufeff,text\r\n" + "\r\n".join(f'0,"{t}"' for t in PROSE)).encode(), PROSE)
    yield of_bytes("o.csv", "text,title\na b,x\nc d,y\n".encode("utf-16"), ["a b", "c d"])
    yield of_bytes("p.csv", b"text\n\na b\n\n\nc d\n", ["a b", "c d"])
    yield of_bytes("q.csv", b"a,b\nx y,z\nu v,w", None)
    yield of_bytes("r.csv", b"text\na b\nc \x00d", None)
    yield of_bytes("s.csv", b"text\nna\xefve", None)
    yield of_bytes("t.csv", b"text\n" + b'"' + b"a b " * 50_000 + b'"\nc d', [("a b " * 50_000), "c d"])

    def parquet(**columns: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            pq.write_table(pa.table(columns), folder / "x.parquet")
            return folder / "x.parquet"

        return make

    yield Odd("Parquet, lists", parquet(text=[["a"], ["b"]], title=["x", "y"]), None)
    yield Odd("Parquet, structs", parquet(text=[{"a": "b"}, {"a": "c"}]), None)
    yield Odd("Parquet, numbers", parquet(text=[1, 2]), None)
    yield Odd("Parquet, bytes", parquet(text=[b"a", b"b"]), None)
    yield Odd("Parquet, nulls", parquet(text=pa.array([None, None], pa.string())), None)
    yield Odd("Parquet, no columns", parquet(), None)
    yield Odd("Parquet, two columns", parquet(title=["t"] * 6, body=PROSE), None)
    yield Odd("Parquet, two, asked", parquet(title=["t"] * 6, body=PROSE), PROSE, ("--text-column", "body"))
    yield Odd("Parquet, categories", parquet(text=pa.array(PROSE).dictionary_encode()), PROSE)
    yield Odd("Parquet, large strings", parquet(text=pa.array(PROSE, pa.large_string())), PROSE)


def folders() -> Iterator[Odd]:
    """Folders of files, splits, links and saved data sets."""

    def shards(*names: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            for number, name in enumerate(names):
                write(folder / "set" / name, PROSE[2 * number : 2 * number + 2])
            return folder / "set"

        return make

    yield Odd("a folder", shards("a.parquet", "b.parquet", "c.parquet"), PROSE)
    yield Odd("a train and a test split", shards("train.parquet", "test.parquet"), PROSE[2:4])
    yield Odd("a test split only", shards("test.parquet"), PROSE[:2])
    yield Odd("a validation split only", shards("validation.jsonl"), PROSE[:2])
    yield Odd("split asked for", shards("train.csv", "test.csv"), PROSE[:2], ("--corpus-split", "train"))
    yield Odd("no such split", shards("train.csv"), None, ("--corpus-split", "test"))
    yield Odd("folder of folders", shards("train/a.jsonl", "test/a.jsonl"), PROSE[2:4])

    def texts(folder: Path) -> Path:
        (folder / "set" / "deep").mkdir(parents=True)
        for number, text in enumerate(PROSE):
            (folder / "set" / "deep" / f"{number}.txt").write_text(text)
        (folder / "set" / ".hidden.txt").write_text("no")
        return folder / "set"

    def mixed(folder: Path) -> Path:
        write(folder / "set" / "more.csv", PROSE)
        return texts_of(folder)

    def texts_of(folder: Path) -> Path:
        return texts(folder) if not (folder / "set" / "deep").exists() else folder / "set"

    def loop(folder: Path) -> Path:
        made = texts(folder)
        (made / "deep" / "back").symlink_to(made)
        return made

    def snapshot(folder: Path) -> Path:
        (folder / "blobs").mkdir()
        (folder / "snapshots").mkdir()
        for number in range(3):
            write(folder / f"{number}.parquet", PROSE[2 * number : 2 * number + 2]).rename(
                folder / "blobs" / f"b{number}"
            )
            (folder / "snapshots" / f"{number}.parquet").symlink_to(f"../blobs/b{number}")
        return folder / "snapshots"

    def left_link(folder: Path) -> Path:
        made = shards("train.parquet")(folder)
        (made / "odd.csv").symlink_to(write(folder / "elsewhere.csv", PROSE))
        return made

    def linked_folder(folder: Path) -> Path:
        texts(folder).rename(folder / "elsewhere")
        (folder / "set").mkdir()
        (folder / "set" / "in").symlink_to(folder / "elsewhere" / "deep")
        return folder / "set"

    def saved(*splits: str) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            import datasets

            rows = [datasets.Dataset.from_dict({"text": PROSE[2 * n : 2 * n + 2]}) for n in range(len(splits) or 1)]
            made = datasets.DatasetDict(dict(zip(splits, rows, strict=True))) if splits else rows[0]
            made.save_to_disk(folder / "set")
            return folder / "set"

        return make

    yield Odd("texts", texts, PROSE)
    yield Odd("texts beside a table", mixed, PROSE)
    yield Odd("a link back", loop, PROSE)
    yield Odd("a Hub snapshot", snapshot, PROSE)
    yield Odd("a left link", left_link, PROSE[:2])
    yield Odd("a linked folder", linked_folder, PROSE)
    yield Odd("saved", saved(), PROSE[:2])
    yield Odd("saved, validation only", saved("validation"), PROSE[:2])
    yield Odd("saved, train and test", saved("train", "test"), PROSE[2:4])
    yield Odd("an empty folder", lambda at: (at / "set").mkdir() or at / "set", None)
    yield Odd("a folder with nothing to read", lambda at: _raw(at / "x.bin", b"x").parent, None)


def names() -> Iterator[Odd]:
    """Names that are easily cut."""
    odd = ("a,b.jsonl", "naïve 文.jsonl", "แม่น้ำ.csv", "a b.parquet", "a'b\".csv", "a%20b.json", "a[1]*.parquet")
    for name in (
        *odd,
        "a#b.csv",
        "a:2x3.jsonl",
        "ünï.json.gz",
        "a\nb.jsonl",
        "{a}.csv",
        "a.b.c.arrow",
        "x" * 200 + ".csv",
    ):
        yield Odd(f"name {name[:20]!r}", lambda at, n=name: write(at / n, PROSE), PROSE)
    yield Odd("a path that is not UTF-8", lambda at: write(at / "a\udcff.jsonl", PROSE), PROSE)


def broken(count: int = 60) -> Iterator[Odd]:
    """Valid files with a seeded accident each: cut, or bytes changed, lost, or put in twice; still read, or not."""
    for seed in range(count):
        yield Odd(f"accident {seed}", lambda at, s=seed: _accident(at, random.Random(s)), None, ("accident",))


def _accident(folder: Path, draw: random.Random) -> Path:
    content = draw.choice(list(CONTENTS.values())[:-3])
    path = write(folder / f"a.{draw.choice(FORMS)}", content)
    raw = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(raw) or 1)
        match draw.randrange(4):
            case 0:
                del raw[at:]
            case 1:
                raw[at : at + 1] = draw.randbytes(draw.randint(1, 4))
            case 2:
                del raw[at : at + draw.randint(1, 30)]
            case _:
                raw[at:at] = raw[at : at + draw.randint(1, 30)]
    path.write_bytes(bytes(raw))
    return path
