"""How far a checkpoint is from its original, as figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quality:
    """Means over all predicted tokens; perplexities are their exponentials."""

    windows: int
    length: int
    original: float  # perplexity
    quantized: float  # perplexity
    kl: float  # KL(original | quantized), nats per token
    agreement: float  # share of tokens with the same most likely successor

    def line(self) -> str:
        """To be read."""
        return (
            f"quality: perplexity {self.original:.2f} -> {self.quantized:.2f}, KL divergence {self.kl:.4f} nats, "
            f"top-1 agreement {100 * self.agreement:.1f} % ({self.windows} windows of {self.length} tokens of "
            "calibration text that nothing was fitted to)"
        )
