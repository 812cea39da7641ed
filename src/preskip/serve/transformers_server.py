"""`transformers serve` for checkpoints of this package: `python -m preskip.serve.transformers_server NAME FOLDER ...`.

Transformers looks the class of a checkpoint up as an attribute of its own package, and does not ask its Auto classes:
"module transformers has no attribute PreskipLlamaForCausalLM". So the classes are put there, in this process alone.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import preskip.architecture


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
    parser = argparse.ArgumentParser()
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

    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    put_classes_on(model_manager.transformers)
    os.chdir(folder)
    serve_here_as(model_manager.ModelManager, name)
    Serve(model_timeout=-1, **options)


def serve_here_as(manager: Any, name: str) -> None:
    """Let the server load the checkpoint of this folder as it starts, under a name, and no other.

    Args:
        manager: the server's class that loads models.
        name: what requests give as `model`.
    """
    load, begin = manager.load_model_and_processor, manager.__init__

    def load_by_name(self: Any, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        asked = model_id_and_revision.partition("@")[0]
        if asked != name:
            from fastapi import HTTPException

            raise HTTPException(404, f"there is no model {asked!r} here: ask for {name}")
        return load(self, ".@main", *args, **kwargs)

    def begin_and_load(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        self.load_model_and_processor(name)

    manager.load_model_and_processor, manager.__init__ = load_by_name, begin_and_load
    manager.get_gen_models = staticmethod(lambda cache_dir=None: [{"id": name, "object": "model"}])


if __name__ == "__main__":
    main()
