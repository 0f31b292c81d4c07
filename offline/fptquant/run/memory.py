"""How much memory a run may take, and whether the whole model fits."""

from __future__ import annotations

import torch

from fptquant import parallel
from fptquant.devices import free_memory
from fptquant.errors import FPTQuantError
from fptquant.layers.residency import Residency
from fptquant.run.job import Job
from fptquant.run.needs import expected_memory


def room_for(device: torch.device, limit: int | None) -> int:
    """Bytes that this process may take where the model is: the user's limit, or its share of what is free there."""
    sharing = parallel.ranks()[1] if device.type == "cpu" else 1  # the processes of a machine share its memory
    return free_memory(device) // sharing if limit is None else limit


def choose_residency(job: Job, wanted: Residency | None, limit: int | None) -> Residency:
    """What of the model stays in memory.

    Args:
        job: to be done.
        wanted: by the user; None for the whole model where it fits.
        limit: bytes that a process may take where the model is; None for its share of what is free there.

    Raises:
        FPTQuantError: not even a layer at a time fits into the user's limit.
    """
    room = room_for(job.device, limit)
    residency: Residency = wanted or ("resident" if expected_memory(job, "resident", room) <= room else "streamed")
    needed = expected_memory(job, residency, room)
    if needed > room and limit is not None:
        remedy = "lower calibration.sequences or calibration.length, or raise --max-memory"
        if residency == "resident":
            remedy = f"streamed needs about {expected_memory(job, 'streamed', room) / 1e9:.1f} GB; or {remedy}"
        raise FPTQuantError(
            f"--max-memory: {limit / 1e9:.1f} GB are less than {needed / 1e9:.1f} GB, which {residency} takes: {remedy}"
        )
    return residency
