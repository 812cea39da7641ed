"""Turning the page's content into one self-contained HTML text."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preskip.errors import PreskipError

if TYPE_CHECKING:
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def require_extra() -> None:
    """Check that the packages of the extra `report` are there.

    Raises:
        PreskipError: one is missing; its name and the mend are given.
    """
    try:
        import altair  # noqa: F401
        import jinja2  # noqa: F401
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise PreskipError(
            f"the report needs {error.name or 'a package'}, which is not installed: run pip install 'preskip[report]'"
        ) from None


def render(
    template: str,
    content: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
    bypass_map: Mapping[str, Any] | None = None,
) -> str:
    """A page as text.

    Args:
        template: which page: report.html.j2 or explain_page.html.j2.
        content: values for the template; everything is escaped.
        figures: with key, section and spec.
        data: what "Download data" saves.
        bypass_map: as from `preskip.report.explain.map.pack_map`, for a page that shows it.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    bundle, style = _vega_bundle(), _joined("report.css", "map.css")
    script = _joined("report.js", *(["map.js"] if bypass_map else []))
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (bundle, script)]
    return environment.get_template(template).render(
        **content,
        figures=figures,
        sections={figure["section"] for figure in figures},
        style=Markup(style),
        bundle=Markup(bundle),
        script=Markup(script),
        script_hashes=Markup(" ".join(f"'sha256-{digest}'" for digest in digests)),
        specs=_embedded({figure["key"]: figure["spec"] for figure in figures}, Markup),
        data=_embedded(data, Markup),
        map=_embedded(bypass_map, Markup) if bypass_map else None,
    )


def _joined(*names: str) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


@functools.lru_cache(maxsize=1)
def _vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed as one script, of the Vega-Lite version that Altair writes for."""
    import altair
    import vl_convert

    wanted = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    offered = vl_convert.get_vegalite_versions()
    make_bundle: Callable[..., str] = vl_convert.javascript_bundle  # its stub lacks the default of `snippet`
    bundle = make_bundle(vl_version=wanted if wanted in offered else offered[-1])
    # Inside a script element only these end or nest it; in JavaScript strings the backslash changes nothing.
    # The parser turns "\r" into "\n", which would change the hash in the policy.
    return bundle.replace("\r", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _embedded(value: Any, markup: type[Markup]) -> Markup:
    """JSON that no content can break out of a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII only
    return markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
