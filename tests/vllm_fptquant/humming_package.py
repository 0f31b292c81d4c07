"""The real Humming package without a GPU: made to believe in one, its kernels compiled to PTX.

The package is not a dependency of ours. Fetch it, and NVIDIA's run-time compiler, with `scripts/fetch_humming.py`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fetch_humming import DIRECTORY
from tests.vllm_fptquant import ptx

GPUS = {  # capability: multiprocessors, shared memory of a block
    75: (40, 64 << 10),
    80: (108, 163 << 10),
    86: (84, 99 << 10),
    89: (128, 99 << 10),
    90: (132, 227 << 10),
    100: (148, 227 << 10),
    103: (148, 227 << 10),
    120: (170, 99 << 10),
}


class Cuda130:
    """The compiler of CUDA 13.0, as Humming sees it."""

    @staticmethod
    def signature() -> str:
        return "nvrtc+13.0"


class Cuda135(Cuda130):
    """Of CUDA 13.5."""

    @staticmethod
    def signature() -> str:
        return "nvrtc+13.5"


COMPILERS = {(13, 0): lambda: Cuda130, (13, 5): lambda: Cuda135}


class Gpu:
    """What Humming asks of a device; peak speeds only steer its choice of tiles."""

    index, name, is_ppu = 0, "pretended", False
    max_registers_per_sm, memory_bandwidth_gbps = 65536, 1500.0
    l2_cache_size, l2_cache_size_mb = 40 << 20, 40.0
    tensorcore_tops = {"float16": 300.0, "bfloat16": 300.0, "float8e4m3": 600.0, "int8": 600.0, "int4": 1200.0}

    def __init__(self, capability: int) -> None:
        self.sm_version, self.sm_major, self.sm_minor = capability, capability // 10, capability % 10
        self.sm_count, self.max_smem_size = GPUS[capability]


class Package:
    """Humming on a pretended GPU."""

    def __init__(self) -> None:
        self.device = importlib.import_module("humming.device")
        self.transform = importlib.import_module("humming.transform")
        self.kernel = importlib.import_module("humming.kernel.humming").HummingKernel
        self.tune = importlib.import_module("humming.tune")
        self.compiler = importlib.import_module("humming.jit.compiler").NVRTCCompiler
        self.schema = importlib.import_module("humming.schema")
        self.repacking = importlib.import_module("humming.kernel.repack_weight").RepackWeightKernel
        self.runtime = importlib.import_module("humming.jit.runtime").KernelRuntime
        # No machine code: there is nothing to run it on.
        self.runtime.prepare = self.kernel.register_kernel = lambda _: None

    def pretend(self, capability: int, cuda: tuple[int, int] = (13, 0)) -> None:
        """Believes in a GPU of this capability and a compiler of this version."""
        gpu = Gpu(capability)
        instances = self.device.DeviceInfo._instances
        if 0 not in instances:
            instances[0] = object.__new__(self.device.DeviceInfo)
            instances[0]._index = 0
        instances[0]._value = gpu  # the same instance for all: vLLM 0.32 keeps it
        self.device.current_device._value = gpu
        self.transform.DeviceInfo = lambda device: gpu
        self.runtime._instances.clear()  # kernels made for another compiler, or with other options
        self.runtime._get_compiler = staticmethod(COMPILERS[cuda])

    def kernels(self, config: str, compute: str) -> list[tuple[int, int, dict[str, Any], Any]]:
        """For each range of rows (more than, up to): Humming's choice of tiles, and the kernel's source."""
        layer = importlib.import_module("humming.config").LayerConfig(**json.loads(config))
        options = json.loads(compute)
        choices = self.tune._get_heuristics_config(
            layer, None, options["use_f16_accum"], options["use_batch_invariant"], False, options["gemm_type"], 0, False
        )
        found = []
        for low, high, tiles in choices:
            fields = {**json.loads(config), **options, **tiles}
            fields.pop("num_sms", None)
            found.append((low, high, tiles, self.kernel(**fields)))
        return found

    def repack(self, inputs: torch.Tensor, capability: int, **options: Any) -> torch.Tensor:
        """`humming.ops.repack_weight` for weights (1, N, K / 8): its CUDA kernel, executed here."""
        fields = {field.name for field in dataclasses.fields(self.repacking)}
        kernel = self.repacking(**{name: value for name, value in options.items() if name in fields})
        kernel.code = "#define NDEBUG\n" + kernel.code  # without its assertions: they are calls
        program = ptx.Program(self.compile(kernel, f"compute_{capability}").rstrip(b"\0").decode(), threads=32)
        (_, n, words), memory = inputs.shape, ptx.Memory()
        k, shape = words * 8, (words // 4, n * 4)
        source, target = memory.place(inputs.numpy()), memory.place(np.zeros(shape, np.int32))
        arguments = [source, target, 0, n, k, n, k, options["interleave_mode"]]
        ptx.run(program, memory, arguments, (-(-n // 64), -(-k // 64)), 1 << 16)
        return torch.from_numpy(memory.read(target, shape, np.int32))[None]

    def compile(self, kernel: Any, architecture: str) -> bytes:
        """PTX of a kernel for `compute_80`, or machine code for `sm_80`, by NVIDIA's run-time compiler."""
        nvidia = DIRECTORY / "nvidia" / "cu13"
        library = ctypes.CDLL(str(next((nvidia / "lib").glob("libnvrtc.so*"))))
        headers = self.compiler._STD_HEADER_SHIMS
        program, size = ctypes.c_void_p(), ctypes.c_size_t()

        def strings(items: Any) -> Any:
            items = [item.encode() for item in items]
            return (ctypes.c_char_p * len(items))(*items)

        source, expression = kernel.code.encode(), " ".join(kernel.kernel_expr.split()).encode()
        library.nvrtcCreateProgram(
            ctypes.byref(program), source, b"kernel.cu", len(headers), strings(headers.values()), strings(headers)
        )
        library.nvrtcAddNameExpression(program, expression)
        folders = [DIRECTORY / "humming" / "include", nvidia / "include", nvidia / "include" / "cccl"]
        options = [
            f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", "-DHUMMING_DEBUG_KERNEL=0",
            "--dopt=on", "-extra-device-vectorization", "-w", *[f"-I{folder}" for folder in folders],
        ]  # fmt: skip
        failed = library.nvrtcCompileProgram(program, len(options), strings(options))
        kind = "ProgramLog" if failed else "CUBIN" if architecture.startswith("sm_") else "PTX"
        getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{kind}")(program, text)
        library.nvrtcDestroyProgram(ctypes.byref(program))
        assert not failed, text.value.decode()[:2000]
        return text.raw


@pytest.fixture(scope="module")
def package() -> Iterator[Package]:
    """The package, importable while a module's tests run."""
    if not DIRECTORY.is_dir():
        pytest.skip("Humming is not there: python scripts/fetch_humming.py")
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # else importing it starts builds in the background
    sys.path.insert(0, str(DIRECTORY))
    try:
        yield Package()
    finally:
        sys.path.remove(str(DIRECTORY))
        torch._dynamo.reset()
