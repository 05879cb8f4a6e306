"""Writes the token files that docs/quantizer.md's table of untuned families is measured with.

    python tokens.py TOKENIZER_DIR OUT --calibration cal.parquet --evaluation text.txt

OUT gets `cal.safetensors` (`input_ids` [100, 512], the column `text` row after row) and
`eval.safetensors` (`input_ids` [24, 512], pieces at equal distances in the text).
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from safetensors.numpy import save_file
from tokenizers import Tokenizer


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def calibration(tokenizer, path, rows, length):
    tokens = []
    for text in parquet.read_table(path, columns=["text"]).column("text"):
        tokens += ids(tokenizer, text.as_py())
        if len(tokens) >= rows * length:
            break
    return np.array(tokens[: rows * length], dtype=np.int32).reshape(rows, length)


def evaluation(tokenizer, path, rows, length):
    tokens = ids(tokenizer, path.read_text(encoding="utf-8"))
    distance = (len(tokens) - length) // (rows - 1)
    pieces = [tokens[i * distance : i * distance + length] for i in range(rows)]
    return np.array(pieces, dtype=np.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    args.out.mkdir(parents=True, exist_ok=True)
    cal = calibration(tokenizer, args.calibration, 100, args.length)
    save_file({"input_ids": cal}, args.out / "cal.safetensors")
    text = evaluation(tokenizer, args.evaluation, 24, args.length)
    save_file({"input_ids": text}, args.out / "eval.safetensors")


if __name__ == "__main__":
    main()
