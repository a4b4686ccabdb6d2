"""Which file of a bundle to run: the fastest that loses no more quality than allowed, for one provider."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from deblur_deploy.bundles.manifest import Bundle, Variant
from deblur_deploy.contract import Precision
from deblur_deploy.errors import ModelError
from deblur_deploy.runtime.providers import Provider

Wish = Literal["auto", "fp32", "fp16", "bf16", "int8"]

MAX_DROP_DB = 0.1
"""PSNR against the fp32 variant that ``auto`` may give up for speed."""

_USUALLY_FASTEST: dict[str, tuple[Precision, ...]] = {
    "cpu": ("int8", "fp32", "fp16"),
    "openvino": ("int8", "fp32", "fp16"),
}
_ON_GPUS: tuple[Precision, ...] = ("fp16", "fp32", "int8")


def suits(layout: str, provider: str) -> bool:
    """Whether a file of this layout may run on this provider: ``rows`` is for ONNX Runtime's own CPU kernels alone.

    OpenVINO (2026.4) shifts channels of an int8 graph in ``rows`` whose sizes are free, and photographs lose 0.1 dB.
    """
    return layout != "rows" or provider == "cpu"


def choose_variant(bundle: Bundle, provider: Provider, precision: str) -> Variant:
    """The uint8 variant to run on ``provider``.

    ``auto`` takes the fastest by the bundle's own measurements on this provider, or, where there are none, by what is
    usually the fastest; never one that was measured to be slower than fp32 there, or whose layout does not suit it.
    Raises ModelError if the bundle has no such variant of the precision.
    """
    # OpenVINO makes bf16 out of the fp32 file.
    wanted = "fp32" if precision == "bf16" else precision
    if wanted == "auto":
        names = {*provider.recorded_as}
        variants = [v for v in within_budget(bundle, provider) if names.isdisjoint(v.slower_than_fp32_on)]
    else:
        variants = [variant for variant in _usable(bundle, provider) if variant.precision == wanted]
    if not variants:
        raise ModelError(f"bundle {bundle.path} has no {wanted} variant; it has {_names(bundle.variants.values())}")
    measured = [name for name in provider.recorded_as if all(name in other.latency_ms for other in variants)]
    order = _USUALLY_FASTEST.get(provider.name, _ON_GPUS)

    def cost(variant: Variant) -> tuple[float, int, bool]:
        rank = order.index(variant.precision) if variant.precision in order else len(order)
        return variant.latency_ms[measured[0]] if measured else 0.0, rank, variant.layout != "rows"

    return min(variants, key=cost)


def within_budget(bundle: Bundle, provider: Provider) -> list[Variant]:
    """The uint8 variants for ``provider`` that lose no more quality than ``auto`` may give up."""
    return [variant for variant in _usable(bundle, provider) if variant.drop_db <= MAX_DROP_DB]


def _usable(bundle: Bundle, provider: Provider) -> list[Variant]:
    return [v for v in bundle.variants.values() if v.io == "uint8" and suits(v.layout, provider.name)]


def float_variant(bundle: Bundle) -> Variant:
    """The variant with float32 in and out, for images of more than 8 bits; raises ModelError if there is none."""
    for variant in bundle.variants.values():
        if variant.io == "float32":
            return variant
    raise ModelError(
        f"bundle {bundle.path} has no float variant, which uint16 and float images need; "
        f"it has {_names(bundle.variants.values())}"
    )


def _names(variants: Iterable[Variant]) -> str:
    return ", ".join(sorted(variant.name for variant in variants)) or "none"
