"""Records what vLLM's GPU wheel offers to `vllm_fptquant`: signatures, operator schemas, compiled Marlin kernels.

    python scripts/record_gpu_contract.py                # downloads the wheel, writes gpu_contract.json of the tests
    python scripts/record_gpu_contract.py --check 0.32.0 # compares another version with that file, writes nothing

The wheel (about 340 MB) needs no GPU to be read: signatures come from its Python source, schemas and kernels from the
strings of its library.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

VERSION = "0.33.0"
RECORD = Path(__file__).parents[1] / "tests/vllm_fptquant/gpu_contract.json"
WHEELS = Path.home() / ".cache/vllm-fptquant/wheels"
LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
EXPERTS_LIBRARY = "vllm/_moe_C_stable_libtorch.abi3.so"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux1_x86_64")

# Functions and operators that `vllm_fptquant` calls on GPUs.
MARLIN_UTILS = "vllm/model_executor/layers/quantization/utils/marlin_utils.py"
TRITON = "vllm/model_executor/layers/quantization/compressed_tensors/triton_scaled_mm.py"
FUNCTIONS = {
    "vllm/_custom_ops.py": (
        "cutlass_scaled_mm",
        "cutlass_scaled_mm_azp",
        "gptq_marlin_repack",
        "hadacore_transform",
        "moe_align_block_size",
        "moe_wna16_marlin_gemm",
    ),
    MARLIN_UTILS: ("get_marlin_workspace", "marlin_padded_nk", "marlin_permute_scales", "_marlin_gemm"),
    TRITON: ("triton_scaled_mm",),
}
# What is called of Humming, which vLLM reaches through `vllm.utils.humming` and requires in one exact version.
FACADE = "vllm/utils/humming.py"
HUMMING = {
    "humming/forward.py": ("humming_forward",),
    "humming/transform.py": ("prepare_and_transform_humming_tensors",),
    "humming/schema/humming.py": ("HummingInputSchema", "HummingWeightSchema"),
    "humming/config/config.py": ("LayerConfig",),
}
OPERATORS = {
    LIBRARY: ("cutlass_scaled_mm", "cutlass_scaled_mm_azp", "gptq_marlin_repack", "hadacore_transform", "marlin_gemm"),
    EXPERTS_LIBRARY: ("moe_align_block_size", "moe_wna16_marlin_gemm"),
}


def find_wheel(version: str, package: str = "vllm") -> Path | None:
    """The wheel of a version, if it was downloaded."""
    return next(iter(sorted(WHEELS.glob(f"{package.replace('-', '_')}-{version}-*.whl"))), None)


def fetch_wheel(version: str, package: str = "vllm") -> Path:
    """Downloads a wheel (vLLM's: for GPUs) from PyPI, once."""
    wheel = find_wheel(version, package)
    if wheel is None:
        WHEELS.mkdir(parents=True, exist_ok=True)
        platforms = [argument for platform in PLATFORMS for argument in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *platforms]
        subprocess.run([*command, "--dest", str(WHEELS), f"{package}=={version}"], check=True)
        wheel = find_wheel(version, package)
        assert wheel is not None
    return wheel


def derive(wheel: Path) -> dict[str, Any]:
    """The record of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        signatures = {
            f"{path}:{name}": signature
            for path, names in FUNCTIONS.items()
            for name, signature in signatures_of(archive.read(path).decode(), names).items()
        }
        exports = exports_of(archive.read(FACADE).decode())
        humming = required_humming(archive)
        libraries = {path: archive.read(path) for path in OPERATORS}
    return {
        "version": wheel.name.split("-")[1],
        "signatures": signatures,
        "operators": {
            name: schema
            for path, names in OPERATORS.items()
            for name, schema in schemas_of(libraries[path], names).items()
        },
        "humming": {
            "version": humming,
            "exports": {name: exports.get(name) for names in HUMMING.values() for name in names},
            "signatures": humming_signatures(fetch_wheel(humming, "humming-kernels")),
        },
        "marlin_channelwise": marlin_kernels(libraries[LIBRARY]),
        "marlin_experts_channelwise": marlin_kernels(libraries[EXPERTS_LIBRARY]),
    }


def signatures_of(source: str, names: tuple[str, ...], required: bool = True) -> dict[str, str]:
    """Parameters of top-level functions, as `a, b=1, *, c`, without annotations."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name in names:
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            found[node.name] = ast.unparse(node.args)
    missing = set(names) - set(found)
    if missing and required:
        raise SystemExit(f"the wheel has no {', '.join(sorted(missing))}")
    return found


def required_humming(archive: zipfile.ZipFile) -> str:
    """The one version of Humming that a vLLM wheel requires."""
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    version = re.search(r"^Requires-Dist: humming-kernels\[\w+\]==([\d.]+)", text, re.MULTILINE)
    if version is None:
        raise SystemExit("the wheel requires no version of humming-kernels")
    return version[1]


def exports_of(source: str) -> dict[str, str]:
    """What the facade offers: name to `module:attribute`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "_EXPORTS" and node.value is not None:
            exports: dict[str, str] = ast.literal_eval(node.value)
            return exports
    raise SystemExit("the facade has no _EXPORTS")


def humming_signatures(wheel: Path) -> dict[str, str]:
    """Parameters of the functions, and of the dataclasses' constructors."""
    found = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in HUMMING.items():
            source = archive.read(path).decode()
            classes = fields_of(source, names)
            functions = signatures_of(source, names, required=False)
            found.update({f"{path}:{name}": text for name, text in {**classes, **functions}.items()})
    return found


def fields_of(source: str, names: tuple[str, ...]) -> dict[str, str]:
    """Constructor parameters of keyword-only dataclasses."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name in names:
            fields = [
                ast.unparse(field.target) + (f"={ast.unparse(field.value)}" if field.value is not None else "")
                for field in node.body
                if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation)
            ]
            found[node.name] = ", ".join(["*", *fields])
    return found


def schemas_of(library: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Schemas of operators: strings of the library, `name(Tensor a, ...) -> Tensor`."""
    found = {}
    for name in names:
        schemas = set(re.findall(rb"\0(" + name.encode() + rb"\([^\0]*\) -> [^\0]+)\0", library))
        if len(schemas) != 1:
            raise SystemExit(f"the library has {len(schemas)} schemas of {name}")
        found[name] = " ".join(schemas.pop().decode().split())
    return found


def marlin_kernels(library: bytes) -> list[list[int]]:
    """Compiled Marlin kernels with channelwise scales: type ids of input, weight and output, and pipeline stages.

    Turing's have two stages, all others four. The mangled name holds the template's arguments: four type ids, threads,
    three tile sizes, a flag, stages, blocks in a group (n1 is -1: one scale per channel), a flag.
    """
    pattern = rb"6MarlinILl(\d+)ELl(\d+)ELl(\d+)ELl\d+ELi\d+ELi\d+ELi\d+ELi\d+ELb\dELi(\d+)ELin1ELb\dEE"
    return [list(kernel) for kernel in sorted({tuple(map(int, match)) for match in re.findall(pattern, library)})]


def main() -> None:
    """Writes the record, or compares another version with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="VERSION", help="compare this version with the record")
    version = parser.parse_args().check
    record = derive(fetch_wheel(version or VERSION))
    if version is None:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {RECORD}")
        return
    recorded = json.loads(RECORD.read_text())
    found = differences(recorded, record)
    print("\n".join(found) or f"{version} has what {recorded['version']} has")
    raise SystemExit(bool(found))


def differences(recorded: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What another version lacks or has changed, one line each."""
    found = [
        f"{name}: {value} -> {other[section].get(name)}"
        for section in ("signatures", "operators")
        for name, value in recorded[section].items()
        if value != other[section].get(name)
    ]
    mine, theirs = recorded["humming"], other["humming"]
    found += [
        f"Humming {theirs['version']}: {name}: {value} -> {theirs[section].get(name)}"
        for section in ("exports", "signatures")
        for name, value in mine[section].items()
        if value != theirs[section].get(name)
    ]
    lost = [
        f"Marlin kernel {kernel} is missing ({section})"
        for section in ("marlin_channelwise", "marlin_experts_channelwise")
        for kernel in recorded[section]
        if kernel not in other[section]
    ]
    return found + lost


if __name__ == "__main__":
    main()
