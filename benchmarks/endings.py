"""Writes a task for lm-eval that needs no network: which of four endings follows a passage of the test text.

    python benchmarks/endings.py DIRECTORY        # --samples 60

It compares backends on one model, not models: docs/external-checks.md has the commands.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "wiki.test.txt"
WORDS, ENDING, CHOICES = 40, 6, 4
TASK = """task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{sentence}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write(folder: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes the task `endings` into a directory: rows with a `sentence`, `choices` and the index of the `answer`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "endings.yaml").write_text(TASK.format(data=folder / "rows.jsonl"), encoding="utf-8")


def passages(samples: int, seed: int = 0) -> list[dict[str, object]]:
    """Passages of `WORDS` words, their endings among others from the same text, and which is right."""
    words, draw = TEXT.read_text(encoding="utf-8").split(), random.Random(seed)
    found: list[dict[str, object]] = []
    for _ in range(samples):
        start = draw.randrange(len(words) - WORDS - ENDING)
        others = [draw.randrange(len(words) - ENDING) for _ in range(CHOICES - 1)]
        answer = draw.randrange(CHOICES)
        others.insert(answer, start + WORDS)
        choices = [" " + " ".join(words[at : at + ENDING]) for at in others]
        found.append({"sentence": " ".join(words[start : start + WORDS]), "choices": choices, "answer": answer})
    return found


def main() -> None:
    """Writes the task and its data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--samples", type=int, default=60)
    arguments = parser.parse_args()
    folder = arguments.directory.resolve()
    write(folder, passages(arguments.samples))
    print(f"{folder}: {arguments.samples} samples; lm_eval run --include_path {folder} --tasks endings ...")


if __name__ == "__main__":
    main()
