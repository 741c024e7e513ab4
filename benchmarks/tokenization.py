"""Tokenizing many small documents: in batches, against one after the other with a file each.

python benchmarks/tokenization.py --documents 5000
"""

import argparse
import os
import tempfile
import time

import record

from longrope.data.documents import Document
from longrope.data.windows import tokenize
from longrope.models.load import load_tokenizer


def seconds(work) -> float:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LONGROPE_CACHE"] = cache
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=5000)
    args = parser.parse_args()
    tokenizer = load_tokenizer("bundled")
    text = "def function_{0}(x):\n    return {0} + x\n" * 20
    documents = [Document(str(n), text.format(n)) for n in range(args.documents)]
    row = {
        "batches": seconds(lambda: tokenize(documents, tokenizer)),
        "one by one": seconds(lambda: [tokenize([one], tokenizer) for one in documents]),
    }
    ratio = row["one by one"] / row["batches"]
    print(f"{args.documents:,} documents: {row['batches']:.1f} s in batches, {ratio:.1f} times")
    print(record.write("tokenization", vars(args), [row]))


if __name__ == "__main__":
    main()
