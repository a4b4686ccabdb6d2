"""One self-contained page: pictures before and after, figures, tables.

The bundle's ``report.html``, ``deblur-bench --html`` and the project's own benchmark report are this page with other
content.  It needs no server, no network and no script but the slider's one line.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2

from deblur_deploy.evaluation.quality import Pair, Restorer, psnr
from deblur_deploy.files import writing_file
from deblur_deploy.media.images import Image

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("deblur_deploy.evaluation", "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One photograph before and after, both uint8 HxWx3 RGB of one size."""

    before: Image
    after: Image
    caption: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An SVG of :mod:`plots`."""

    heading: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; numbers are aligned to the right, the first column to the left."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that a page shows, in this order."""

    title: str
    lead: str
    pictures: Sequence[Picture] = ()
    shown: str = ""
    """What restored the pictures."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


def write_page(path: Path, page: Page) -> None:
    """Write the page, whole or not at all."""
    html = _TEMPLATES.get_template("page.html.j2").render(page=page, data_url=_data_url)
    with writing_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def pictures_of(pairs: Sequence[Pair], restorer: Restorer, count: int = 4) -> list[Picture]:
    """``count`` of the pairs, spread over them, restored by ``restorer``."""
    pictures = []
    for at in range(0, len(pairs), max(len(pairs) // count, 1))[:count]:
        pair = pairs[at]
        restored = restorer(pair.blurred)
        before, after = psnr(pair.blurred, pair.sharp), psnr(restored, pair.sharp)
        caption = f"{pair.name}: {before:.2f} → {after:.2f} dB"
        pictures.append(Picture(before=pair.blurred, after=restored, caption=caption))
    return pictures


def _data_url(image: Image) -> str:
    _, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 90])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
