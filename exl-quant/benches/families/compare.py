"""Prints the rows of docs/quantizer.md's table of untuned families for one model.

    python compare.py MODEL WORK --exl EXL --baseline BASELINE --calibration C --evaluation E

EXL is the command of this project, BASELINE the example of exl-quant of that name, C and E the
files that tokens.py wrote. WORK keeps the checkpoints. For each bitrate the baseline is made
first, then `exl convert` is asked for the most bits whose file is no larger.
"""

import argparse
import json
import math
import subprocess
from pathlib import Path

from safetensors.numpy import load_file

BITS = [2.5, 3.0, 3.5, 4.0, 5.0, 6.0]
# Headers may differ by the digits of a few offsets.
HEADER_SLACK = 64


def exl(args, *words):
    done = subprocess.run([args.exl, *map(str, words), "-q", "--json"], check=True,
                          stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def file_bytes(directory):
    return sum(f.stat().st_size for f in directory.glob("*.safetensors"))


def tensor_bytes(directory):
    total = file_bytes(directory)
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            total -= 8 + int.from_bytes(opened.read(8), "little")
    return total


def evaluate(args, directory):
    return exl(args, "eval", "-m", directory, "--reference", args.model,
               "--tokens", args.evaluation)


def baseline(args):
    """The directories of the baseline, one for each bitrate."""
    out = args.work / "baseline"
    # config.json is written last.
    missing = [b for b in BITS if not (out / f"{b:g}bpw" / "config.json").exists()]
    if missing:
        subprocess.run([args.baseline, args.model, out, args.calibration,
                        ",".join(map(str, missing))], check=True)
    return [out / f"{bits:g}bpw" for bits in BITS]


def convert(args, *words):
    measurement = args.work / "measurement.json"
    made = ["--measurement", measurement]
    if not measurement.exists():
        made = ["--save-measurement", measurement]
    rows, length = load_file(args.calibration)["input_ids"].shape
    rows = ["--rows", rows, "--length", length, "--cal", args.calibration]
    return exl(args, "convert", args.model, "--out", args.work / "exl", *rows, *made, *words)


def weights(args):
    """Weights of the linears of the layers, outputs padded to 32."""
    config = json.loads((args.model / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = hidden * head * 2 * (heads + kv_heads) + 3 * hidden * inner
    return layer * config["num_hidden_layers"]


def most_bits(args, limits):
    """For each limit the most bits, in thousandths, whose tensors take no more bytes."""
    found = list(BITS)
    for _ in range(6):
        points = convert(args, "--plan", "--bits", ",".join(map(str, found)))["points"]
        taken = [p["bytes"] for p in points]
        gaps = [8 * (limit - t) / weights(args) for limit, t in zip(limits, taken)]
        moved = [max(2.0, math.floor((b + g) * 1000) / 1000) for b, g in zip(found, gaps)]
        fits = all(g >= 0 for g in gaps)
        if fits and all(m - b < 0.002 for m, b in zip(moved, found)):
            return found
        found = moved
    raise SystemExit(f"no bits found for {limits}: {found} take {taken}")


def row(bits, theirs, ours, asked, sizes):
    ratio = ours["kl"] / theirs["kl"]
    cells = [f"{bits:g}"]
    for score in (theirs, ours):
        cells += [f"{score['kl']:.5f}", f"{score['kl_p99']:.4f}", f"{score['top1']:.4f}",
                  f"{score['ppl']:.3f}"]
    cells += [f"{sizes[0]:,}", f"{sizes[1]:,}", f"{asked:g}", f"{ratio:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    for name in ("exl", "baseline", "calibration", "evaluation"):
        parser.add_argument(f"--{name}", type=lambda p: Path(p).resolve(), required=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    theirs = baseline(args)
    scores = [evaluate(args, directory) for directory in theirs]
    if not (args.work / "measurement.json").exists():
        convert(args, "--measure-only")
    asked = most_bits(args, [tensor_bytes(d) - HEADER_SLACK for d in theirs])
    convert(args, "--restart", "--bits", ",".join(map(str, asked)))
    print("perplexity", exl(args, "eval", "-m", args.model, "--tokens", args.evaluation)["ppl"])
    for bits, directory, score, a in zip(BITS, theirs, scores, asked):
        name = f"{a:g}bpw" if a != int(a) else f"{a:.1f}bpw"
        ours = args.work / "exl" / name
        sizes = (file_bytes(directory), file_bytes(ours))
        assert sizes[1] <= sizes[0], f"{ours} is larger than {directory}"
        print(row(bits, score, evaluate(args, ours), a, sizes), flush=True)


if __name__ == "__main__":
    main()
