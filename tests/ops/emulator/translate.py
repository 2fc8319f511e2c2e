"""A CUDA source as C++ for the emulator."""

from __future__ import annotations

import re


class NotUnderstood(Exception):
    """A CUDA source has something which the emulator does not know."""


def host_source(text: str, name: str) -> str:
    """A .cu file or header as C++ for the emulator, line by line. ``name`` is what reports call it."""

    def launch(found: re.Match[str]) -> str:
        kernel, grid, threads, arguments = found.groups()
        label = re.sub(r"\s+", " ", kernel)
        call = f'emulator::launch("{label}", &emulator::library, {grid}, {threads}, [&] {{ {kernel}({arguments}); }})'
        return call + "\n" * (found.group().count("\n") - call.count("\n"))

    def shared(found: re.Match[str]) -> str:
        kind, array, extent = found.groups()
        kind = f"std::type_identity_t<{kind}{extent or ''}>"
        return (
            f'static constinit const emulator::SharedArray {array}_declared{{"{array}"}}; '
            f"auto& {array} = *static_cast<{kind}*>(emulator::shared({array}_declared, sizeof({kind})));"
        )

    text = re.sub(r"(\w+(?:<[^<>;]*>)?)<<<(.*?), (\w+), 0, stream>>>\(([^()]*)\)", launch, text, flags=re.DOTALL)
    text = re.sub(r"(?:alignas\(\d+\) )?__shared__ ([\w:]+(?:<[^;]*>)?) (\w+)(\[[^\]]+\])?;", shared, text)
    text = re.sub(r"(?:torch::stable|memory)::(new_empty|empty_like)\(", r"emulator::\1(", text)
    text = re.sub(
        r"m\.impl\((\"[\w.]+\"), TORCH_BOX\(&(\w+)\)\)", r"m.impl(\1, TORCH_BOX((&emulator::Op<\1, &\2>::call)))", text
    )
    text = re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+, )CUDA", r"\1CPU", text)
    for device_only in (
        r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);",
        r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(.*?\)\);",
        r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);",
    ):
        text = re.sub(device_only, "", text)
    left = re.sub(r"//[^\n]*", "", text)
    for unknown, what in (
        (r"<<<", "a launch"),
        (r"\b__shared__\b", "shared memory"),
        (r"\b__device__ (?:\w+ )+\w+(?:\[[^\]]*\])*(?: = [^;]*)?;", "a variable on the device"),
        (r"\btorch::stable::\w+_\(", "an op of torch that writes into a tensor"),
        (r"\bvolatile\b", "a volatile access"),
        (r"TORCH_BOX\(&", "an op"),
        (r"DeviceGuard|current_cuda_stream|LAUNCH_CHECK", "the device"),
    ):
        match = re.search(unknown, left)
        if match:
            raise NotUnderstood(f"{name}: {what} is written in a way that the emulator does not know: {match.group()}")
    return f'#line 1 "{name}"\n' + text
