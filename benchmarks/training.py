"""Accuracy on real images: backpropagation and every learning rule, same settings, same seed.

    python benchmarks/training.py --data DIR        # thin ResNet-8, 5 epochs of 20 000 images, on the CPU

DIR is what ``python -m auglocal_ext train --data`` takes; each row is one such command. Writes a JSON file
after each row, and prints a table. A few epochs on a part of the images show that the rules train, not what
they reach in the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _environment import environment

ROOT = Path(__file__).resolve().parents[1]

ROWS = {
    "BP": "--rule bp",
    "AugLocal d=2": "--rule auglocal --depth 2",
    "AugLocal d=3": "--rule auglocal --depth 3",
    "ContSup R0": "--rule contsup --context R0",
    "ContSup E": "--rule contsup --context E",
    "ContSup R1E": "--rule contsup --context R1E",
    "Greedy": "--rule greedy",
    "DGL": "--rule dgl",
    "PredSim": "--rule predsim",
    # The weights of its experiments with the same data, one module per layer (ResNet-32); this network has none.
    "InfoPro": "--rule infopro --weights 5,0.05,0.2,0.5",
    "MAN": "--rule man",
}
SETTINGS = (
    "--network resnet8 --width 8 --batch-size 128 --lr 0.1 --epochs 5 --train-images 20000 --seed 1234 "
    "--channels-last --device cpu"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="CIFAR-10, as an image folder or torchvision's files"
    )
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--settings", default=SETTINGS, help=f"options common to all rows (default: {SETTINGS})")
    parser.add_argument("--json", default="runs/benchmarks/training.json", metavar="FILE")
    options = parser.parse_args()

    report = environment() | {"settings": options.settings, "rows": []}
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in options.rows:
        report["rows"].append({"name": name, **_run(f"{options.settings} {ROWS[name]}", options.data)})
        path.write_text(json.dumps(report, indent=2) + "\n")
    _print(report["rows"])
    print(f"\nwrote {path}")
    return 0


def _run(arguments: str, data: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        start = time.perf_counter()
        command = [sys.executable, "-m", "auglocal_ext", "train", "--data", str(Path(data).resolve())]
        command += ["--output", str(output), *shlex.split(arguments)]
        subprocess.run(command, cwd=ROOT, check=True)
        wall = time.perf_counter() - start
        with (output / "log.csv").open(newline="") as file:
            epochs = list(csv.DictReader(file))
        config = json.loads((output / "config.json").read_text())
    return {
        "command": f"python -m auglocal_ext train --data DIR --output OUTPUT {arguments}",
        "local_modules": config["data"]["local_modules"],
        "last_test_accuracy": float(epochs[-1]["test_accuracy"]),
        "best_test_accuracy": max(float(row["test_accuracy"]) for row in epochs),
        "train_seconds": sum(float(row["seconds"]) for row in epochs),
        "wall_seconds": wall,
        "peak_bytes": int(epochs[-1]["peak_bytes"]),
        "threads": config["threads"],
        "load_average": os.getloadavg()[2],  # over 15 minutes: seconds compare between rows on an idle machine only
        "versions": config["versions"],
        "log": epochs,
    }


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':<14}{'modules':>8}{'last':>9}{'best':>9}{'training':>11}{'peak':>10}")
    for row in rows:
        last, best = row["last_test_accuracy"], row["best_test_accuracy"]
        print(
            f"{row['name']:<14}{row['local_modules']:>8}{last:>9.2%}{best:>9.2%}"
            f"{row['train_seconds']:>9.0f} s{row['peak_bytes'] / 1e6:>7.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
