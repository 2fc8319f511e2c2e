"""compute-sanitizer over a few tests of the CUDA kernels. Writes sanitizer-TOOL.txt: what it found, then its end.

python benchmarks/_gpu_sanitizer.py memcheck --output DIR
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from _resume import write_text

ROOT = Path(__file__).resolve().parents[1]
FOUND = 86  # exit status of the tool if it found something

# Small shapes of every op and kernel. What initcheck sees must not be filled in beforehand, as the tests of shapes do.
SELECTION = {
    "memcheck": "cuda-cuda and test_shapes and (float32 or bfloat16)",
    "racecheck": "cuda-cuda and (test_bitwise_repeatable or (test_shapes and float32))",
    "initcheck": "cuda-cuda and (test_bitwise_repeatable or test_autocast)",
}
TOOLS = tuple(SELECTION)


def find_tool() -> str | None:
    """compute-sanitizer on PATH, or in the CUDA toolkit."""
    if found := shutil.which("compute-sanitizer"):
        return found
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parents[1]))
    for root in filter(None, roots):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if (path := Path(root) / place).is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def missing() -> str | None:
    return None if find_tool() else "compute-sanitizer is neither on PATH nor in the CUDA toolkit"


def options_of(tool: str, help_text: str) -> list[str]:
    """Our kernels alone, where this version can be told: others would take most of the time, and are not ours."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "50"]
    if "--kernel-regex" in help_text:
        options += ["--kernel-regex", "kns=auglocal"]
    return options


def judge(status: int, output: str, tool: str) -> tuple[int, str]:
    """Exit status and a sentence for how the tool ended."""
    summaries = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): .+", output)
    passed = re.findall(r"(\d+) passed", output)
    if not summaries:
        said = [line for line in output.splitlines() if re.search(r"error|not supported", line, re.IGNORECASE)]
        return 1, f"{tool} did not come to its end: {(said or output.strip().splitlines() or ['no output'])[-1][:200]}"
    found = any(not re.search(r"\b0 (errors|hazards)", summary) for summary in summaries)
    if status == FOUND or found:
        return 1, f"{tool} found something: {summaries[-1]}"
    if status:
        return 1, f"{tool}: {summaries[-1]}, but the tests ended with status {status}"
    if not passed or passed[-1] == "0":
        return 1, f"{tool}: no test passed"
    return 0, f"{tool}: {summaries[-1]}; {passed[-1]} tests passed"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--collect-only", action="store_true", help="only see that there are such tests")
    options = parser.parse_args(arguments)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "tests/ops"]
    tests += ["-m", "gpu and not slow and not large", "-k", SELECTION[options.tool]]
    if options.collect_only:
        return subprocess.run([*tests, "--collect-only"], cwd=ROOT).returncode
    tool = find_tool()
    if tool is None:
        print(missing())
        return 1
    help_text = subprocess.run([tool, "--help"], capture_output=True, text=True).stdout
    # Every tensor must be an allocation of its own, or a wrong address lies within the allocator's block.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, *options_of(options.tool, help_text), *tests]
    print(f"$ {' '.join(command)}", flush=True)
    output = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                output = (output + line)[-1_000_000:]
        except KeyboardInterrupt:  # no time is left; the tool has been told too
            output += "stopped: no time was left for an error summary\n"
    status, sentence = judge(process.returncode, output, options.tool)
    told = "\n".join(line for line in output.splitlines() if line.startswith("=========") or " passed" in line)
    write_text(options.output / f"sanitizer-{options.tool}.txt", f"{sentence}\n\n{told[-200_000:]}\n")
    print(sentence)
    return status


if __name__ == "__main__":
    sys.exit(main())
