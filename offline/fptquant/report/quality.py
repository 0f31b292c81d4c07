"""How far a checkpoint is from its original, as figures."""

from __future__ import annotations

from dataclasses import dataclass

# Times the original's perplexity: above what the default recipe gives at any precision (docs/quantize.md).
USABLE = 1.5


@dataclass(frozen=True)
class Quality:
    """Means over all predicted tokens; perplexities are their exponentials."""

    windows: int
    length: int
    original: float  # perplexity
    quantized: float  # perplexity
    kl: float  # KL(original | quantized), nats per token
    agreement: float  # share of tokens with the same most likely successor

    @property
    def warning(self) -> str:
        """That the checkpoint is too far from its original to be used; empty where it isn't."""
        ratio = self.quantized / self.original
        if ratio <= USABLE:
            return ""
        return f"perplexity is {ratio:.2f} times the original's, above {USABLE}: not usable as it is"

    def line(self) -> str:
        """To be read."""
        on = f"{self.windows} windows of {self.length} tokens of calibration text that nothing was fitted to"
        return quality_line(self.original, self.quantized, self.kl, self.agreement, on)


def quality_line(before: float, after: float, kl: float, agreement: float, on: str) -> str:
    """Two perplexities, KL divergence in nats per token, share of equal most likely tokens, and what was measured."""
    return (
        f"quality: perplexity {before:.2f} -> {after:.2f} ({after / before:.2f}x), KL divergence {kl:.4f} nats, "
        f"top-1 agreement {100 * agreement:.1f} % ({on})"
    )
