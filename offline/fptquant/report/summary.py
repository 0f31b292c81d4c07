"""What a run did, as it is recorded in the checkpoint: `summary.json`."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import FiniteFloat

from fptquant.report.quality import Quality


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    output: str  # name of the directory; where on this machine is nobody else's business
    seconds: dict[str, FiniteFloat]
    peak_memory_bytes: int  # largest of the stages
    source_bytes: int
    output_bytes: int
    bits_per_weight: float = 0.0  # of the layers' projections
    source_fingerprint: str = ""
    budget: str = ""
    notes: tuple[str, ...] = ()  # what is odd and may be meant, for the user to read
    peak_bytes: dict[str, int] = field(default_factory=dict)  # of each stage
    quality: Quality | None = None
    warning: str = ""  # that the checkpoint is not usable, and what may help
    provenance: dict[str, str] = field(default_factory=dict)
