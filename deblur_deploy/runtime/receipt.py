"""What really ran: the engine's word on provider, device, arithmetic, threads and time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Facts of one loaded file: shares and times as ONNX Runtime answered, arithmetic as it was told to compute."""

    model: str
    """Name of the bundle, or of the file."""
    variant: str
    """Which file of the bundle: ``fp32``, ``fp16``, ``int8``, ``float``."""
    provider: str
    device: str
    precision: str
    """Precision of the file."""
    effective_precision: str
    """Arithmetic of the convolutions: OpenVINO runs an fp32 file in bf16 where the processor can, if allowed to, and
    CUDA an int8 file in tf32."""
    threads: int
    nodes: dict[str, float]
    """Share of the graph's nodes by provider; they sum to 1."""
    macs: dict[str, float]
    """Share of the multiply-accumulates by provider (all of ours are in convolutions); they sum to 1."""
    load_ms: float
    """Time to read the file and compile the graph."""
    warm_up_ms: float
    """Time of the first run, of a small image, which proves that the provider works."""
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    """Providers that ``auto`` would have preferred, and why they were not used."""
    tuned: str | None = None
    """When ``deblur-bench --tune`` measured this choice here, by ISO 8601; None if the engine's own rules made it."""
    tiles: str = "exact"
    """How an image that is too large for memory is cut: ``exact``, with the whole image's result; ``never``, since the
    network sees all of it, and it is refused; or ``approximate``, by wish."""

    def __str__(self) -> str:
        precision = self.effective_precision
        if precision != self.precision:
            precision += f" (file: {self.precision})"
        tuned = f", tuned {self.tuned[:10]}" if self.tuned else ""
        cut = "" if self.tiles == "exact" else f", tiles: {self.tiles}"
        # A network without convolutions has none that are counted.
        share = f"{self.macs.get(self.provider, 0.0):.0%} of MACs there, " if self.macs else ""
        return (
            f"{self.model}/{self.variant} on {self.provider} ({self.device}), {precision}, {self.threads} threads, "
            f"{share}loaded in {self.load_ms:.0f} ms{tuned}{cut}"
        )
