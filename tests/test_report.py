"""The page and its figures: self-contained, escaped, and looked at in a real browser."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from deblur_deploy.evaluation import plots
from deblur_deploy.evaluation.page import Figure, Page, Picture, Table, pictures_of, write_page
from deblur_deploy.evaluation.plots import Point
from deblur_deploy.evaluation.quality import Pair
from tests import browser

POINTS = [
    Point(label="int8, cpu", group="ours", milliseconds=100, psnr=30.0),
    Point(label="<eager> & slow", group="theirs", milliseconds=900, psnr=30.1),
    Point(label="beaten", group="theirs", milliseconds=1000, psnr=29.0),
]
FIGURES = {
    "pareto": plots.pareto(POINTS, 27.0, "1280x720"),
    "latency": plots.latency_by_size({"int8, cpu": {0.2: 30, 0.9: 110}, "fp32, cpu": {0.2: 90, 0.9: 400}}),
    "shares": plots.shares({"int8": 0.4, "fp32": 0.9}, "share, %"),
}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("page") / "report.html"
    photos = [rng.integers(0, 256, (60, 90, 3), np.uint8) for _ in range(2)]
    write_page(
        path,
        Page(
            title="Some <model>",
            lead="a lead",
            pictures=[Picture(before=photo, after=255 - photo, caption="a < b") for photo in photos],
            shown="int8",
            figures=[Figure(heading=name, svg=svg) for name, svg in FIGURES.items()],
            tables=[Table(heading="T", columns=["name", "value"], rows=[["<x>", "1.5"]], note="n")],
            notes=["& done"],
        ),
    )
    return path


def test_the_page_needs_nothing_but_itself_and_escapes_what_it_is_given(page):
    html = page.read_text()
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?!data:|#)[a-z]+:""", html)
    assert "<script" not in html
    for text in ("Some &lt;model&gt;", "a &lt; b", "&lt;x&gt;", "&amp; done"):
        assert text in html
    assert "<model>" not in html
    assert html.count("data:image/jpeg;base64,") == 4


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_svg_in_the_colour_of_their_page_and_the_same_every_time(name):
    svg = FIGURES[name]
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg")
    assert "currentColor" in svg
    assert "#010203" not in svg
    assert "DejaVu" not in svg
    ids = re.findall(r'\bid="([^"]+)"', svg)
    others = [
        identity for other in FIGURES if other != name for identity in re.findall(r'\bid="([^"]+)"', FIGURES[other])
    ]
    assert not set(ids) & set(others)
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
    if name == "pareto":
        assert plots.pareto(POINTS, 27.0, "1280x720") == svg
        assert all(label in "".join(root.itertext()) for label in ("int8, cpu", "<eager> & slow", "blurred input"))
    assert ElementTree.fromstring(plots.for_file(svg)).find("{*}style") is not None


def test_many_points_of_one_quality_still_have_labels_apart():
    points = [Point(label=f"n{k}", group="g", milliseconds=100 + k / 10, psnr=30.0) for k in range(12)]
    root = ElementTree.fromstring(plots.pareto(points, None, "1x1"))
    texts = [text for text in root.findall(".//{*}text") if (text.text or "").startswith("n")]
    assert len(texts) == 12
    places = [
        tuple(map(float, re.findall(r"rotate\(\S+ ([\d.]+) ([\d.]+)\)", text.get("transform"))[0])) for text in texts
    ]
    across = sorted(x for x, _ in places)
    assert min(b - a for a, b in itertools.pairwise(across)) > 9


def test_pictures_are_spread_over_the_pairs_and_say_what_they_gained():
    images = [np.full((12, 12, 3), value, np.uint8) for value in range(0, 200, 20)]
    pairs = [Pair(name=str(k), blurred=image + 10, sharp=image) for k, image in enumerate(images)]
    shown = pictures_of(pairs, lambda image: image - 5, count=4)
    assert [picture.caption.split(":")[0] for picture in shown] == ["0", "2", "4", "6"]
    assert shown[0].caption == "0: 28.13 → 34.15 dB"


@pytest.mark.slow
@pytest.mark.skipif(not (browser.CHROMIUM and browser.CHROMEDRIVER), reason="no chromium and chromedriver on PATH")
def test_in_a_real_browser_images_load_the_slider_moves_and_nothing_is_fetched(page):
    with browser.Browser() as chromium:
        chromium.open(page.as_uri())
        sizes = chromium.script("return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])")
        assert sizes == [[True, 90, 60]] * 4
        assert chromium.script("return document.querySelectorAll('svg').length") == 3
        shown = "return getComputedStyle(document.querySelectorAll('.after')[arguments[0]]).clipPath"
        assert chromium.script(shown, 0) == "inset(0px 0px 0px 50%)"
        left, top, width, height = chromium.script(
            "const r = document.querySelector('.compare').getBoundingClientRect();"
            "return [r.left, r.top, r.width, r.height]"
        )
        assert height == pytest.approx(width * 60 / 90, abs=1)
        chromium.drag(left + width / 2, top + height / 2, left + 0.8 * width)
        divided = float(chromium.script(shown, 0).split()[-1].rstrip("%)"))
        assert divided == pytest.approx(80, abs=3)
        assert chromium.script(shown, 1) == "inset(0px 0px 0px 50%)"
        colours = {}
        for scheme in ("light", "dark"):
            chromium.devtools(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
            )
            colours[scheme] = chromium.script(
                "return [getComputedStyle(document.body).color,"
                "getComputedStyle(document.querySelector('svg text')).fill]"
            )
        assert colours == {"light": ["rgb(0, 0, 0)"] * 2, "dark": ["rgb(255, 255, 255)"] * 2}
        assert chromium.log("browser") == []
        requested = re.findall(
            r'"method":"Network.requestWillBeSent".*?"url":"([^"]+)"', str(chromium.log("performance"))
        )
        assert all(url.startswith(("data:", page.as_uri())) for url in requested)
        assert chromium.script("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
@pytest.mark.skipif(not (browser.CHROMIUM and browser.CHROMEDRIVER), reason="no chromium and chromedriver on PATH")
@pytest.mark.parametrize("path", ["benchmarks/results/report.html", "models/hd/report.html"])
def test_the_committed_pages_work_in_a_real_browser(path):
    with browser.Browser() as chromium:
        chromium.open((Path(__file__).parents[1] / path).as_uri())
        loaded = chromium.script("return [...document.images].map(i => i.complete && i.naturalWidth > 0)")
        assert len(loaded) >= 4
        assert all(loaded)
        assert chromium.script("return document.querySelectorAll('table').length") >= 2
        assert chromium.log("browser") == []
        assert chromium.script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_model_that_makes_photographs_worse_has_a_figure_too():
    assert "blurred input" in plots.pareto(POINTS, 60.0, "1280x720")
