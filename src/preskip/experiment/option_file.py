"""Options of a file: YAML, JSON, or run.json of another run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

from preskip.errors import PreskipError, one_line
from preskip.experiment.options import C, ExperimentConfig
from preskip.experiment.parse import parse_names
from preskip.experiment.presets import preset_options
from preskip.fields import about, flags


def configured(kind: type[C], given: Mapping[str, Any], file: Path | None = None) -> C:
    """The configuration that a preset, or another run's record, then a file, then `given` make; later ones override.

    Args:
        kind: of the configuration.
        given: options of the command line.
        file: as of `load_options`; None for none.

    Raises:
        PreskipError: as `load_options` and `ExperimentConfig.from_options`.
    """
    options, is_record = ({}, False) if file is None else load_options(file, kind, **given)
    if is_record:
        return kind.from_options(given, start=options)
    return kind.from_options(options, given, start=preset_options(kind, [options, given]))


def load_options(path: Path, kind: type[ExperimentConfig], **given: Any) -> tuple[dict[str, Any], bool]:
    """Options of a file, by the name of a flag or of a field, as `ExperimentConfig.from_options` takes them.

    Args:
        path: of a YAML or JSON file, or of another run's run.json: all its options are taken as they were resolved
            there, and a relative path that does not exist here means the folder in which that run was started.
        kind: whose options they are.
        given: options of the command line, which override them: rates of another run for arms that these leave out
            are left out, too.

    Returns:
        The options, and whether they are all of another run.

    Raises:
        PreskipError: the file cannot be read, or names what is no option; or a preset is given beside a run's record.
    """
    stored = _read(path)
    if "config" in stored and "schema_version" in stored:
        other = stored.get("kind", "probe")
        if other != kind.command:
            raise PreskipError(f"{path} is of `preskip {other}`, whose options are others than {kind.command}'s")
        if "preset" in given:
            raise PreskipError(f"--preset {given['preset']}: {path} has all options of its run: leave out one of them")
        anchored = _anchored(stored["config"], kind, path.parent / stored.get("directory", "."))
        return anchored | _refitted(kind.from_json(stored["config"]), given), True
    known = {**flags(kind), **about(kind)}
    options: dict[str, Any] = {}
    for written, value in stored.items():
        if (name := str(written).replace("-", "_")) in options:
            raise PreskipError(f"{path}: {name} is given twice: leave one of them out")
        options[name] = value
    for name, value in options.items():
        _check_known(name, known, f"{path}: {name!r} is no option of `preskip {kind.command}`")
        what = about(kind).get(name, {})
        is_mapping = "parts" in what or (get_origin(what.get("hint")) is dict and "read" not in what)
        if is_mapping and not isinstance(value, Mapping):
            raise PreskipError(f"{path}: {name} must be a mapping of names to values")
        if "parts" in what and what["parts"] is what["hint"]:
            for part in map(str, value):
                _check_known(part, about(what["parts"]), f"{path}: {part!r} is no part of {name}")
    return options, False


def _check_known(name: str, known: Mapping[str, Any], complaint: str) -> None:
    if name not in known:
        close = get_close_matches(name, known, 1)
        raise PreskipError(complaint + (f": did you mean {close[0]}?" if close else ""))


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_mapping) if path.suffix == ".json" else yaml.load(text, _loader())
    except FileNotFoundError:
        raise PreskipError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise PreskipError(f"--config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, Mapping):
        raise PreskipError(f"--config {path} must hold options by name, e.g. steps: 100")
    return content


def _check_once(names: Sequence[str]) -> None:
    """Refuse a name that is given twice: json and yaml would drop one of the values.

    Raises:
        ValueError: with the name.
    """
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice")


def _mapping(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    _check_once([name for name, _ in pairs])
    return dict(pairs)


def _loader() -> Any:
    """The loader of `yaml.safe_load`, with `_check_once`, and with `1e-6` as the number that YAML 1.2 says it is."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _check_once([name for name in names if name != "<<"])  # of which each merges another mapping
            return super().construct_mapping(node, deep=deep)

    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _anchored(config: Mapping[str, Any], kind: type[ExperimentConfig], directory: Path) -> dict[str, Any]:
    from preskip.data.splits import locate

    known = about(kind)

    def located(value: Any) -> Any:
        if isinstance(value, str):
            return locate(value, directory)
        return value if value is None else [located_corpus(text) for text in value]

    def located_corpus(text: str) -> str:
        name = re.sub(r":\d+x\d+$", "", text)
        return locate(name, directory) + text[len(name) :]

    return {name: located(value) if known.get(name, {}).get("path") else value for name, value in config.items()}


def _refitted(config: ExperimentConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of another run that are others beside those given: `--lr` for every arm stays one for every arm."""
    rates = config.learning_rates
    is_for_all = len(set(rates.values())) == 1 and set(config.arms) - {"none"} == set(rates)
    if getattr(config, "lr_mode", None) == "fixed" and is_for_all:
        return {"lr": [*rates.values()][:1]}
    arms = parse_names(given["arms"]) if "arms" in given else config.arms
    return {"learning_rates": {arm: rate for arm, rate in rates.items() if arm in arms}}
