"""`python -m trainer.doctor`: checks whether training works on this machine. Prints one table, with advice for each
problem."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ambient_core import errors
from ambient_core.arguments import Parser

EXAMPLE = """examples:
  python -m trainer.doctor
  python -m trainer.doctor --shared /scratch/me/runs --tracking http://mlflow:5000

Exit codes: 0 nothing failed, 1 something failed. A warning concerns something that training can do without.
"""
SECONDS = 120
"""Time limit of a check that starts other processes. A server gets a quarter of it."""

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the table. advice: what to do if the verdict is not ok."""

    name: str
    verdict: Verdict
    detail: str
    advice: str = ""


def parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m trainer.doctor",
        description="Checks packages, devices, bf16, compiled kernels, attention, communication; on request a shared "
        "folder and MLflow.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--shared",
        type=Path,
        metavar="FOLDER",
        help="check a folder that all machines of a run share: write, rename and lock files in it",
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="print each finding as a line of JSON: name, verdict (ok, warn, fail), detail, advice",
    )
    p.add_argument("--tracking", metavar="URI", help="check the MLflow server at this address: list its experiments")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    checks: list[Callable[[], Iterator[Finding]]] = [
        packages,
        devices,
        arithmetic,
        compiled,
        attention,
        communication,
    ]
    if args.shared:
        checks.append(lambda: shared_folder(args.shared))
    if args.tracking:
        checks.append(lambda: tracking(args.tracking))
    failed = False
    for check in checks:
        for finding in check():
            failed |= finding.verdict == "fail"
            if args.json:
                print(json.dumps(dataclasses.asdict(finding)), flush=True)
                continue
            print(f"{finding.verdict:<5} {finding.name:<16} {finding.detail}", flush=True)
            if finding.advice:
                print(f"{'':<22} -> {finding.advice}", flush=True)
    if not args.json:
        print("\nsomething failed" if failed else "\nnothing failed")
    return errors.FAILED if failed else errors.DONE


