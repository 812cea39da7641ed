"""`transformers serve` for checkpoints of this package: `python -m preskip.serve.transformers_server NAME FOLDER ...`.

Transformers looks the class of a checkpoint up as an attribute of its own package, and does not ask its Auto classes:
"module transformers has no attribute PreskipLlamaForCausalLM". So the classes are put there, in this process alone.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import preskip.architecture
from preskip.architecture.config import adapter_settings
from preskip.rows import BASE


def put_classes_on(module: Any) -> None:
    """Let `getattr(transformers, name)` find the classes of this package.

    Args:
        module: the module object that the server holds; transformers may have replaced the one in `sys.modules`.
    """
    for base_type in preskip.architecture.TYPES:
        causal_lm = preskip.architecture.architecture(base_type).causal_lm
        setattr(module, causal_lm.__name__, causal_lm)


def main() -> None:
    """Serve one checkpoint under a name until the process is told to stop."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--continuous-batching", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = vars(parser.parse_args())
    name, folder = options.pop("name"), options.pop("folder")

    from transformers import AutoConfig
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    put_classes_on(model_manager.transformers)
    os.chdir(folder)
    config: Any = AutoConfig.from_pretrained(".")
    serve_here_as(model_manager.ModelManager, name, list(adapter_settings(config)))
    Serve(model_timeout=-1, **options)


class Named:
    """A model with several adapters, as a server sees it that asks for one of them."""

    # One request at a time picks: its choice is held by the model.
    _turn = threading.Lock()

    def __init__(self, model: Any, adapter: str) -> None:
        self._model, self._adapter = model, adapter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, every row with this adapter."""
        with self._turn:
            return self._model.generate(*args, adapter_names=[self._adapter], **kwargs)


def serve_here_as(manager: Any, name: str, adapters: Sequence[str] = ()) -> None:
    """Let the server load the checkpoint of this folder as it starts, once, under a name, and no other.

    Args:
        manager: the server's class that loads models.
        name: what requests give as `model`.
        adapters: of a checkpoint with several: what requests give in its place.
    """
    load, begin = manager.load_model_and_processor, manager.__init__
    names = [*adapters, BASE] if adapters else [name]

    def load_by_name(self: Any, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        # transformers adds @main where a name has no @.
        asked = model_id_and_revision if model_id_and_revision in names else model_id_and_revision.removesuffix("@main")
        if asked not in names:
            from fastapi import HTTPException

            raise HTTPException(404, f"there is no model {asked!r} here: ask for {', '.join(names)}")
        model, processor = load(self, ".@main", *args, **kwargs)
        return (Named(model, asked) if adapters else model), processor

    def begin_and_load(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.load_model_and_processor(names[0])

    manager.load_model_and_processor, manager.__init__ = load_by_name, begin_and_load
    shown = [{"id": name, "object": "model"} for name in names]
    manager.get_gen_models = staticmethod(lambda cache_dir=None: shown)
    manager.list_models = lambda self, cache_dir=None: shown  # its name since transformers 5.24


if __name__ == "__main__":
    main()
