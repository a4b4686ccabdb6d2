"""The two pages of a bundle for people: ``report.html``, self-contained, and the model card ``README.md``."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2

from deblur_deploy.evaluation.quality import Pair, psnr
from deblur_deploy.pipeline.artifact import Artifact, Measured
from deblur_deploy.runtime.engine import DeblurEngine
from deblur_deploy.runtime.media import Image

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("deblur_deploy.pipeline", "templates"),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)

_SHOWN = 4


def write_report(
    path: Path, summary: dict[str, Any], results: Sequence[Measured], pairs: Sequence[Pair], shown: Artifact
) -> None:
    """Pictures before and after (by the variant ``shown``, on the CPU), and the table of all variants."""
    engine = DeblurEngine(shown.path, provider="cpu")
    step = max(len(pairs) // _SHOWN, 1)
    pictures = []
    for pair in list(pairs)[::step][:_SHOWN]:
        restored = engine(pair.blurred)
        pictures.append(
            {
                "name": pair.name,
                "before": _data_url(pair.blurred),
                "after": _data_url(restored),
                "truth": _data_url(pair.sharp),
                "psnr_before": psnr(pair.blurred, pair.sharp),
                "psnr_after": psnr(restored, pair.sharp),
            }
        )
    _render("report.html.j2", path, summary=summary, results=results, pictures=pictures, shown=shown.name)


def write_card(path: Path, summary: dict[str, Any], results: Sequence[Measured]) -> None:
    """What the model is, what was measured of it, how it is embedded."""
    _render("card.md.j2", path, summary=summary, results=results)


def _render(template: str, path: Path, **values: object) -> None:
    path.write_text(_TEMPLATES.get_template(template).render(**values), encoding="utf-8")


def _data_url(image: Image) -> str:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
