"""``python -m auglocal_ext info``: versions, devices, and what each op runs on, and why something is missing.

``--providers`` prints what was measured on this machine instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

from .. import native
from .._version import __version__
from ..native.architectures import from_ptx
from ..ops import decisions, providers
from .show import show


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``python -m auglocal_ext``."""
    parser = subparsers.add_parser("info", help="versions, devices and providers, with the reason for what is missing")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--providers", action="store_true", help="print the measured times by which provider='auto' chooses"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report; returns the exit status."""
    if args.providers:
        measured = decisions_here()
        show(json.dumps(measured, indent=2) if args.json else decisions_as_text(measured))
        return 0
    found = report()
    show(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def decisions_here() -> list[dict[str, Any]]:
    """For the CPU and each GPU: what its times depend on, and what was chosen by them, as a JSON-compatible list."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    environments = {json.dumps(where): where for where in map(decisions.environment, devices)}  # equal GPUs share one
    return [{**where, "forms": [asdict(each) for each in decisions.read_all(where)]} for where in environments.values()]


def decisions_as_text(measured: list[dict[str, Any]]) -> str:
    """The same for a person: a line for each form, with the chosen provider first."""
    lines = []
    for device in measured:
        threads = f", {device['threads']} threads" if "threads" in device else ""
        lines.append(f"{device['device']}{threads}, auglocal_ext {device['auglocal_ext']}, torch {device['torch']}")
        width = max((len(row["form"]) for row in device["forms"]), default=0)
        for row in device["forms"]:
            times = sorted(row["seconds"].items(), key=lambda each: each[0] != row["provider"])
            shown = ", ".join(f"{name} {seconds * 1e3:.3f} ms" for name, seconds in times)
            lines.append(f"  {row['form']:{width}}  {shown}  ({row['when']})")
        if not device["forms"]:
            lines.append("  nothing was measured yet: the first call of an op with each form does so")
    return "\n".join(lines)


def report() -> dict[str, Any]:
    """Everything ``info`` knows, as one JSON-compatible object."""
    build = native.build()
    recorded = {} if isinstance(build, str) else build.info
    gpus = _gpus()
    devices = ["cpu", *(f"cuda:{index}" for index in range(len(gpus)))] if gpus else ["cpu", "cuda"]
    library = native.nodes()
    missing = library if isinstance(library, str) else None
    return {
        "versions": {
            "auglocal_ext": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version_of("triton"),
            "cuda of torch": torch.version.cuda,
        },
        "gpus": gpus,
        "driver": _driver(),
        "build": {key: recorded[key] for key in ("torch", "compiler", "sources") if key in recorded},
        "nodes": {"compiled": missing is None, "reason": missing},
        "providers": {name: _provider(name, recorded, devices, gpus) for name in providers.NAMES},
        "ops": {
            op: {device: providers.choose(op, device, torch.float32) for device in devices} for op in providers.TABLES
        },
    }


def as_text(found: dict[str, Any]) -> str:
    """The report for a person."""
    lines = [f"{name:14} {version or 'none'}" for name, version in found["versions"].items()]
    for gpu in found["gpus"]:
        lines.append(f"{'GPU':14} {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    if not found["gpus"]:
        lines.append(f"{'GPU':14} none")
    if found["driver"]:
        lines.append(f"{'driver':14} up to CUDA {found['driver']}")
    if found["build"]:
        lines.append(f"{'built with':14} torch {found['build']['torch']}, {found['build']['compiler']}")
    nodes = found["nodes"]
    state = "compiled" if nodes["compiled"] else f"in Python, which takes the host longer: {nodes['reason']}"
    lines.append(f"{'autograd nodes':14} {state}")
    lines += ["", "providers"]
    for name, provider in found["providers"].items():
        state = "available" if provider["available"] else f"missing: {provider['reason']}"
        details = [f"{key} {provider[key]}" for key in ("nvcc", "runtime") if key in provider]
        details += [f"for {' '.join(provider['targets'])}"] if "targets" in provider else []
        lines.append(f"  {name:12} {state}" + (f" ({', '.join(details)})" if details else ""))
        if provider["available"]:
            lines += [f"{'':15}not on {reason}" for reason in provider.get("devices", {}).values() if reason]
        lines += [f"{'':15}{line}" for line in _better_builds(provider, found["gpus"])]
    width = 2 + max(map(len, found["ops"]))
    columns = _columns(found["ops"])
    headings = [f"on {heading}" for heading in columns]
    lines += ["", f"{'op (float32)':{width}} " + " ".join(f"{heading:12}" for heading in headings).rstrip()]
    for op, chosen in found["ops"].items():
        row = " ".join(f"{chosen[device]:12}" for device in columns.values()).rstrip()
        lines.append(f"{'  ' + op:{width}} {row}" + ("" if found["gpus"] else " (no GPU here)"))
    lines += ["", "where several providers are fast, times decide: python -m auglocal_ext info --providers"]
    return "\n".join(lines)


def _columns(ops: dict[str, dict[str, str]]) -> dict[str, str]:
    """Heading -> device: a column for all GPUs where nothing differs between them."""
    devices = [device for device in next(iter(ops.values())) if device != "cpu"]
    alike = all(chosen[device] == chosen[devices[0]] for chosen in ops.values() for device in devices)
    return {"cpu": "cpu", **({"cuda": devices[0]} if alike else {device: device for device in devices})}


def _better_builds(provider: dict[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    """How the cuda library is built for GPUs that it has no machine code for."""
    lines = []
    if provider.get("from_ptx"):
        own = ";".join(sorted({gpu["capability"] for gpu in gpus}, key=_number))
        lines.append(
            f"on {', '.join(provider['from_ptx'])} from PTX, which the driver compiles at first use; for machine code, "
            f"in the source folder: TORCH_CUDA_ARCH_LIST='{own}' pip install ."
        )
    every = provider.get("every_architecture", "")
    wanted = {f"sm_{name.replace('.', '')}" for name in every.removesuffix("+PTX").split(";") if name}
    if not wanted.issubset(provider.get("targets", ())):
        lines.append(f"for more GPUs, in the source folder: TORCH_CUDA_ARCH_LIST='{every}' pip install .")
    return lines


def _number(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)


def _provider(name: str, recorded: dict[str, Any], devices: list[str], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    reason = providers.missing(name)
    entry: dict[str, Any] = {"available": reason is None, "reason": reason}
    if name == "cuda" and reason is None:
        on = {device: providers.missing(name, device) for device in devices if ":" in device}
        entry["devices"] = on
        targets = recorded.get("libraries", {}).get(name, {}).get("targets", [])
        entry["from_ptx"] = [
            device
            for device, gpu in zip(on, gpus, strict=True)
            if on[device] is None and from_ptx(targets, _number(gpu["capability"]))
        ]
        if on and all(on.values()):
            entry |= {"available": False, "reason": "; ".join(filter(None, on.values()))}
    if name in native.LIBRARIES:
        library = recorded.get("libraries", {}).get(name, {})
        entry["built"] = bool(library.get("built", False))
        entry |= {key: value for key, value in library.items() if key not in ("built", "reason")}
    return entry


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def _driver() -> str | None:
    if native.path("cuda") is None:
        return None
    try:
        driver = native.cuda_versions()[1]
    except OSError:  # the reason is among the providers
        return None
    return native.dotted(driver) if driver else None


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
