"""`make bench`: speed and memory of every way to serve SmolLM2 on this machine, in one table from one run.

Each row is measured in processes of its own (`measure_speed.py`), `--rounds` times, in turn, so that a drift of the
machine's speed meets all rows alike; the table shows medians, and ratios to vLLM serving the same model unquantized in
float32. Speed doesn't depend on how well weights are rounded, so the checkpoints are rounded to nearest with little
calibration; their accuracy is not what is measured here. `--llama-cpp` measures llama.cpp beside them, whose source it
builds in an environment of its own first, `.venv-llama-cpp`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
QUICK = ["--recipe", str(Path(__file__).with_name("quick.yaml"))]
ALL_TRANSFORMS = "T_k,T_v,T_u,T_r,T_d,S_n"
CHECKPOINTS = {
    "fptquant w4a8kv8": ["--precision", "w4a8kv8"],
    "fptquant w4a4kv4": ["--precision", "w4a4kv4"],
    "w4a8kv8, no transform": ["--precision", "w4a8kv8", "--without", ALL_TRANSFORMS],
    "w4a4kv4, no transform": ["--precision", "w4a4kv4", "--without", ALL_TRANSFORMS],
    "w4a8, no transform": ["--precision", "w4a8", "--without", ALL_TRANSFORMS],
}
BASELINE = "float32"
NATIVE = "compressed-tensors W8A8 static"
LLAMA_CPP = ".venv-llama-cpp"
LLAMA_CPP_SOURCE = "llama-cpp-python==0.3.36"
# Its AMX product ended with a segmentation fault on a virtual machine (docs/log.md, 2026-11-28).
WITHOUT_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
LLAMA_CPP_SPEED = ROOT / "benchmarks" / "llama_cpp_speed.py"
LLAMA_CPP_MODELS = {f"llama.cpp {kind}": kind for kind in ("ALL_F32", "MOSTLY_Q8_0", "MOSTLY_Q4_0")}
BUSY = 0.1  # cores that other processes use, from which on the table says so
METRICS = ("prefill_tokens_per_second", "decode_1_tokens_per_second", "decode_8_tokens_per_second", "resident_bytes")


def main() -> None:
    """Quantizes what is missing, measures, prints a Markdown table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="checkpoints and results")
    parser.add_argument("--rounds", type=int, default=1)
    # vLLM itself serves with one thread on CPUs unless OMP_NUM_THREADS says otherwise.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of rows (the float32 row is always measured)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--llama-cpp", action="store_true", help="also llama.cpp, built from source at first (minutes)")
    arguments = parser.parse_args()
    models = prepare(arguments.work) | (prepare_llama_cpp(arguments.work) if arguments.llama_cpp else {})
    if arguments.only:
        models = {name: path for name, path in models.items() if name == BASELINE or name in arguments.only}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for number in range(arguments.rounds):
        for name, path in models.items():
            print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
            results[name].append(measure(path, arguments.threads, arguments.compiled))
            (arguments.work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results, arguments.threads, arguments.compiled)


def prepare(work: Path) -> dict[str, Path]:
    """Directory of each row's checkpoint, made if it isn't there."""
    from fetch_smollm2 import fetch

    source, fptquant = fetch(), Path(sys.executable).parent / "fptquant"
    models = {BASELINE: source}
    for name, options in CHECKPOINTS.items():
        output = work / name.replace(" ", "-").replace(",", "")
        if not output.is_dir():
            subprocess.run([fptquant, "quantize", source, "-o", output, *QUICK, *options], check=True)
        models[name] = output
    native = work / "compressed-tensors-w8a8"
    if not native.is_dir():
        subprocess.run([fptquant, "export", models["w4a8, no transform"], "-o", native, "--quality", "0"], check=True)
    models[NATIVE] = native
    return models


def prepare_llama_cpp(work: Path) -> dict[str, Path]:
    """GGUF files of each row, made from the one that SmolLM2 came in, by llama.cpp itself."""
    from environments import Environment
    from fetch_smollm2 import SMOLLM2, join

    environment = Environment(LLAMA_CPP)
    python = environment.python
    flags = WITHOUT_AMX if "amx_tile" in Path("/proc/cpuinfo").read_text() else ""
    options = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CFLAGS": flags, "CXXFLAGS": flags}

    def build() -> None:
        print(f"building {LLAMA_CPP_SOURCE} (minutes)", file=sys.stderr, flush=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, LLAMA_CPP_SOURCE], env={**os.environ, **options}, check=True)

    environment.filled_once(LLAMA_CPP_SOURCE, build)
    models = {name: work / f"{kind}.gguf" for name, kind in LLAMA_CPP_MODELS.items()}
    missing = [name for name, file in models.items() if not file.is_file()]
    if missing:
        quantize: list[str | Path] = [python, LLAMA_CPP_SPEED, "quantize"]
        with tempfile.TemporaryDirectory(dir=work) as folder:
            source = join(SMOLLM2, Path(folder))
            for name in missing:
                subprocess.run([*quantize, source, models[name], LLAMA_CPP_MODELS[name]], check=True)
    return models


def measure(model: Path, threads: int, compiled: bool) -> dict[str, float]:
    """Measures one model in a process of its own; adds how many cores other processes used in the meantime."""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
    }
    if model.suffix == ".gguf":
        command = [str(ROOT / LLAMA_CPP / "bin" / "python"), str(LLAMA_CPP_SPEED), "measure", str(model)]
        command += ["--threads", str(threads)]
    else:
        command = [sys.executable, str(ROOT / "benchmarks" / "measure_speed.py"), str(model)]
        command += ["--compiled"] if compiled else []
    start, busy, own = time.perf_counter(), busy_seconds(), child_seconds()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    others = (busy_seconds() - busy - (child_seconds() - own)) / (time.perf_counter() - start)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result | {"others": others}


def busy_seconds() -> float:
    """Seconds that all cores together have worked since the machine was started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def child_seconds() -> float:
    """Seconds of CPU that finished child processes took."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def print_table(results: dict[str, list[dict[str, float]]], threads: int, compiled: bool) -> None:
    """Medians, with the ratio to float32 beside every figure."""
    middle = {
        name: {metric: statistics.median(run[metric] for run in runs) for metric in METRICS}
        for name, runs in results.items()
    }
    base = middle[BASELINE]
    print(f"\n{processor()}, {threads} threads, {'compiled' if compiled else 'eager'}, {platform.python_version()}\n")
    print("| SmolLM2-135M | prefill 1024 tok/s | decode batch 1 tok/s | decode batch 8 tok/s | resident MB |")
    print("|---|---|---|---|---|")
    for name, row in middle.items():
        cells = [f"{row[m]:.1f} ({row[m] / base[m]:.2f}x)" for m in METRICS[:3]]
        print(f"| {name} | {' | '.join(cells)} | {row['resident_bytes'] / 1e6:.0f} |")
    others = max(run["others"] for runs in results.values() for run in runs)
    if others > BUSY:
        print(f"\n**The machine was busy**: other processes used up to {others:.1f} cores while a row was measured.")
    for precision in ("w4a8kv8", "w4a4kv4"):
        with_all, without = middle.get(f"fptquant {precision}"), middle.get(f"{precision}, no transform")
        if with_all and without:
            costs = ", ".join(
                f"{m.split('_tokens')[0]} {100 * (1 - with_all[m] / without[m]):.1f} %" for m in METRICS[:3]
            )
            print(f"\nAll transforms together cost at {precision}: {costs} of throughput.")


def processor() -> str:
    """Name of the CPU, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
