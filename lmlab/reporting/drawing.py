"""A specification as images. Processes of their own import this, so it imports little."""

from typing import Any

import vl_convert


def svg_and_png(spec: dict[str, Any]) -> tuple[str, bytes]:
    """A Vega-Lite specification with its data, drawn without a browser."""
    svg = vl_convert.vegalite_to_svg(spec)
    return svg, vl_convert.svg_to_png(svg, scale=2)