def packages() -> Iterator[Finding]:
    """Checks that the packages of provenance.PACKAGES are installed, and looks for a C++ compiler."""
    from trainer.tracking.provenance import PACKAGES, version_of

    versions = {name: version_of(name) for name in PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    text = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        yield Finding("packages", "fail", f"missing: {', '.join(missing)}", "make install, or pip install -e .")
    else:
        yield Finding("packages", "ok", f"Python {sys.version.split()[0]}, {text}")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        yield Finding("compiler", "ok", compiler)
    else:
        yield Finding("compiler", "warn", "none", "only engine.compile needs one: install a C++ compiler")


def devices() -> Iterator[Finding]:
    import torch

    from trainer.planning.gpus import peak_of

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = (
            f"torch {torch.__version__} is built for {built}, but finds no device"
            if built
            else f"torch {torch.__version__} is built for CPUs"
        )
        advice = (
            "check that nvidia-smi lists the GPU, and that the driver is new enough for this version"
            if built
            else "if there is a GPU, install torch for CUDA (pytorch.org)"
        )
        yield Finding("devices", "warn", f"no GPU: {why}; {os.cpu_count()} CPU cores", advice)
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peak = peak_of(about.name, True)
        known = f"{peak / 1e12:g} TFLOP/s in bf16" if peak else "its peak is not known, so no MFU is logged"
        detail = f"{about.name}, {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free, {known}"
        if free < 0.9 * total:
            yield Finding(f"device {index}", "warn", detail, "another process uses it: see nvidia-smi")
        else:
            yield Finding(f"device {index}", "ok", detail)


def arithmetic() -> Iterator[Finding]:
    """Compares matrix products in bf16 with float32, and measures the speed of both."""
    import torch

    from trainer.engine.deepspeed_config import resolve_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 4096 if device.type == "cuda" else 384
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    exact, low = a @ b, a.bfloat16() @ b.bfloat16()
    gap = float((low.float() - exact).abs().max() / exact.abs().max())
    speeds = {dtype: 2 * side**3 / _seconds(a.to(dtype), b.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    detail = (
        f"{speeds[torch.bfloat16] / 1e12:.3g} TFLOP/s, fp32 {speeds[torch.float32] / 1e12:.3g}; differs by {gap:.1e}"
    )
    if not gap <= 0.02:  # also true if it is NaN
        yield Finding(
            "bf16",
            "fail",
            detail,
            "its matrix products are wrong: update the driver and torch; set engine.precision to fp32",
        )
    elif resolve_precision("auto") == "fp32":
        yield Finding("bf16", "warn", f"{detail}; not native", "leave engine.precision at fp32 or auto")
    else:
        yield Finding("bf16", "ok", detail)


def compiled() -> Iterator[Finding]:
    """Lists the compiled kernels that GPUs use. Without a GPU, one that does not load is missed by nothing."""
    import torch

    from trainer.engine.kernels import kernels

    gpu = torch.cuda.is_available()
    for kernel in kernels():
        if kernel.problem:
            advice = kernel.mend if gpu or kernel.required else f"only GPUs use it; there: {kernel.mend}"
            yield Finding(
                kernel.name, "fail" if kernel.required else "warn", f"does not load: {kernel.problem}", advice
            )
        else:
            yield Finding(kernel.name, "ok", f"loads: {kernel.detail}")


def attention() -> Iterator[Finding]:
    """Compares xformers with SDPA at SDXL's head dimension, in each precision that training uses on this device."""
    import torch

    from trainer.models.attention import USUAL_HEAD_DIM, choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        choice = choose("auto", [USUAL_HEAD_DIM], dtype, device)
        name = f"attention {'bf16' if dtype == torch.bfloat16 else 'fp32'}"
        if choice.probe and not choice.probe.problem:
            yield Finding(name, "ok", f"{choice.backend}: {choice.why}; differs by {choice.probe.difference:.1e}")
        else:
            why = choice.why if len(choice.why) < 160 else f"{choice.why[:70]} ... {choice.why[-90:]}"
            advice = "torch's own attention is used" + (
                ", which is right on a CPU" if device.type == "cpu" else "; python -m xformers.info says more"
            )
            yield Finding(name, "warn", f"sdpa: {why}", advice)


def communication() -> Iterator[Finding]:
    """Lets two processes sum 16 MB: with NCCL if there are two GPUs, otherwise with gloo."""
    import torch

    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import os, time, torch, torch.distributed as dist\n"
        f"rank = int(os.environ['RANK']); device = torch.device('cuda', rank) if '{backend}' == 'nccl' else "
        "torch.device('cpu')\n"
        f"dist.init_process_group('{backend}')\n"
        "x = torch.full((2**22,), float(rank + 1), device=device)\n"
        "dist.all_reduce(x); assert float(x[0]) == 3 and float(x[-1]) == 3, x\n"
        "started = time.perf_counter()\n"
        "for _ in range(5): dist.all_reduce(x)\n"
        "float(x[0]); print(5 * x.nbytes / (time.perf_counter() - started) / 1e9); dist.destroy_process_group()\n"
    )
    setting = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env={**setting, "RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    try:
        answers = [process.communicate(timeout=SECONDS) for process in started]
    except subprocess.TimeoutExpired:
        yield Finding(
            "communication",
            "fail",
            f"{backend}: two processes did not connect within {SECONDS} s",
            "is the loopback interface up? NCCL_DEBUG=INFO and TORCH_DISTRIBUTED_DEBUG=DETAIL say more",
        )
        return
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        error = next(text for (_, text), p in zip(answers, started, strict=True) if p.returncode).strip().splitlines()
        yield Finding(
            "communication",
            "fail",
            f"{backend}: {error[-1] if error else 'killed'}",
            "NCCL_DEBUG=INFO says more; gloo needs a host name that resolves",
        )
    else:
        speed = float(answers[0][0].split()[-1])  # gloo of torch 2.10 prints lines of its own first
        yield Finding("communication", "ok", f"{backend}, 2 processes on this machine sum {speed:.3g} GB/s")


def shared_folder(folder: Path) -> Iterator[Finding]:
    """Checks what checkpoints need: writes that reach the disk, renames that replace a file, and locks that exclude
    other processes."""
    name = f".doctor-{uuid.uuid4().hex}"
    first, second = folder / f"{name}.a", folder / f"{name}.b"
    try:
        started = time.perf_counter()
        with first.open("wb") as file:
            file.write(b"x" * 2**22)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        second.write_bytes(b"old")
        first.replace(second)
        if second.stat().st_size != 2**22 or first.exists():
            yield Finding(
                "shared folder",
                "fail",
                f"{folder}: renaming does not replace an existing file",
                "choose another file system",
            )
            return
        if not _lock_excludes(second):
            yield Finding(
                "shared folder",
                "warn",
                f"{folder}: two processes can lock one file",
                "start each run only once, since nothing stops a second start; on Lustre, mount with flock",
            )
            return
        free = shutil.disk_usage(folder).free
        yield Finding(
            "shared folder",
            "ok",
            f"{folder}: written at {4.2e-3 / seconds:.2g} GB/s, renamed, locked; {free / 1e9:.0f} GB free",
        )
    except OSError as error:
        yield Finding("shared folder", "fail", f"{folder}: {error.strerror}", "it must exist, and be writable by you")
    finally:
        with contextlib.suppress(OSError):
            first.unlink(missing_ok=True)
            second.unlink(missing_ok=True)


def tracking(uri: str) -> Iterator[Finding]:
    """Checks that an MLflow server answers. A separate process asks it, so that it can be ended if there is no
    answer."""
    from trainer.tracking.client import QUESTION

    try:
        started = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, "-c", QUESTION, uri], capture_output=True, text=True, timeout=SECONDS / 4
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "MLflow",
            "fail",
            f"{uri}: no answer within {SECONDS // 4} s",
            "is the server running? meanwhile runs continue, and send their records later",
        )
        return
    if answer.returncode:
        lines = answer.stderr.strip().splitlines()
        yield Finding(
            "MLflow",
            "fail",
            f"{uri}: {lines[-1][:300] if lines else 'no answer'}",
            "is the address right? meanwhile runs continue, and send their records later",
        )
    else:
        yield Finding(
            "MLflow",
            "ok",
            f"{uri}: answers in {time.perf_counter() - started:.1f} s, {answer.stdout.strip()} experiments",
        )


def _lock_excludes(path: Path) -> bool:
    """Returns whether another process is refused a lock that this process holds."""
    attempt = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return subprocess.run([sys.executable, "-c", attempt, str(path)], capture_output=True).returncode != 0


def _seconds(a: object, b: object) -> float:
    """Returns the time of one matrix product in seconds: the shortest of four."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(4):
        wait()
        started = time.perf_counter()
        torch.matmul(a, b)  # pyright: ignore[reportArgumentType]
        wait()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    sys.exit(errors.run(main))
